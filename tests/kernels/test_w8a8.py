"""8-bit weights times 8-bit activations against exact integers, in the interpreter (or on a GPU)."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, random_x
from tolerance import assert_close_to_float64
from torch import Tensor

from llmq_kernels import naive, w8a8
from llmq_kernels.w8a8 import Tile

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16", "fp32"])
ways = pytest.mark.parametrize("fused", [True, False], ids=["fused", "in two"])
pytestmark = pytest.mark.usefixtures("poisoned_empty")
drawn = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_codes(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return codes int8 [n, k] of the whole range and scales float32 [n] of both signs."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), generator=draw).to(torch.int8)
    scales = (torch.rand(n, generator=draw) + 0.5) * torch.where(torch.rand(n, generator=draw) < 0.5, -1, 1) / 64
    return codes.to(DEVICE), scales.to(DEVICE)


def whole_tokens(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Return tokens that are their own codes: whole numbers, of which the largest is 127, so that scales are 1."""
    x = torch.randint(-127, 128, (m, k), generator=torch.Generator().manual_seed(m * k))
    x[torch.arange(m), torch.arange(m) % k] = torch.where(torch.arange(m) % 2 == 0, 127, -127)
    return x.to(DEVICE, dtype)


def force(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    monkeypatch.setattr(w8a8, "FUSED_M", 2**31 if fused else 0)
    monkeypatch.setattr(w8a8, "FUSED_BYTES", 2**62)


@drawn
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 140), st.integers(1, 300)),  # M, N, K
    dtype=st.sampled_from(DTYPES),
    static=st.booleans(),
    bias=st.booleans(),
    fused=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_product_is_that_of_exact_integers(
    shape: tuple[int, int, int], dtype: torch.dtype, static: bool, bias: bool, fused: bool, seed: int
) -> None:
    m, n, k = shape
    codes, scales = random_codes(n, k, seed)
    x = random_x(m, k, dtype, seed)
    b = random_x(1, n, dtype, seed + 1)[0] if bias else None
    scale = torch.tensor([0.013], device=DEVICE) if static else None  # what is beyond 1.6 is cut off
    with pytest.MonkeyPatch.context() as patch:
        force(patch, fused)
        y = w8a8.matmul(x, *w8a8.pack(codes, scales), b, n, k, scale=scale)
    assert y.dtype == dtype
    # Integers are exact and so are codes: what is left are three roundings of float32 and the last one.
    assert_close_to_float64(y, naive.int8_linear(x, codes, scales, b, scale), 1)
    if dtype == torch.float32:
        token_codes, token_scales = naive.quantize_tokens(x, scale)
        sums = (token_codes.double() @ codes.double().T).float()  # exact below 2**24
        expected = sums * token_scales[:, None] * scales
        assert torch.equal(y, expected if b is None else expected + b)


@ways
@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 7), (3, 130, 128), (9, 33, 500), (20, 20, 1040)])
def test_sums_are_exact(fused: bool, m: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, fused)
    x, codes = whole_tokens(m, k, torch.float32), random_codes(n, k)[0]
    y = w8a8.matmul(x, *w8a8.pack(codes, torch.ones(n, device=DEVICE)), None, n, k)
    sums = x.long() @ codes.long().T
    assert 1040 * 127 * 127 < 2**24  # the sums are exact in float32
    assert torch.equal(y, sums.float())


@ways
def test_sums_of_the_most_inputs_do_not_leave_32_bits(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, fused)
    k = w8a8.MAX_K
    assert k * 127 * 127 < 2**31 <= (k + 1) * 127 * 127
    x = torch.full((2, k), 127.0, device=DEVICE)
    x[1] = -127
    codes = torch.full((1, k), 127, dtype=torch.int8, device=DEVICE)
    y = w8a8.matmul(x, *w8a8.pack(codes, torch.ones(1, device=DEVICE)), None, 1, k)
    largest = float(torch.tensor(k * 127 * 127).float())
    assert y.flatten().tolist() == [largest, -largest]
    assert str(w8a8.refuses(1, k + 1, torch.float16)) == "K = 133145: sums of more than 133144 products leave int32"


@dtypes
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_tokens_are_rounded_as_naive_says(dtype: torch.dtype, static: bool) -> None:
    k = w8a8.QUANTIZE_BLOCK + 77  # more than one step of the sweep
    x = torch.cat((random_x(3, k, dtype), whole_tokens(3, k, dtype) / 2))
    x[3:, 0] = 127  # a scale of 1, and every second number a tie
    x[0, 4100] = 9  # the largest is behind the first step
    x[1] = 0
    scale = torch.tensor([1.0], device=DEVICE) if static else None
    codes, scales = w8a8.quantize_tokens(x, scale)
    expected, expected_scales = naive.quantize_tokens(x, scale)
    assert codes.shape == (6, k + -k % w8a8.BLOCK_K)
    assert torch.equal(codes[:, :k], expected)
    assert not codes[:, k:].any()
    assert torch.equal(scales, expected_scales)
    assert (expected[3:, 1:] == (x[3:, 1:].float()).round()).all()  # ties to even, as torch rounds


