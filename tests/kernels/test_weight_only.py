"""The Triton kernels against `naive` in float64, in the interpreter (or on a GPU, with TRITON_INTERPRET=0)."""

from types import ModuleType

import pytest
import torch
from kernel_cases import DEVICE, Weight, random_weight, random_x
from tolerance import assert_close_to_float64
from torch import Tensor

from llmq_kernels import naive, splits, w2a16, w4a16, w8a16

BITS = {w2a16: 2, w4a16: 4, w8a16: 8}
modules = pytest.mark.parametrize("module", list(BITS), ids=["w2a16", "w4a16", "w8a16"])
grids = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
# N, K, group size: ragged N; groups of half a chunk, one, several; K that ends inside a chunk; one group
# per row.
shapes = pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [
        (33, 128, 32),
        (48, 96, 32),
        (33, 192, 64),
        (33, 192, 96),
        (48, 256, 128),
        (130, 512, 256),
        (33, 80, 80),
        (48, 256, 256),
    ],
    ids=lambda value: str(value),
)
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def expected(x: Tensor, w: Weight, bias: bool = True) -> Tensor:
    """Return the float64 truth."""
    return naive.quant_matmul(x, w.codes, w.scales, w.zeros, w.bias if bias else None, w.group_size)


@modules
@grids
@shapes
@pytest.mark.parametrize(
    ("m", "dtype"),
    # every row of the table of tiles; float32 has the first two
    [
        (5, torch.float16),
        (17, torch.bfloat16),
        (17, torch.float32),
        (40, torch.float16),
        (40, torch.float32),
        (70, torch.bfloat16),
    ],
    ids=str,  # the interpreter has no bf16 arithmetic: there, bf16 is upcast right after loading
)
def test_matmul_is_naive(
    module: ModuleType, dtype: torch.dtype, symmetric: bool, n: int, k: int, group_size: int, m: int
) -> None:
    w = random_weight(n, k, group_size, BITS[module], symmetric)
    assert module.refuses(n, k, BITS[module], group_size, dtype) is None
    packed = module.pack(w.codes, w.scales, w.stored_zeros, group_size, dtype)
    x = random_x(m, k, dtype)
    y = module.matmul(x, packed, w.bias.to(dtype), n, k, group_size)
    assert y.dtype == dtype
    assert_close_to_float64(y, expected(x, w), k)


@modules
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@grids
@pytest.mark.parametrize(("k", "group_size"), [(96, 32), (128, 64), (128, 128)])
@pytest.mark.parametrize("m", [16, 96], ids=["post-scaled", "weight-scaled"])
def test_unit_vectors_return_the_weight_exactly(
    module: ModuleType, dtype: torch.dtype, symmetric: bool, k: int, group_size: int, m: int
) -> None:
    w = random_weight(33, k, group_size, BITS[module], symmetric)
    packed = module.pack(w.codes, w.scales, w.stored_zeros, group_size, dtype)
    x = torch.eye(k, dtype=dtype, device=DEVICE)
    rows = [module.matmul(part, packed, None, 33, k, group_size) for part in torch.split(x, m)]
    assert torch.equal(torch.cat(rows).T, naive.dequantize(w.codes, w.scales, w.zeros, group_size, dtype))


@modules
@grids
@pytest.mark.parametrize("splits", [1, 2, 3, 64])
def test_splitting_k_changes_nothing_but_rounding(module: ModuleType, symmetric: bool, splits: int) -> None:
    n, k = 33, 32 * 11
    w = random_weight(n, k, 32, BITS[module], symmetric)
    packed = module.pack(w.codes, w.scales, w.stored_zeros, 32, torch.float16)
    x = random_x(5, k, torch.float16)
    y = module.matmul(x, packed, w.bias.half(), n, k, 32, splits=splits)
    assert_close_to_float64(y, expected(x, w), k)


@modules
def test_activations_of_any_strides(module: ModuleType) -> None:
    n, k = 33, 128
    w = random_weight(n, k, 64, BITS[module], symmetric=False)
    packed = module.pack(w.codes, w.scales, w.stored_zeros, 64, torch.float16)
    wide = random_x(2 * k, 2 * k, torch.float16)
    views = {
        "transposed": wide[:k, :5].T,
        "every second column": wide[:5, ::2],
        "rows of a wider tensor": wide[3:8, 1 : k + 1],
        "one row repeated": wide[:1, :k].expand(5, k),
        "reversed by stride": wide[:10:2, :k],
    }
    for name, x in views.items():
        assert not x.is_contiguous(), name
        assert_close_to_float64(module.matmul(x, packed, None, n, k, 64), expected(x, w, bias=False), k)


