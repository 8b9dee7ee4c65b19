"""8-bit weights times 8-bit activations in C: exactly what float32 makes of exact integers, on every path."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import AT_THE_END, needs_compiler
from torch import Tensor

from llmq_kernels import naive
from llmq_kernels import w8a8 as triton_w8a8
from llmq_kernels.native import build, w8a8

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
# what the same source is on lesser processors
PATHS = {"no AVX512_VNNI": ("-mno-avx512vnni",), "no AVX-512": ("-O1", "-mno-avx512f")}
pytestmark = [pytest.mark.usefixtures("poisoned_empty"), needs_compiler]
drawn = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_weight(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), generator=draw).to(torch.int8)
    return codes, torch.randn(n, generator=draw) / 64


def draw_x(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_float32(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """Return the product as float32 rounds it, from integers that are exact, then rounded to the dtype of `x`."""
    token_codes, token_scales = naive.quantize_tokens(x, scale)
    sums = token_codes.long() @ codes.long().T
    y = sums.float() * token_scales[:, None] * scales
    return (y if bias is None else y + bias.float()).to(x.dtype)


def check(m: int, n: int, k: int, dtype: torch.dtype, static: bool, with_bias: bool, seed: int) -> None:
    codes, scales = random_weight(n, k, seed)
    x, bias = draw_x(m, k, dtype, seed), draw_x(1, n, torch.float32)[0] if with_bias else None
    scale = torch.tensor([0.013]) if static else None
    y = w8a8.matmul(x, *w8a8.pack(codes, scales), bias, scale=scale)
    assert y.dtype == dtype
    assert torch.equal(y, in_float32(x, codes, scales, bias, scale))


@drawn
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    static=st.booleans(),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_product_is_that_of_exact_integers(
    m: int, n: int, k: int, dtype: torch.dtype, static: bool, with_bias: bool, seed: int
) -> None:
    check(m, n, k, dtype, static, with_bias, seed)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_that_of_exact_integers(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        kernels = w8a8.load(PATHS[path])
    except build.BuildError as error:
        pytest.skip(f"this compiler has no such path: {error}")
    monkeypatch.setattr(w8a8, "_library", lambda: kernels)
    for seed in range(18):
        m, n, k = 1 + seed * 5 % 17, 1 + seed * 7 % 41, 1 + seed * 67 % 290
        check(m, n, k, DTYPES[seed % 3], seed % 2 == 0, seed % 5 < 2, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_gpu_computes_the_same_to_the_last_bit(dtype: torch.dtype) -> None:
    codes, scales = random_weight(33, 200, seed=1)
    x, bias = draw_x(5, 200, dtype), draw_x(1, 33, torch.float32)[0]
    y = triton_w8a8.matmul(x, *triton_w8a8.pack(codes, scales), bias, 33, 200)
    assert torch.equal(y, w8a8.matmul(x, *w8a8.pack(codes, scales), bias))


@pytest.mark.parametrize("m", [510, 511, 1021])
def test_tokens_are_taken_some_at_a_time(m: int) -> None:
    check(m, 5, 70, torch.bfloat16, static=False, with_bias=True, seed=3)


def test_sums_of_the_most_inputs_do_not_leave_32_bits() -> None:
    k = w8a8.MAX_K
    assert k * 127 * 127 < 2**31 <= (k + 1) * 127 * 127
    x = torch.full((2, k), 127.0)
    x[1] = -127
    codes = torch.full((2, k), 127, dtype=torch.int8)
    codes[1] = -127
    y = w8a8.matmul(x, *w8a8.pack(codes, torch.ones(2)), None)
    largest = float(torch.tensor(k * 127 * 127).float())
    assert y.tolist() == [[largest, -largest], [-largest, largest]]
    assert str(w8a8.refuses(k + 1, torch.float16)) == "K = 133145: sums of more than 133144 products leave int32"


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_token(static: bool, dtype: torch.dtype) -> None:
    codes, scales = random_weight(9, 70, seed=0)
    x = draw_x(6, 70, dtype)
    for token, value in ((1, torch.nan), (2, torch.inf), (4, -torch.inf)):
        x[token, 50] = value
    scale = torch.tensor(0.1) if static else None
    y = w8a8.matmul(x, *w8a8.pack(codes, scales), None, scale=scale)
    assert y.isnan().all(1).tolist() == [False, True, True, False, True, False]
    whole = [0, 3, 5]
    assert torch.equal(y[whole], in_float32(x[whole], codes, scales, None, scale))


def test_a_nan_of_all_bits_is_one_in_bfloat16_too() -> None:
    """Rounded like a number it would be -0."""
    bias = torch.tensor([0x7FFFFFFF, 0], dtype=torch.int32).view(torch.float32)
    codes, scales = random_weight(2, 64, seed=0)
    y = w8a8.matmul(draw_x(3, 64, torch.bfloat16), *w8a8.pack(codes, scales), bias)
    assert y.isnan().all(0).tolist() == [True, False]


def test_tokens_of_zeros_and_next_to_zero() -> None:
    codes, scales = random_weight(9, 40, seed=0)
    x = torch.zeros(4, 40)
    x[1] = 2.0**-140  # subnormal
    x[2] = 2.0**-99
    x[3] = 2.0**110
    bias = torch.randn(9)
    y = w8a8.matmul(x, *w8a8.pack(codes, scales), bias)
    assert torch.equal(y[:3], bias.expand(3, 9))
    assert not w8a8.matmul(torch.full((1, 40), 2.0**-120), *w8a8.pack(codes, scales), None).any()
    assert torch.equal(y, in_float32(x, codes, scales, bias))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_activations_of_any_strides(dtype: torch.dtype) -> None:
    codes, scales = random_weight(19, 100, seed=0)
    flat = draw_x(1, 401, dtype)[0]
    views = {
        "off alignment": flat[1:301].view(3, 100),
        "transposed": draw_x(100, 3, dtype).T,
        "every second column": draw_x(3, 200, dtype)[:, ::2],
        "every second row": draw_x(6, 100, dtype)[::2],
        "one row repeated": draw_x(1, 100, dtype).expand(3, 100),
        "none": draw_x(0, 100, dtype),
    }
    for name, x in views.items():
        y = w8a8.matmul(x, *w8a8.pack(codes, scales), None)
        assert torch.equal(y, in_float32(x, codes, scales, None)), name


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w8a8, "_GRAIN", 1)
    codes, scales = random_weight(301, 320, seed=0)
    before = torch.get_num_threads()
    for m in (1, 40):
        x, found = draw_x(m, 320, torch.float32), []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(w8a8.matmul(x, *w8a8.pack(codes, scales), None))
        torch.set_num_threads(before)
        assert all(torch.equal(y, in_float32(x, codes, scales, None)) for y in found)


def test_unpack_undoes_pack() -> None:
    for n, k in ((1, 1), (5, 7), (33, 64), (2, 127)):
        codes, scales = random_weight(n, k, seed=n)
        words, kept = w8a8.pack(codes, scales)
        assert words.shape == (n, -(-k // 4))
        found = w8a8.unpack(words, kept, k)
        assert torch.equal(found[0], codes)
        assert torch.equal(found[1], scales)


GUARDED = (
    AT_THE_END
    + """
