"""Every grid under every solver and refiner that takes any, and as a folder that is packed, loaded and run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from grid_cases import ALL, TABLES, every_grid
from tiny_models import WORDS, make_llama
from torch import Tensor

import llmq
import llmq.hf
from llmq.calibration import Calibration
from llmq.convert import DENSE, convert
from llmq.descent import begin, complete
from llmq.doctor import NOTE, diagnose
from llmq.driver import quantize
from llmq.errors import CheckpointError, SpecError
from llmq.formats import FORMATS
from llmq.formats.float_scales import GLOBAL
from llmq.grids import GRIDS, make_grid
from llmq.grids.table import TableGrid
from llmq.packed import PackedCheckpoint
from llmq.recipe import Recipe
from llmq.refine import REFINERS
from llmq.solvers import SOLVERS
from llmq.solvers.gptq import gptq
from llmq.solvers.rtn import rtn
from llmq.types import Grid, QuantizedWeight, QuantSpec
from llmq.verify.reference import reference_model

GROUP = 8
IDS = torch.randint(1, WORDS, (2, 12), generator=torch.Generator().manual_seed(0))


def problem(n: int, k: int) -> tuple[Tensor, Tensor]:
    """Return weights [n, k] and the Hessian [k, k] of correlated inputs."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(8 * k, k, generator=draw) @ (torch.eye(k) + 0.7 * torch.randn(k, k, generator=draw) / k**0.5)
    return torch.randn(n, k, generator=draw), 2 * x.T @ x / len(x)


W, H = problem(6, 24)


def losses(q: QuantizedWeight) -> Tensor:
    """Return e H eᵀ of each row, float64 [N]."""
    e = W.double() - q.dequantize().double()
    return ((e @ H.double()) * e).sum(1)


def assert_on_grid(q: QuantizedWeight, grid: Grid) -> None:
    assert q.codes.dtype == torch.uint8
    assert int(q.codes.max()) < 2**grid.bits
    assert q.scales.isfinite().all()
    assert torch.equal(grid.storable(q.scales), q.scales)
    assert torch.equal(q.zeros, q.zeros.round())
    assert grid.zeros[0] <= q.zeros.min()
    assert q.zeros.max() <= grid.zeros[1]


@every_grid
@pytest.mark.parametrize("name", ["rtn", "gptq", "descent"])
def test_every_solver_takes_every_grid(grid: Grid, name: str) -> None:
    own = grid.adapted(W)
    found = SOLVERS[name].run(W, H, own, GROUP).weight
    assert_on_grid(found, own)
    if name in ("gptq", "descent"):
        # what knows the inputs loses less, rows together; low bits of few columns may lose by luck
        assert losses(found).sum() < losses(rtn(W, None, own, GROUP).weight).sum()


def slow_gptq(grid: TableGrid, damp_percent: float) -> tuple[Tensor, Tensor]:
    """Return the values of textbook GPTQ in the order of the columns, float64, and how near each came to a tie.

    Groups are placed by the grid, from the weights as they stand; the level is found by brute force.
    """
    h = H.double() + damp_percent * H.double().diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    work, values, margin = W.double().clone(), torch.empty_like(W.double()), torch.full_like(W.double(), torch.inf)
    for j in range(len(H)):
        if j % GROUP == 0:
            at = grid.fit(work[:, j : j + GROUP].float())
            levels = torch.stack([grid.tables[int(zero)] for zero in at.zero]).double() * at.scale.double()
        off = (work[:, j : j + 1] - levels).abs()
        values[:, j] = levels.gather(1, off.argmin(1, keepdim=True))[:, 0]
        apart = torch.where((levels - values[:, j : j + 1]).abs() > 0, off, torch.inf).amin(1)
        margin[:, j] = apart - off.amin(1)
        work[:, j:] -= ((work[:, j] - values[:, j]) / u[j, j])[:, None] * u[j, j:]
    return values, margin


# at more bits the placement of a group, by compensated weights, depends on the last digits of them
@pytest.mark.parametrize(
    "grid", [grid for grid in TABLES.values() if grid.bits <= 6], ids=lambda g: f"{g.name}-{g.bits}"
)
def test_gptq_is_the_textbook_on_every_table(grid: TableGrid) -> None:
    values, margin = slow_gptq(grid, 0.01)
    found = gptq(W, H, grid, GROUP, order="natural", scale_search="none").weight.dequantize().double()
    clear = margin.amin(1) > 1e-4
    assert clear.sum() >= 3
    torch.testing.assert_close(found[clear], values[clear], rtol=1e-6, atol=1e-6)


