"""The rows of grids whose levels stand in tables: every such grid through a layer, and when a row is the choice."""

from __future__ import annotations

import copy

import pytest
import torch
from native_cases import needs_compiler
from tolerance import assert_close_to_float64
from torch import Tensor

from llmq import ops
from llmq.errors import KernelError
from llmq.formats import FORMATS
from llmq.formats.streams import Stream
from llmq.grids import ALL_GRIDS, GRIDS, make_grid
from llmq.nn import QuantLinear
from llmq.rows import lut
from llmq.types import QuantizedWeight, QuantSpec

CPU, GPU = torch.device("cpu"), torch.device("cuda")
N, K = 24, 96
# every grid of tables at its fewest and at its most bits
CASES = {
    f"{name}-{bits}": (name, bits)
    for name, row in GRIDS.items()
    if name != "uniform"
    for bits in sorted({row.bits[0], row.bits[-1]})
}
every_grid = pytest.mark.parametrize(("name", "bits"), CASES.values(), ids=CASES.keys())


def quantized(name: str, bits: int) -> tuple[QuantizedWeight, QuantSpec]:
    """Return a random weight on a grid, in groups of 32 or of the one size that the grid has."""
    row = GRIDS[name]
    size, symmetric = row.group_size or 32, row.symmetric[0]
    spec = QuantSpec(bits, size, symmetric, "llmq", scale_dtype=row.scale_dtype, grid=name)
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(bits)) / 8
    grid, parts = make_grid(name, bits, symmetric).adapted(w), w.split(size, dim=1)
    at = [grid.fit(part) for part in parts]
    codes = torch.cat([grid.encode(part, a) for part, a in zip(parts, at, strict=True)], dim=1)
    learned = [a.levels[:, 0] for a in at if a.levels is not None]
    scales, zeros = torch.cat([a.scale for a in at], dim=1), torch.cat([a.zero for a in at], dim=1)
    return QuantizedWeight(codes, scales, zeros, grid, size, torch.stack(learned, 1) if learned else None), spec


def layer_of(name: str, bits: int, dtype: torch.dtype) -> tuple[QuantLinear, Tensor]:
    """Return a layer, and the weight [N, K] that it holds."""
    weight, spec = quantized(name, bits)
    layer = QuantLinear(K, N, spec, bias=True, dtype=dtype, device=None)
    layer.fill_(FORMATS["llmq"].pack(weight, spec, None))
    layer.bias = torch.nn.Parameter(torch.linspace(-1, 1, N, dtype=dtype), requires_grad=False)
    return layer, weight.dequantize()


@needs_compiler
@every_grid
def test_every_grid_runs_by_table_and_saves_what_it_read(name: str, bits: int) -> None:
    layer, w = layer_of(name, bits, torch.float32)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    for dtype in (torch.float32, torch.bfloat16):
        layer.to(dtype)
        x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(2)).to(dtype)
        y = layer(x)
        assert layer.kernel == "cpu_lut"
        assert layer.bias is not None
        truth = x.flatten(0, 1).double() @ w.double().T + layer.bias.double()
        assert_close_to_float64(y.flatten(0, 1), truth, K)
    layer.to(torch.float32)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before if key != "bias")
    assert torch.equal(layer.quantized_weight().dequantize(), w)


@every_grid
def test_every_grid_runs_where_nothing_is_compiled(name: str, bits: int, no_native: None) -> None:
    layer, w = layer_of(name, bits, torch.float32)
    x = torch.eye(K)
    assert torch.equal(layer(x), (w + 0).T + layer.bias)
    assert layer.kernel == "reference"


@needs_compiler
@pytest.mark.parametrize(("name", "bits"), [("nf4", 4), ("pwlq", 6), ("codebook", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_the_compiler_and_the_gradient(name: str, bits: int, dtype: torch.dtype) -> None:
    layer, w = layer_of(name, bits, dtype)
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    short, seen = layer(x), layer.layer
    plain = seen.bits, seen.group_size, seen.symmetric, N, seen.grid
    arguments = (x, layer.packed(), layer.bias, layer.kernel, *plain)
    assert torch.equal(short, ops.quant_matmul(*arguments))
    torch.library.opcheck(ops.quant_matmul, arguments)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), short)
    watched = x.clone().requires_grad_()
    grad = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(3)).to(dtype)
    layer(watched).backward(grad)
    assert watched.grad is not None
    wanted = grad.flatten(0, 1).double() @ w.to(dtype).double()
    assert_close_to_float64(watched.grad.flatten(0, 1), wanted, N)
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), short)


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmq_kernels.native import build

    monkeypatch.setattr(build, "_library", lambda *_: None)
    monkeypatch.setattr(build, "has_pairs", lambda _: True)

    def chosen(grid: str, bits: int, group_size: int, dtype: torch.dtype = torch.bfloat16) -> str:
        return ops.choose(ops.Layer(bits, group_size, GRIDS[grid].symmetric[0], N, K, grid), CPU, dtype)

    assert chosen("nf4", 4, 32) == chosen("nf4", 4, 16) == chosen("log", 8, 96) == "cpu_lut"
    assert chosen("nf4", 4, 32, torch.float32) == chosen("binary", 1, 8, torch.float16) == "cpu_lut"
    assert chosen("nf4", 4, 12) == "reference"
    assert chosen("uniform", 4, 32) == "cpu_native"
    uniform = ops.Layer(4, 32, True, N, K)
    assert ops.KERNELS["cpu_lut"].refuses(uniform, CPU, torch.float32) == (
        "uniform grid: looks levels up in tables, of which it has none"
    )
    table = uniform._replace(grid="nf4")
    assert ops.KERNELS["cpu_lut"].refuses(table, GPU, torch.float32) == "runs on a CPU, not on cuda"
    assert ops.KERNELS["cpu_native"].refuses(table, CPU, torch.bfloat16) is not None
    path = ops.KERNELS["cpu_lut"].path
    assert path is not None
    monkeypatch.setattr(build, "is_wide", lambda _: True)
    assert path(table, 1, torch.bfloat16) == "from codes, bfloat16 pairs"


