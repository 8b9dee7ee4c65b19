"""The kernels for a handful of tokens and for many, against `naive`, in the interpreter (or on a GPU)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, Weight, random_weight, random_x
from tolerance import assert_close_to_float64
from torch import Tensor

from llmq import ops
from llmq_kernels import few, layout, many, naive, product, tables, w2a16, w3a16, w4a16, w8a16
from llmq_kernels.tables import Few, Table

BITS = {w2a16: 2, w4a16: 4, w8a16: 8}
modules = pytest.mark.parametrize("module", list(BITS), ids=["w2a16", "w4a16", "w8a16"])
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
pytestmark = pytest.mark.usefixtures("poisoned_empty")
# Groups of half a chunk, one, several, and one per row; columns that end inside a chunk.
COLUMNS = [(128, 32), (96, 32), (192, 64), (288, 96), (256, 128), (320, 160), (512, 256), (80, 80), (199, 199), (1, 1)]


@dataclass(frozen=True)
class Case:
    """What is multiplied."""

    dtype: torch.dtype
    m: int
    n: int
    k: int
    group_size: int
    symmetric: bool
    bias: bool
    splits: int

    def weight(self, bits: int) -> Weight:
        return random_weight(self.n, self.k, self.group_size, bits, self.symmetric)


def cases(count: int) -> list[Case]:
    """Return seeded cases, of which the first ten have every kind of columns."""
    draw = random.Random(6)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return [
        Case(
            dtypes[i % 3],
            draw.randint(1, 4),
            draw.randint(1, 70),
            *COLUMNS[i % len(COLUMNS)],
            symmetric=draw.random() < 0.5,
            bias=draw.random() < 0.7,
            splits=draw.randint(1, 2),
        )
        for i in range(count)
    ]


def packed_weight(module: ModuleType, w: Weight, dtype: torch.dtype) -> layout.Weight:
    """Return the weight as kernels take it, with NaN where rows are padded: they are nobody's business."""
    n, k = w.codes.shape
    operands = module.pack(w.codes, w.scales, w.stored_zeros, w.group_size, dtype)
    for tensor in operands.tensors()[1:]:
        tensor[:, n:] = torch.nan
    return layout.Weight(module.LAYOUT, operands, n, k, w.group_size)


def strided(x: Tensor) -> Tensor:
    """Return `x` as the rows of a wider tensor, with NaN behind and between them."""
    wide = torch.full((2 * len(x), x.shape[1] + 67), torch.nan, dtype=x.dtype, device=x.device)
    wide[::2, : x.shape[1]] = x
    return wide[::2, : x.shape[1]]