@every_grid
def test_refiners_never_lose_on_any_grid(grid: Grid) -> None:
    own = grid.adapted(W)
    q = rtn(W, None, own, GROUP).weight
    state = begin(q, W, H)
    before = losses(q)
    for refiner in REFINERS.values():
        state = complete(refiner(state))
        found = state.weight()
        assert_on_grid(found, own)
        after = losses(found)
        assert (after <= before * (1 + 1e-4)).all()  # accepted by sums in float32
        before = after


# --- folders

ENDS: list[tuple[str, int]] = [(name, 4 if 4 in row.bits else row.bits[0]) for name, row in GRIDS.items()]
ENDS = [
    (name, bits)
    for name, bits in ENDS
    if name != "uniform" and not make_grid(name, bits, GRIDS[name].symmetric[0]).learns
]


def recipe_of(name: str, **fields: Any) -> Recipe:
    return Recipe(grid=name, **({"group_size": 16} if GRIDS[name].group_size is None else {}), **fields)


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model: Any = llmq.load(folder, dtype=torch.float32)
    found: Tensor = model(IDS).logits
    return found


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("dense"), num_hidden_layers=1)


@pytest.mark.parametrize(("name", "bits"), ENDS, ids=[name for name, _ in ENDS])
def test_a_folder_of_every_grid_is_loaded_and_run(dense: Path, tmp_path: Path, name: str, bits: int) -> None:
    assert recipe_of(name).bits == bits
    quantize(dense, tmp_path / "packed", recipe_of(name, method="rtn"))
    packed = PackedCheckpoint(tmp_path / "packed")
    with torch.no_grad():
        expected = reference_model(packed)(IDS).logits
    # float32 sums of at most 128 products in another order, through a block
    assert (logits(packed.path) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert [f.line() for f in diagnose(packed.path) if f.severity != NOTE] == []
    llmq.load(packed.path).save_pretrained(tmp_path / "saved")
    saved = PackedCheckpoint(tmp_path / "saved")
    assert all(torch.equal(saved.read(key).float(), packed.read(key).float()) for key in packed)


def test_gptq_writes_a_folder_that_can_be_made_dense(dense: Path, tmp_path: Path) -> None:
    ids = torch.randint(1, WORDS, (8, 24), generator=torch.Generator().manual_seed(1))
    given = Calibration(ids, None, "random", "none")
    quantize(dense, tmp_path / "packed", recipe_of("nvfp4", refine_rounds=1), calibration=given)
    convert(tmp_path / "packed", tmp_path / "plain", DENSE)
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)(IDS).logits
    assert (logits(tmp_path / "packed") - plain).abs().max() <= 1e-4 * plain.abs().max()


def packed_layer(name: str) -> tuple[dict[str, Tensor], QuantSpec, QuantizedWeight]:
    """Return the tensors of a layer on one of the grids with small scales, its spec and its weight."""
    row = GRIDS[name]
    assert row.group_size is not None
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(5, 70, generator=draw) * torch.logspace(-3, 0, 5)[:, None]
    w[2] = 0
    spec = QuantSpec(4, row.group_size, True, "llmq", row.scale_dtype, name)
    weight = rtn(w, None, make_grid(name, 4, True).adapted(w), row.group_size).weight
    return FORMATS["llmq"].pack(weight, spec), spec, weight


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_small_scales_come_back_and_take_a_byte(name: str) -> None:
    tensors, spec, weight = packed_layer(name)
    assert tensors["scales"].dtype == spec.scale_dtype
    assert tensors["scales"].element_size() == 1
    assert (GLOBAL in tensors) == (name == "nvfp4")
    header = FORMATS["llmq"].layout(spec, 5, 70)
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == header
    back = FORMATS["llmq"].unpack(tensors, spec)
    assert torch.equal(back.scales, weight.scales)
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_the_scale_of_a_layer_is_that_of_its_own_largest() -> None:
    tensors, spec, weight = packed_layer("nvfp4")
    unit = tensors[GLOBAL].item()
    assert 224 < weight.scales.max().item() / unit <= 448
    # rows of a stack are packed on their own, and keep their scales
    small = QuantizedWeight(weight.codes[:2], weight.scales[:2], weight.zeros[:2], weight.grid, 16)
    alone = FORMATS["llmq"].pack(small, spec)
    assert alone[GLOBAL].item() < unit
    assert torch.equal(FORMATS["llmq"].unpack(alone, spec).scales, weight.scales[:2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0, 3.0, 2.0**-60, 2.0**60], ids=str)