def test_grids_of_vectors_have_no_levels() -> None:
    for name in ALL_GRIDS.keys() - GRIDS.keys():
        layer = ops.Layer(ALL_GRIDS[name].bits[0], K, ALL_GRIDS[name].symmetric[0], N, K, name)
        for row in ("cpu_lut", "triton_lut"):
            assert ops.KERNELS[row].refuses(layer, CPU, torch.float32) is not None
        assert lut.no_tables(layer) == f"{name} grid: looks levels up in tables, of which it has none"


def test_a_table_that_is_not_there_is_not_taken() -> None:
    stream = Stream(torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 1), torch.tensor([[0], [200]]).to(torch.uint8))
    tables = lut.tables_of("pwlq", 4, False)
    assert tables is not None
    with pytest.raises(ValueError, match=f"tables 0 to 200 are picked: there are {len(tables)}"):
        ops.KERNELS["cpu_lut"].pack(stream, ops.Layer(4, 32, False, 2, 32, "pwlq"), torch.bfloat16)


def test_the_gpu_row_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = ops.KERNELS["triton_lut"].refuses
    layer = ops.Layer(4, 32, True, N, K, "nf4")
    assert refuses(layer, CPU, torch.float16) == "runs on an NVIDIA GPU, not on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert refuses(layer, GPU, torch.float16) == "needs compute capability 8.0 or newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert refuses(layer, GPU, torch.float16) is None
    assert refuses(layer._replace(grid="uniform"), GPU, torch.float16) is not None
    assert str(refuses(layer, GPU, torch.float32)).startswith("torch.float32 activations: ")
    assert str(refuses(layer._replace(group_size=24), GPU, torch.float16)).startswith("group_size 24: ")
    monkeypatch.setattr(ops, "KERNELS", {"triton_lut": ops.KERNELS["triton_lut"]})
    with pytest.raises(KernelError, match="triton_lut: group_size 24"):
        ops.choose(layer._replace(group_size=24), GPU, torch.float16)


@every_grid
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_gpu_row_keeps_what_it_is_given(name: str, bits: int, dtype: torch.dtype) -> None:
    """Scales are rounded for the kernel, as in all of its kind; codes and levels come back as they were."""
    layer, _ = layer_of(name, bits, dtype)
    weight, seen, row = layer.quantized_weight(), layer.layer, ops.KERNELS["triton_lut"]
    stream, _ = layer._stream()
    packed = row.pack(stream, seen, dtype)
    found = row.unpack(packed, seen)
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.zeros, weight.zeros)
    assert torch.equal(found.scales, weight.scales.to(dtype).float())
    assert (found.levels is None) == (weight.levels is None)
    assert found.levels is None or torch.equal(found.levels, weight.levels)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(4)).to(dtype)
    y = row.matmul(x, packed, layer.bias, seen)
    assert layer.bias is not None
    # scales and levels are each rounded once: half an epsilon each, where the bound has three quarters of one to spare
    truth = x.double() @ found.dequantize().double().T + layer.bias.double()
    assert_close_to_float64(y, truth, K)


def test_learned_levels_that_are_rounded_are_kept() -> None:
    levels = (torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0)) + 2**-9).half()
    stream = Stream(torch.full((2, 4), 0x76543210, dtype=torch.int32), torch.ones(2, 1).half(), None, levels)
    seen, row = ops.Layer(4, 32, True, 2, 32, "codebook"), ops.KERNELS["triton_lut"]
    for dtype, count in ((torch.float16, 2), (torch.bfloat16, 3)):
        packed = row.pack(stream, seen, dtype)
        assert len(packed) == count
        found = row.unpack(packed, seen).levels
        assert found is not None
        assert torch.equal(found, levels.float())
