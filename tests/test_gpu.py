"""What only a GPU can show: ``TRITON_INTERPRET=0 scripts/test -m gpu``, which also runs tests/kernels on it."""

import csv
import importlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from column_loop import eager_block
from script_loading import load_script
from tiny_models import make_llama
from tolerance import assert_close_to_float64
from transformers import AutoModelForCausalLM

import llmq
from llmq import benchmark
from llmq.block_sweep import MAX_COLUMNS, Block, cuda_block, runs_on
from llmq.calibration import Calibration
from llmq.driver import quantize
from llmq.formats import FORMATS
from llmq.grids.uniform import UniformGrid
from llmq.hessian import factorize
from llmq.nn import QuantLinear
from llmq.recipe import Recipe
from llmq.solvers import SOLVERS
from llmq.solvers.placing import floored, place_all, placer
from llmq.solvers.rtn import rtn
from llmq.types import QuantSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(os.environ["TRITON_INTERPRET"] == "1", reason="kernels are interpreted; set TRITON_INTERPRET=0"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (8, True), (8, False), (3, False)])
def test_quantizing_and_serving_on_a_gpu(tmp_path: Path, bits: int, sym: bool, dtype: torch.dtype) -> None:
    source = make_llama(tmp_path / "dense")
    ids = torch.randint(1, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(bits=bits, group_size=32, sym=sym)
    report = quantize(source, tmp_path / "packed", recipe, calibration=Calibration(ids, None, "x", "y"), device="cuda")
    assert all(layer.relative_loss is not None and layer.relative_loss < 0.3 for layer in report.layers)
    assert report.peak_memory_bytes["device"] > 0

    model = llmq.load(tmp_path / "packed", dtype=dtype, device="cuda")
    rows = {2: "triton_w2a16", 3: "triton_w3a16", 4: "triton_w4a16", 8: "triton_w8a16"}
    expected_row = "reference" if dtype == torch.float32 else rows[bits]

    def compare(layer: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        assert isinstance(layer, QuantLinear)
        assert layer.kernel == expected_row
        expected = args[0].double() @ layer.quantized_weight().dequantize().double().T
        assert_close_to_float64(out, expected, layer.in_features)

    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.register_forward_hook(compare)
    with torch.no_grad():
        model(ids[:1, :17].cuda())
    stored = {key: tensor.cpu() for key, tensor in model.state_dict().items() if "proj" in key}
    moved = model.cpu().state_dict()
    assert all(torch.equal(moved[key], tensor) for key, tensor in stored.items())


def test_the_column_loop_in_one_launch_is_the_loop_in_pytorch() -> None:
    # 1024 columns of 512 rows, in blocks of 128; act-order with groups of 64
    n, k, size = 512, 1024, 64
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=draw).cuda()
    x = (
        torch.randn(4 * k, k, generator=draw).cuda()
        @ (torch.eye(k) + torch.randn(k, k, generator=draw) / k**0.5).cuda()
    )
    h, grid = 2 * x.T @ x / len(x), UniformGrid(4, symmetric=False)
    order = h.diagonal().argsort(descending=True)
    factor = factorize(h[order][:, order], 0.01)
    assert factor is not None
    assert runs_on(w.device, grid)
    placed = [grid.fit(columns) for columns in w.split(size, dim=1)]
    scales, zeros = (torch.cat(parts, dim=1).T.contiguous() for parts in zip(*(at[:2] for at in placed), strict=True))
    columns = w.T[order]
    y = torch.zeros_like(columns)
    different = 0
    for lo in range(0, k, MAX_COLUMNS):
        at = slice(lo, lo + MAX_COLUMNS)
        runs = []
        for run in (cuda_block, cuda_block, eager_block):
            codes, errors = torch.zeros_like(columns[at], dtype=torch.uint8), torch.full_like(columns[at], float("nan"))
            block = Block(columns[at], y[at], factor.r[at, at], order[at] // size, codes, errors)
            run(block, scales, zeros, grid)
            runs.append(block)
        assert torch.equal(runs[0].codes, runs[1].codes)
        assert torch.equal(runs[0].errors, runs[1].errors)
        # A row with a code that a tie within rounding decides otherwise goes its own way to the end of the block.
        same = (runs[0].codes == runs[2].codes).all(0)
        different += int((~same).sum())
        # Scales have 8 bits, so that a level is exact and its difference from the weight rounds once.
        assert torch.equal(runs[0].errors[:, same], runs[2].errors[:, same])
        y[at.stop :].addmm_(factor.r[at, at.stop :].T, runs[0].errors)
    # One weight in 1e5 is as near to a tie as float32 is inexact: some 5 of these 524288, in 4096 rows of blocks.
    assert different <= 40


def test_the_solver_goes_through_the_kernel_and_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(512, 1024, generator=draw).cuda(), torch.randn(4096, 1024, generator=draw).cuda()
    x = x + 0.5 * x.roll(1, dims=1)
    h, grid = 2 * x.T @ x / len(x), UniformGrid(3, symmetric=True)
    first, second = (SOLVERS["gptq"].run(w, h, grid, 128).weight.codes for _ in range(2))
    assert torch.equal(first, second)
    module = importlib.import_module("llmq.solvers.sweep")
    monkeypatch.setattr(module, "cuda_block", None)
    with pytest.raises(TypeError, match="NoneType"):
        SOLVERS["gptq"].run(w, h, grid, 128)
    monkeypatch.setattr(module, "runs_on", lambda device, grid: False)
    eager = SOLVERS["gptq"].run(w, h, grid, 128).weight.codes
    # One weight in 1e5 is as near to a tie as float32 is inexact, and takes the rest of its row along.
    assert (first != eager).any(1).float().mean() < 0.05


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("bits", [4, 8, 3])
def test_a_model_over_two_gpus_computes_what_it_does_on_one(tmp_path: Path, bits: int) -> None:
    source = make_llama(tmp_path / "dense")
    ids = torch.randint(1, 128, (2, 17), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(method="rtn", bits=bits, group_size=32)
    quantize(source, tmp_path / "packed", recipe, calibration=Calibration(ids, None, "x", "y"))
    one = llmq.load(tmp_path / "packed", dtype=torch.bfloat16, device="cuda:0")
    parts = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1}
    two = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.bfloat16, device_map={**parts, "lm_head": 1}
    )
    for name, module in two.named_modules():
        if isinstance(module, QuantLinear):
            assert {buffer.device.index for buffer in module.buffers()} == {int("layers.1" in name)}
            assert module.kernel == one.get_submodule(name).kernel
    with torch.no_grad():
        assert torch.equal(two(ids.cuda()).logits.cpu(), one(ids.cuda()).logits.cpu())


@pytest.mark.parametrize("bits", [4, 8, 3])
def test_gradients_pass_through_a_packed_layer_on_a_gpu(tmp_path: Path, bits: int) -> None:
    source = make_llama(tmp_path / "dense")
    ids = torch.ones(2, 17, dtype=torch.int64)
    recipe = Recipe(method="rtn", bits=bits, group_size=32, sym=False)
    quantize(source, tmp_path / "packed", recipe, calibration=Calibration(ids, None, "x", "y"))
    model = llmq.load(tmp_path / "packed", dtype=torch.bfloat16, device="cuda")
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(5, layer.in_features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(5, layer.out_features, device="cuda", dtype=torch.bfloat16)
    layer(x).backward(grad)
    expected = grad.double() @ layer.quantized_weight().dequantize().double()
    assert x.grad is not None
    assert_close_to_float64(x.grad, expected, layer.out_features)


@pytest.mark.parametrize(("search", "norm"), [("hessian", 2.0), ("mse", 2.0), ("mse", 2.4)])
@pytest.mark.parametrize(
    "grid",
    [
        UniformGrid(4, symmetric=False),
        UniformGrid(3, symmetric=True),
        UniformGrid(2, symmetric=True, sym_range="restricted"),
        UniformGrid(8, symmetric=True, sym_range="gptq"),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [32, 128, 1000, 3000])
def test_scales_are_those_of_a_cpu(grid: UniformGrid, search: str, norm: float, size: int) -> None:
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(256, 3000, generator=draw) * torch.rand(256, 3000, generator=draw).pow(-0.3)
    energy = floored(torch.rand(3000, generator=draw).pow(4))
    place = placer(grid, search, norm)
    expected = place_all(place, w, energy, size)
    found = place_all(place, w.cuda(), energy.cuda(), size)
    assert len(found) == len(expected)
    same = [
        ((a.scale.cpu() == b.scale) & (a.zero.cpu() == b.zero)).float().mean()
        for a, b in zip(found, expected, strict=True)
    ]
    # Two spans are within rounding of each other in one group of some thousand; with logarithms in one of a hundred.
    assert sum(same) / len(same) > (0.995 if norm == 2 else 0.95)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "compressed-tensors", "awq", "llmq", "auto-round"])
@pytest.mark.parametrize("bits", [3, 4])
def test_files_are_the_same_bytes_wherever_they_are_packed(name: str, bits: int) -> None:
    if name not in FORMATS:
        pytest.skip("no format of this name")
    if name == "awq" and bits != 4:
        pytest.skip("awq is 4 bits")
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight, spec = rtn(w, None, UniformGrid(bits, symmetric=False), 64).weight, QuantSpec(bits, 64, False, name)
    there = replace(weight, codes=weight.codes.cuda(), scales=weight.scales.cuda(), zeros=weight.zeros.cuda())
    packed = [FORMATS[name].pack(made, spec) for made in (weight, there)]
    assert packed[0].keys() == packed[1].keys()
    for key, tensor in packed[0].items():
        assert torch.equal(packed[1][key].cpu(), tensor), key


def packed_model(folder: Path, bits: int = 4) -> Path:
    source = make_llama(folder / "dense")
    calibration = Calibration(torch.ones(2, 17, dtype=torch.int64), None, "x", "y")
    quantize(source, folder / "packed", Recipe(method="rtn", bits=bits, group_size=32), calibration=calibration)
    return folder / "packed"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_captured_step_computes_what_a_step_does(tmp_path: Path, bits: int) -> None:
    model = llmq.load(packed_model(tmp_path, bits), dtype=torch.bfloat16, device="cuda")
    ids = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(0)).cuda()
    count = 3
    with torch.no_grad():
        replay = benchmark._captured(benchmark._static(model, ids, benchmark._WARM + count), ids.device)
        plain = benchmark._static(model, ids, benchmark._WARM + count)
        for _ in range(benchmark._WARM):
            plain()
        for _ in range(count):
            _, captured = replay()  # type: ignore[misc]
            torch.testing.assert_close(captured.logits, plain().logits, rtol=2e-2, atol=2e-2)  # type: ignore[attr-defined]


def test_bench_decodes_under_graphs(tmp_path: Path) -> None:
    folder, plan = packed_model(tmp_path), benchmark.Plan((1, 4), 16, 3)
    found = benchmark.benchmark(folder, plan, dtype=torch.bfloat16, device=torch.device("cuda"))
    assert [speed.how for speed in found.speeds] == ["as a CUDA graph, with a cache of fixed size"] * 2 + [
        "call by call"
    ]
    assert all(speed.packed > 0 and speed.dense > 0 for speed in found.speeds)


def test_single_layers_are_timed_under_graphs(tmp_path: Path) -> None:
    bench_gpu = load_script("bench_gpu")
    tokens = ["--tokens", "1", "16", "600"]
    assert bench_gpu.main(["--sizes", "tiny", "--repeats", "2", *tokens, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["timed by"] for row in rows} == {"cuda graph"}
    assert {row["candidate"] for row in rows if row["microseconds"]} >= {"dense", "llmq", "tinygemm"}
    assert {row["row"] for row in rows if row["candidate"] == "llmq"} == {"triton_w4a16"}