def test_small_tokens_have_scales_of_their_own_down_to_the_least() -> None:
    x = random_x(4, 40, torch.float32) * 2.0 ** torch.tensor([-30.0, -90.0, -101.0, -140.0], device=DEVICE)[:, None]
    codes, scales = w8a8.quantize_tokens(x, None)
    expected, expected_scales = naive.quantize_tokens(x)
    assert torch.equal(codes[:, :40], expected)
    assert torch.equal(scales, expected_scales)
    assert expected.abs().amax(1).tolist()[:2] == [127, 127]
    assert not expected[3].any()


def test_each_code_is_the_nearest_level() -> None:
    x = random_x(5, 300, torch.float32)
    codes, scales = naive.quantize_tokens(x)
    assert codes.abs().amax(1).tolist() == [127] * 5
    # half a step, and of the three roundings of float32 one part in 2**22
    assert ((codes * scales[:, None] - x).abs() <= scales[:, None] * (0.5 + 127 * 2.0**-22)).all()


@ways
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_what_is_not_finite_stays_in_its_token(fused: bool, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, fused)
    n, k = 33, 200
    codes, scales = random_codes(n, k)
    x = random_x(6, k, torch.float16)
    for token, value in ((1, torch.nan), (2, torch.inf), (4, -torch.inf)):
        x[token, 150] = value
    scale = torch.tensor([0.1], device=DEVICE) if static else None
    y = w8a8.matmul(x, *w8a8.pack(codes, scales), None, n, k, scale=scale)
    assert y.isnan().all(1).tolist() == [False, True, True, False, True, False]
    whole = [0, 3, 5]
    assert_close_to_float64(y[whole], naive.int8_linear(x[whole], codes, scales, None, scale), 1)


@ways
def test_tokens_of_zeros_and_next_to_zero(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, fused)
    codes, scales = random_codes(33, 40)
    x = torch.zeros(4, 40, device=DEVICE)
    x[1] = 2.0**-140  # subnormal
    x[2] = 2.0**-99
    x[3] = 2.0**110
    bias = torch.randn(33, device=DEVICE)
    y = w8a8.matmul(x, *w8a8.pack(codes, scales), bias, 33, 40)
    assert torch.equal(y[:3], bias.expand(3, 33))
    assert_close_to_float64(y[3:], naive.int8_linear(x[3:], codes, scales, None), 1)


@ways
def test_activations_of_any_strides(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, fused)
    n, k = 33, 100
    codes, scales = random_codes(n, k)
    packed = w8a8.pack(codes, scales)
    wide = torch.full((2 * k, 2 * k), torch.nan, device=DEVICE)
    wide[:k, :5] = random_x(k, 5, torch.float32)
    wide[3:8, k : 2 * k] = random_x(5, k, torch.float32)
    for x in (wide[:k, :5].T, wide[3:8, k : 2 * k], wide[3:4, k : 2 * k].expand(5, k)):
        y = w8a8.matmul(x, *packed, None, n, k)
        assert_close_to_float64(y, naive.int8_linear(x, codes, scales, None), 1)
    assert w8a8.matmul(wide[:0, :k], *packed, None, n, k).shape == (0, n)


def test_unpack_undoes_pack() -> None:
    draw = random.Random(3)
    for _ in range(8):
        n, k = draw.randint(1, 200), draw.randint(1, 300)
        codes, scales = random_codes(n, k, seed=n)
        weight, padded = w8a8.pack(codes, scales)
        assert weight.shape == (n + -n % 128, k + -k % 128)
        assert not weight[n:].any()
        assert not weight[:, k:].any()
        assert not padded[n:].any()
        found = w8a8.unpack(weight, padded, n, k)
        assert torch.equal(found[0], codes)
        assert torch.equal(found[1], scales)


def test_few_tokens_of_small_weights_are_quantized_by_the_product() -> None:
    assert [w8a8.fuses(m, 4096, 4096) for m in (1, 8, 9)] == [True, True, False]
    assert [w8a8.fuses(8, n, 4096) for n in (5440, 5441)] == [True, False]
    assert [w8a8.fuses(1, n, 4096) for n in (43648, 43649)] == [True, False]