@modules
def test_the_flat_list_of_tensors_is_enough(module: ModuleType) -> None:
    for symmetric in (True, False):
        w = random_weight(16, 64, 32, BITS[module], symmetric)
        packed = module.pack(w.codes, w.scales, w.stored_zeros, 32, torch.float32)
        assert len(packed.tensors()) == (2 if symmetric else 3)
        x = random_x(3, 64, torch.float32)
        assert torch.equal(
            module.matmul(x, packed.tensors(), None, 16, 64, 32), module.matmul(x, packed, None, 16, 64, 32)
        )


@modules
def test_no_tokens(module: ModuleType) -> None:
    w = random_weight(33, 64, 64, BITS[module], symmetric=True)
    packed = module.pack(w.codes, w.scales, None, 64, torch.float16)
    assert module.matmul(random_x(0, 64, torch.float16), packed, None, 33, 64, 64).shape == (0, 33)


@modules
def test_values_beyond_the_columns_are_not_read(module: ModuleType) -> None:
    # 96 columns end inside a chunk of 64 planes: what lies behind a row must not reach the product, even as
    # 0 * NaN.
    w = random_weight(33, 96, 96, BITS[module], symmetric=False)
    packed = module.pack(w.codes, w.scales, w.stored_zeros, 96, torch.float16)
    padded = torch.full((5, 128), torch.nan, dtype=torch.float16, device=DEVICE)
    padded[:, :96] = random_x(5, 96, torch.float16)
    x = padded[:, :96]
    assert_close_to_float64(module.matmul(x, packed, None, 33, 96, 96), expected(x, w, bias=False), 96)


@modules
@pytest.mark.parametrize(
    ("n", "k", "bits", "group_size", "dtype", "reason"),
    [
        (64, 64, 3, 32, torch.float16, "bits 3: "),
        (64, 64, None, 16, torch.float16, "group_size 16: needs a multiple of 32, or one group per row"),
        (64, 100, None, 32, torch.float16, "group_size 32: does not divide K = 100"),
        (64, 64, None, 0, torch.float16, "group_size 0: does not divide"),
        (0, 64, None, 32, torch.float16, r"weight \[0, 64\]: is empty"),
        (64, 64, None, 32, torch.float64, "torch.float64: needs float16"),
    ],
)
def test_refusals_say_why(
    module: ModuleType, n: int, k: int, bits: int | None, group_size: int, dtype: torch.dtype, reason: str
) -> None:
    text = module.refuses(n, k, bits or BITS[module], group_size, dtype)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(text)


@modules
def test_matmul_names_what_does_not_fit(module: ModuleType) -> None:
    w = random_weight(33, 64, 32, BITS[module], symmetric=False)
    weight, scales, zeros = module.pack(w.codes, w.scales, w.zeros, 32, torch.float16)
    x = random_x(3, 64, torch.float16)
    wrong = {
        "scales: torch.float16": (x.bfloat16(), (weight, scales, zeros), None, 33, 64, 32),
        "weight: ": (x, (weight[:64], scales, zeros), None, 33, 64, 32),
        "zeros: ": (x, (weight, scales, zeros[:1]), None, 33, 64, 32),
        r"x \[3, 32\]: needs \[M, 64\]": (x[:, :32], (weight, scales, zeros), None, 33, 64, 32),
        r"x \[64\]: needs": (x[0], (weight, scales, zeros), None, 33, 64, 32),
        r"bias \[32\]": (x, (weight, scales, zeros), w.bias[:32], 33, 64, 32),
        "group_size 48: does not divide": (x, (weight, scales, zeros), None, 33, 64, 48),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            module.matmul(*arguments)


def test_splits_share_the_chunks_and_none_is_empty() -> None:
    assert splits.divide(11, 1) == (11, 1)
    assert splits.divide(11, 3) == (4, 3)
    assert splits.divide(11, 64) == (1, 11)
    assert splits.divide(9, 4) == (3, 3)


def test_split_count_fills_the_gpu_and_keeps_splits_long() -> None:
    assert splits.split_count(tiles=128, chunks=32, processors=132, per_processor=16) == 8
    assert splits.split_count(tiles=64, chunks=32, processors=132) == 5
    assert splits.split_count(tiles=64, chunks=8, processors=132) == 2
    assert splits.split_count(tiles=512, chunks=64, processors=132) == 1
    assert splits.split_count(tiles=1, chunks=1, processors=132) == 1
    assert splits.split_count(tiles=1, chunks=1000, processors=132) == 8