def test_scales_of_a_layer_that_cannot_be_are_refused(bad: float) -> None:
    tensors, spec, _ = packed_layer("nvfp4")
    tensors[GLOBAL] = torch.tensor([bad])
    with pytest.raises(CheckpointError, match="scale"):
        FORMATS["llmq"].unpack(tensors, spec)


@pytest.mark.parametrize(("name", "byte"), [("mxfp4", 255), ("mxfp4", 0), ("mxfp4", 254), ("nvfp4", 127), ("nvfp4", 0)])
@pytest.mark.parametrize("stream", [False, True])
def test_scales_that_cannot_be_are_refused(name: str, byte: int, stream: bool) -> None:
    from llmq.formats import streams

    tensors, spec, _ = packed_layer(name)
    tensors["scales"].view(torch.uint8)[1, 2] = byte
    with pytest.raises(CheckpointError, match="scales"):
        streams.from_stored(tensors, spec, 70) if stream else FORMATS["llmq"].unpack(tensors, spec)


@pytest.mark.parametrize("change", ["missing", "shape", "dtype", "levels"])
def test_tensors_beside_the_codes_have_to_fit(change: str) -> None:
    tensors, spec, _ = packed_layer("nvfp4")
    if change == "missing":
        del tensors[GLOBAL]
    elif change == "shape":
        tensors[GLOBAL] = torch.ones(2)
    elif change == "dtype":
        tensors["scales"] = tensors["scales"].half()
    else:
        tensors["levels"][0, 3] = torch.nan
    with pytest.raises(CheckpointError, match=r"levels|scale"):
        FORMATS["llmq"].unpack(tensors, spec)


def test_scales_that_are_not_exact_are_not_packed() -> None:
    _, spec, weight = packed_layer("nvfp4")
    weight.scales[0, 0] *= 1 + 2.0**-5
    with pytest.raises(SpecError, match="not exact in float8_e4m3fn"):
        FORMATS["llmq"].pack(weight, spec)


def test_zeros_pick_tables_and_others_are_refused() -> None:
    grid = make_grid("pwlq", 4, False)
    spec = QuantSpec(4, GROUP, False, "llmq", torch.float16, "pwlq")
    tensors = FORMATS["llmq"].pack(rtn(W, None, grid, GROUP).weight, spec)
    assert tensors["levels"].shape == (16, 16)
    tensors["zeros"][0, 0] = 16
    with pytest.raises(CheckpointError, match="zeros"):
        FORMATS["llmq"].unpack(tensors, spec)


def test_bits_per_weight() -> None:
    for name, expected in (("mxfp4", 4.25), ("nvfp4", 4.5), ("nf4", 4.125), ("pwlq", 4.1875), ("binary", 1.125)):
        row = GRIDS[name]
        group = row.group_size or 128
        spec = QuantSpec(4 if 4 in row.bits else 1, group, row.symmetric[0], "llmq", row.scale_dtype, name)
        layout = FORMATS["llmq"].layout(spec, 1024, 1024)
        held = sum(
            torch.Size(s).numel() * d.itemsize for key, (s, d) in layout.items() if key in ("codes", "scales", "zeros")
        )
        assert held * 8 / 1024**2 == expected


def test_tables_are_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        grids = [make_grid(grid.name, grid.bits, grid.symmetric) for grid in ALL.values()]
        tables = [(grid.tables, grid.bounds) for grid in grids if isinstance(grid, TableGrid)]
    assert len(tables) == len(TABLES)
    assert {t.device.type for pair in tables for t in pair} == {"cpu"}


def test_every_layer_has_a_table_of_its_own() -> None:
    grid = make_grid("nf4", 4, True)
    spec, weight = QuantSpec(4, GROUP, True, "llmq", torch.float16, "nf4"), rtn(W, None, grid, GROUP).weight
    first, second = (FORMATS["llmq"].pack(weight, spec)["levels"] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()  # files refuse tensors that share memory