def stored_weight(w: Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight as a kernel stores it: exact but for the last rounding, which the interpreter does in bf16 by
    cutting off bits (a GPU rounds to the nearest)."""
    if dtype != torch.bfloat16 or DEVICE == "cuda":
        return naive.dequantize(w.codes, w.scales, w.zeros, w.group_size, dtype)
    exact = naive.dequantize(w.codes, w.scales, w.zeros, w.group_size, torch.float32)
    return (exact.view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()


@modules
@pytest.mark.parametrize("case", cases(24), ids=str)
def test_a_few_tokens_are_naive(module: ModuleType, case: Case) -> None:
    w = case.weight(BITS[module])
    x = strided(random_x(case.m, case.k, case.dtype))
    b = w.bias.to(case.dtype) if case.bias else None
    row = Few(4, 16 << case.n % 3, 1 + case.n % 2)
    y = few.matmul(x, packed_weight(module, w, case.dtype), b, row, case.splits)
    assert y.dtype == case.dtype
    assert_close_to_float64(y, naive.quant_matmul(x, w.codes, w.scales, w.zeros, b, case.group_size), case.k)


@modules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("k", "group_size"), [(96, 32), (128, 128), (20, 20)])
def test_unit_vectors_return_the_weight_exactly(
    module: ModuleType, dtype: torch.dtype, symmetric: bool, k: int, group_size: int
) -> None:
    w = random_weight(33, k, group_size, BITS[module], symmetric)
    weight = packed_weight(module, w, dtype)
    x = torch.eye(k, dtype=dtype, device=DEVICE)
    x = x[:: k // 20]  # every row is a launch for four, and launches are slow here
    rows = [few.matmul(part, weight, None, Few(4, 64, 4)) for part in x.split(4)]
    assert torch.equal(torch.cat(rows).T, stored_weight(w, dtype)[:, :: k // 20])


@modules
@pytest.mark.parametrize("case", cases(12), ids=str)
def test_dequantizing_rounds_once(module: ModuleType, case: Case) -> None:
    w = case.weight(BITS[module])
    truth = stored_weight(w, case.dtype)
    weight = packed_weight(module, w, case.dtype)
    assert torch.equal(many.dequantize(weight, 0, case.n), truth)
    rest = case.n // 2
    assert torch.equal(many.dequantize(weight, case.n - rest, rest), truth[case.n - rest :])


@modules
@pytest.mark.parametrize(
    ("slab", "dtype", "bias"),
    [
        (1, torch.float16, True),
        (300 * 96, torch.bfloat16, False),
        (300 * 96, torch.float32, True),
        (2**26, torch.float16, False),
        (2**26, torch.bfloat16, True),
    ],
)
def test_many_tokens_are_naive_with_a_scratch_that_is_bounded(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, slab: int, dtype: torch.dtype, bias: bool
) -> None:
    n, k = 33 + 2 * 128, 96
    w = random_weight(n, k, 32, BITS[module], symmetric=False)
    x = strided(random_x(7, k, dtype))
    b = w.bias if bias else None
    monkeypatch.setattr(many, "SLAB", slab)
    sizes, dequantize = [], many.dequantize

    def watched(weight: layout.Weight, first: int, rows: int) -> Tensor:
        sizes.append(rows * weight.k)
        return dequantize(weight, first, rows)

    monkeypatch.setattr(many, "dequantize", watched)
    y = many.matmul(x, packed_weight(module, w, dtype), b)
    assert y.dtype == dtype
    # Nothing lies between rows; the product of the slab is written in place.
    assert y.is_contiguous()
    assert_close_to_float64(y, naive.quant_matmul(x, w.codes, w.scales, w.zeros, b, 32), k)
    assert sum(sizes) == n * k
    assert max(sizes) <= max(slab, 128 * k)
    assert len(sizes) == {1: 3, 300 * 96: 2, 2**26: 1}[slab]


@modules
def test_the_number_of_tokens_chooses_the_kernel(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    ran: list[tuple[str, int, int]] = []  # kernel, tokens, splits

    def watch(owner: Any, name: str) -> None:
        original = owner.matmul

        def call(x: Tensor, *args: Any) -> Tensor:
            ran.append((name, len(x), args[3] if len(args) > 3 else 0))
            result: Tensor = original(x, *args)
            return result

        monkeypatch.setattr(owner, "matmul", call)

    default = tables.read("default", module.LAYOUT.name)
    table = Table((Few(2, 32, 2),), default.tiles, many_from=6)
    monkeypatch.setattr(tables, "for_device", lambda name, device: {module.LAYOUT.name: table}[name])
    for owner in (few, product.tiling, many):
        watch(owner, owner.__name__.rpartition(".")[2])
    w = random_weight(33, 96, 32, BITS[module], symmetric=True)
    packed = module.pack(w.codes, w.scales, None, 32, torch.float16)
    for m in (1, 2, 3, 5, 6, 9):
        x = random_x(m, 96, torch.float16)
        y = module.matmul(x, packed, w.bias, 33, 96, 32, splits=m)
        assert_close_to_float64(y, naive.quant_matmul(x, w.codes, w.scales, w.zeros, w.bias, 32), 96)
    assert ran == [("few", 1, 1), ("few", 2, 2), ("tiling", 3, 3), ("tiling", 5, 5), ("many", 6, 0), ("many", 9, 0)]


@pytest.mark.parametrize("m", [1, 5, 600], ids=["few", "tiles", "many"])
@pytest.mark.parametrize(("row", "module"), [("triton_w2a16", w2a16), ("triton_w4a16", w4a16), ("triton_w8a16", w8a16)])
def test_the_operator_passes_opcheck(row: str, module: ModuleType, m: int) -> None:
    w = random_weight(33, 32, 32, BITS[module], symmetric=True)
    packed = module.pack(w.codes, w.scales, None, 32, torch.float16).tensors()
    arguments = (random_x(m, 32, torch.float16), packed, None, row, BITS[module], 32, True, 33, "uniform")
    torch.library.opcheck(ops.quant_matmul, arguments)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@dtypes
def test_codes_of_3_bits_are_nibbles(symmetric: bool, dtype: torch.dtype) -> None:
    assert w3a16.refuses(33, 96, 3, 32, dtype) is None
    w = random_weight(33, 96, 32, 3, symmetric)
    packed = w3a16.pack(w.codes, w.scales, w.stored_zeros, 32, dtype)
    codes, scales, zeros = w3a16.unpack(packed, 33, 96, 32)
    assert torch.equal(codes, w.codes)
    assert torch.equal(scales, w.scales)
    assert (zeros is None) == symmetric
    assert zeros is None or torch.equal(zeros, w.zeros)
    for m in (1, 5):
        x = random_x(m, 96, dtype)
        y = w3a16.matmul(x, packed, None, 33, 96, 32)
        assert_close_to_float64(y, naive.quant_matmul(x, w.codes, w.scales, w.zeros, None, 32), 96)


def test_codes_of_3_bits_refuse_what_does_not_fit() -> None:
    assert w3a16.refuses(33, 96, 4, 32, torch.float16) == "bits 4: this row multiplies with 3-bit codes"
    assert str(w3a16.refuses(33, 96, 3, 16, torch.float16)).startswith("group_size 16: ")
    w = random_weight(4, 64, 32, 4, symmetric=True)
    with pytest.raises(ValueError, match="codes: largest is 15, too large for 3 bits"):
        w3a16.pack(w.codes, w.scales, None, 32, torch.float16)
