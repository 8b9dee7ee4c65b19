"""Layers on codebooks, multiplied: the row of the table of kernels, the module and its state."""

from __future__ import annotations

import pytest
import torch
from native_cases import needs_compiler
from vector_cases import ALL, packed_weight, spec_of

from llmq import ops
from llmq.formats import llmq_layout, streams
from llmq.grids.vq import VectorGrid, VectorWeight
from llmq.nn import QuantLinear
from llmq_kernels.native import build, vectors

CPU = torch.device("cpu")
ROWS = [pytest.param("cpu_vectors", marks=needs_compiler), "vectors"]


def choose_row(monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    """Make `row` the choice."""
    if row == "vectors":
        monkeypatch.setattr(vectors, "_library", lambda: build.BuildError("not in this test"))


def module_of(weight: VectorWeight, group_size: int, dtype: torch.dtype, *, bias: bool = False) -> QuantLinear:
    assert isinstance(weight.grid, VectorGrid)
    n, k = len(weight.codes), weight.in_features
    layer = QuantLinear(k, n, spec_of(weight.grid, group_size), bias=bias, dtype=dtype, device="cpu")
    layer.load_state_dict(llmq_layout.pack(weight, layer.spec), strict=False)
    if layer.bias is not None:
        layer.bias.data = torch.randn(n, generator=torch.Generator().manual_seed(9)).to(dtype)
    return layer


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", ALL, ids=str)
@pytest.mark.parametrize(("n", "k", "groups"), [(5, 16, None), (7, 37, None), (9, 40, 2), (3, 45, 3)])
def test_products_are_those_of_the_dense_weight(
    grid: VectorGrid, n: int, k: int, groups: int | None, dtype: torch.dtype, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_row(monkeypatch, row)
    monkeypatch.setattr("llmq.rows.vectors._SLAB", 2 * k)  # two outputs at a time, and a last one alone
    size = -1 if groups is None else groups * grid.columns
    weight = packed_weight(grid, n, k, size)
    layer = module_of(weight, size, dtype, bias=True)
    x = torch.randn(2, 3, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = layer(x)
    assert layer.kernel == (row if groups is None else "vectors")  # groups of 2 or 3 vectors are none of C's
    assert layer.bias is not None
    expected = x.double() @ weight.dequantize().double().T
    # besides the last rounding: those of weights (or of the product, before the scale) and of the sum with the bias
    slack = 3 * torch.finfo(dtype).eps * (expected.norm() + layer.bias.double().norm())
    if dtype == torch.float32:
        slack *= max(2.0, 0.1 * k**0.5)  # as in `tolerance`
    assert (y.double() - expected - layer.bias.double()).norm() <= slack
    plain = module_of(weight, size, dtype)
    error = (plain(x).double() - expected).norm() / expected.norm()
    assert error <= (1.0 if dtype != torch.float32 else 2.0) * torch.finfo(dtype).eps


@pytest.mark.parametrize("row", ROWS)
def test_large_entries_do_not_overflow_half_precision(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of 30 times entries of 127, 64 of them, are 240 thousand before they are scaled."""
    choose_row(monkeypatch, row)
    weight = packed_weight(VectorGrid(1, 4), 4, 64)
    weight.codebook.fill_(127.0)
    layer = module_of(weight, -1, torch.float16)
    y = layer(torch.full((1, 64), 30.0, dtype=torch.float16))
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("row", ROWS)
def test_the_state_is_that_of_the_file_and_comes_back(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_row(monkeypatch, row)
    weight = packed_weight(VectorGrid(2, 4), 6, 18)
    stored = llmq_layout.pack(weight, spec_of(VectorGrid(2, 4)))
    layer = module_of(weight, -1, torch.float32)
    layer(torch.ones(1, 18))
    assert layer.kernel == row
    state = layer.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert torch.equal(layer.quantized_weight().dequantize(), weight.dequantize())
    layer.bfloat16()
    assert layer.kernel is None
    assert all(torch.equal(layer.state_dict()[name], stored[name]) for name in stored)


def test_gradients_of_inputs_are_those_of_the_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    for grid, k, size in ((VectorGrid(2, 4), 22, -1), (VectorGrid(1, 4), 26, 8), (VectorGrid(4, 2), 9, -1)):
        weight = packed_weight(grid, 5, k, size)
        monkeypatch.setattr(ops, "_SLAB", 5 * 8)  # eight columns at a time
        layer = module_of(weight, size, torch.float32)
        x = torch.randn(3, k, requires_grad=True)
        out = torch.randn(3, 5)
        layer(x).backward(out)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, out @ weight.dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_the_operator_is_one(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_row(monkeypatch, row)
    weight = packed_weight(VectorGrid(2, 4), 5, 12)
    layer = module_of(weight, -1, torch.float32)
    x = torch.randn(2, 12, requires_grad=True)
    layer(x)
    arguments = (x, layer.packed(), None, row, 2, 12, True, 5, "vq4")
    assert layer.kernel == row
    torch.library.opcheck(ops.quant_matmul, arguments)


@needs_compiler
def test_no_other_rows_take_vectors_and_these_take_nothing_else() -> None:
    layer = ops.Layer(2, 16, True, 8, 16, "vq4")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        takes = [name for name, row in ops.KERNELS.items() if row.refuses(layer, CPU, dtype) is None]
        assert takes == ["cpu_vectors", "vectors"]
    for row in takes:
        assert ops.KERNELS[row].refuses(layer._replace(grid="uniform", bits=4), CPU, torch.float32) is not None


@pytest.mark.parametrize("name", ["cpu_vectors", "vectors"])
def test_scales_of_another_program_stay_as_they_are(name: str) -> None:
    """Scales in float32 that bfloat16 does not hold: the product is rounded, what is saved is not."""
    weight = packed_weight(VectorGrid(2, 4), 6, 16)
    spec = spec_of(VectorGrid(2, 4))
    tensors = llmq_layout.pack(weight, spec)
    tensors["scales"] = tensors["scales"].float() * 1.0001
    stream = streams.from_stored(tensors, llmq_layout.recognize(spec, _header(tensors), tensors.__getitem__).spec, 16)
    assert stream is not None
    row = ops.KERNELS[name]
    layer = ops.Layer(2, 16, True, 6, 16, "vq4")
    packed = row.pack(stream, layer, torch.bfloat16)
    assert torch.equal(row.unpack(packed, layer).scales, tensors["scales"])


def _header(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