from llmq_kernels.native import w8a8

for k in (1, 4, 63, 64, 65, 100, 128):
    words, scales = w8a8.pack(torch.ones(6, k, dtype=torch.int8), torch.ones(6))
    weight = at_the_end(words), at_the_end(scales)
    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 3, 7, 14):
            w8a8.matmul(at_the_end(torch.ones(m, k, dtype=dtype)), *weight, at_the_end(torch.ones(6)))
print("done")
"""
)


def test_nothing_is_read_behind_the_end_of_a_tensor() -> None:
    folder = Path(naive.__file__).parents[1]
    command = [sys.executable, "-c", GUARDED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.stdout == "done\n", done.stderr


def test_a_weight_of_more_than_two_to_the_31_bytes() -> None:
    """Only the last rows are written; the rest are one page of zeros, as often as it takes."""
    n, k = 2**15 + 3, 2**16
    room = mmap.mmap(-1, n * k, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    words = torch.frombuffer(room, dtype=torch.int32).view(n, k // 4)
    codes, scales = random_weight(3, k, seed=0)
    words[-3:] = w8a8.pack(codes, scales)[0]
    x = draw_x(1, k, torch.float32)
    y = w8a8.matmul(x, words, torch.cat((torch.zeros(n - 3), scales)), None)
    assert torch.equal(y[:, -3:], in_float32(x, codes, scales, None))


def test_what_does_not_fit_is_named() -> None:
    codes, scales = random_weight(8, 64, seed=0)
    for wrong, message in (
        (codes.view(torch.uint8), r"codes: torch\.uint8 \[8, 64\]; needs int8"),
        (codes[:0], r"codes: torch\.int8 \[0, 64\]; needs int8"),
        (torch.full_like(codes, -128), r"codes: smallest is -128; needs -127\.\.127"),
    ):
        with pytest.raises(ValueError, match=message):
            w8a8.pack(wrong, scales[: len(wrong)])
    for nothing in (scales[:3], scales * torch.inf):
        with pytest.raises(ValueError, match=r"scales \[.*\]: needs \[8\], all finite"):
            w8a8.pack(codes, nothing)
    words, scales = w8a8.pack(codes, scales)
    x = draw_x(2, 64, torch.float32)
    cases = {
        r"x torch.float64 \[2, 64\]": (x.double(), words, scales, None),
        r"x torch.float32 \[64\]": (x[0], words, scales, None),
        r"x torch.float32 \[2, 0\]": (x[:, :0], words, scales, None),
        r"words torch.int32 \[8, 4\] on cpu: needs torch.int32 \[8, 16\]": (x, words[:, :4], scales, None),
        r"words torch.int64": (x, words.long(), scales, None),
        r"words .* contiguous": (x, words.repeat(1, 2)[:, ::2], scales, None),
        r"scales torch.float16": (x, words, scales.half(), None),
        r"bias \[3\]: needs \[8\]": (x, words, scales, scales[:3]),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            w8a8.matmul(*arguments)
    for scale in (torch.tensor(0.0), torch.tensor(torch.nan), torch.ones(2)):
        with pytest.raises(ValueError, match=r"scale .*: needs one finite number above 0"):
            w8a8.matmul(x, words, scales, None, scale=scale)


def test_without_a_compiler_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w8a8, "_library", lambda: build.BuildError("there is no C compiler"))
    assert w8a8.refuses(64, torch.float32) == "there is no C compiler"
    with pytest.raises(build.BuildError, match="there is no C compiler"):
        w8a8.matmul(torch.ones(1, 4), torch.ones(1, 1, dtype=torch.int32), torch.ones(1), None)


def test_refusals_say_why() -> None:
    assert w8a8.refuses(64, torch.bfloat16) is None
    assert w8a8.refuses(64, torch.float64) == "torch.float64 activations: multiplies float32, bfloat16 and float16"


@pytest.mark.usefixtures("forgotten")
def test_the_switch_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    assert w8a8.refuses(64, torch.float32) == "switched off by LLMQ_NATIVE=0"


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Let nothing that was loaded, or could not be, outlive a test."""
    w8a8._library.cache_clear()
    yield
    w8a8._library.cache_clear()