def test_tiles_are_picked_by_tokens_and_processors() -> None:
    assert w8a8.pick(1, 4096, 4096, processors=132) == (True, w8a8.FUSED[0])
    assert w8a8.pick(8, 4096, 4096, processors=64) == (True, w8a8.FUSED[1])
    found = [w8a8.pick(m, 4096, 4096, 132) for m in (9, 17, 33, 65, 4096)]
    assert found == [(False, w8a8.TILES[i]) for i in (0, 1, 2, 3, 3)]
    assert all(128 % tile.block_n == 0 for tile in (*w8a8.FUSED, *w8a8.TILES))
    assert {tile.block_m for tile in w8a8.FUSED} == {w8a8.FUSED_M}


@pytest.mark.parametrize("tile", [*w8a8.FUSED, *w8a8.TILES], ids=str)
def test_every_tile_is_right(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = tile in w8a8.FUSED
    monkeypatch.setattr(w8a8, "pick", lambda *_: (fused, tile))
    n, k, m = tile.block_n + 1, 130, tile.block_m + 1
    codes, scales = random_codes(n, k)
    x = random_x(m, k, torch.float32)
    y = w8a8.matmul(x, *w8a8.pack(codes, scales), None, n, k)
    assert_close_to_float64(y, naive.int8_linear(x, codes, scales, None), 1)


def far(rows: Tensor) -> Tensor:
    """Return `rows` with strides for which the last row begins beyond 2**31 elements."""
    count, width = rows.shape
    stride = 2**31 // (count - 1) // 16 * 16 + 16
    # Uninitialized, so that the system lends pages only for what is written.
    spread = torch.empty((count - 1) * stride + width, dtype=torch.int8, device=DEVICE)
    return spread.as_strided((count, width), (stride, 1)).copy_(rows)


def test_addresses_are_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = random_codes(64, 128)
    x = random_x(4, 128, torch.float32)
    truth = naive.int8_linear(x, codes, scales, None)
    weight, padded = w8a8.pack(codes, scales)
    out = torch.empty(4, 64, device=DEVICE)
    w8a8._multiply(x, None, w8a8.FUSED[0], far(weight[:64]), padded, None, out)
    assert_close_to_float64(out, truth, 1)
    quantized, token_scales = w8a8.quantize_tokens(x, None)
    out = torch.empty(4, 64, device=DEVICE)
    w8a8._multiply(far(quantized), token_scales, w8a8.TILES[0], weight, padded, None, out)
    assert_close_to_float64(out, truth, 1)
    whole = whole_tokens(4, 128, torch.float32).to(torch.int8)
    monkeypatch.setattr(w8a8, "_check", lambda *_: None)
    assert torch.equal(w8a8.quantize_tokens(far(whole), None)[0], whole)


def test_what_does_not_fit_is_named() -> None:
    codes, scales = random_codes(33, 64)
    with pytest.raises(ValueError, match=r"codes: torch\.uint8 \[33, 64\]; needs int8"):
        w8a8.pack(codes.view(torch.uint8), scales)
    with pytest.raises(ValueError, match=r"codes: smallest is -128; needs -127\.\.127"):
        w8a8.pack(torch.full_like(codes, -128), scales)
    with pytest.raises(ValueError, match=r"codes \[0, 64\]: weight \[0, 64\]: is empty"):
        w8a8.pack(codes[:0], scales[:0])
    for wrong in (scales[:5], scales * torch.inf):
        with pytest.raises(ValueError, match=r"scales \[.*\]: needs \[33\], all finite"):
            w8a8.pack(codes, wrong)
    weight, padded = w8a8.pack(codes, scales)
    x = random_x(3, 64, torch.float16)
    cases = {
        "torch.float64: needs float16": (x.double(), weight, padded, None, 33, 64),
        r"x \[3, 32\]: needs \[M, 64\]": (x[:, :32], weight, padded, None, 33, 64),
        r"weight: torch.int8 \[33, 64\]; needs contiguous torch.int8 \[128, 128\]": (x, codes, padded, None, 33, 64),
        r"scales: torch.float32 \[33\]; needs": (x, weight, scales, None, 33, 64),
        r"bias: torch.float32 \[5\]; needs": (x, weight, padded, scales[:5], 33, 64),
        r"weight \[33, 200000\]: K = 200000: sums": (x, weight, padded, None, 33, 200000),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            w8a8.matmul(*arguments)
    with pytest.raises(ValueError, match=r"scale: torch.float64 \[1\]; needs contiguous torch.float32 \[1\]"):
        w8a8.matmul(x, weight, padded, None, 33, 64, scale=torch.ones(1, dtype=torch.float64, device=DEVICE))


def test_a_tile_says_what_it_compiles_to() -> None:
    tile = replace(w8a8.TILES[0], block_m=32)
    assert w8a8.constants(tile, 256)["EVEN_K"]
    assert not w8a8.constants(tile, 200)["EVEN_K"]
    assert w8a8.constants(tile, 256)["BLOCK_M"] == 32
