"""Every grid, at every width that it claims, under the solvers that all grids share: packed, loaded, run."""

from pathlib import Path

import pytest
import torch
from tiny_models import make_llama

import llmq
from llmq.calibration import Calibration
from llmq.errors import SpecError
from llmq.grids import ALL_GRIDS
from llmq.packed import PackedCheckpoint
from llmq.recipe import make_recipe
from llmq.solvers import SOLVERS
from llmq.solvers.vectors import VECTOR_SOLVERS

CASES = [(name, bits, sym) for name, row in ALL_GRIDS.items() for bits in row.bits for sym in row.symmetric]
IDS = [f"{name}-{bits}-{'sym' if sym else 'asym'}" for name, bits, sym in CASES]
IDS_OF_TOKENS = torch.arange(24)[None] % 50


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model."""
    return make_llama(tmp_path_factory.mktemp("dense"), num_hidden_layers=1)


@pytest.mark.parametrize("method", ["rtn", "gptq", "descent"])
@pytest.mark.parametrize(("grid", "bits", "sym"), CASES, ids=IDS)
def test_what_is_loaded_computes_with_the_levels_that_were_packed(
    dense: Path, tmp_path: Path, grid: str, bits: int, sym: bool, method: str
) -> None:
    fields = {"grid": grid, "bits": bits, "sym": sym, "method": method, "format": "llmq", "shift": 0.0}
    recipe = make_recipe({**fields, "num_samples": 4, "seq_len": 32, "refine_rounds": 1, "held_out": 0.0})
    ids = torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(0))
    windows = Calibration(ids, None, "random tokens", "0" * 64)
    report = llmq.quantize(dense, tmp_path / "packed", recipe, calibration=windows)
    assert all(not layer.remedies for layer in report.layers)
    packed = PackedCheckpoint(tmp_path / "packed")
    assert {(spec.grid, spec.bits) for spec in packed.specs.values()} == {(grid, bits)}
    reference = llmq.load(dense, dtype=torch.float32)
    with torch.no_grad():
        for module in packed.layers:
            reference.get_submodule(module).weight.copy_(packed.dequantized(module))
        expected = reference(IDS_OF_TOKENS).logits
        found = llmq.load(tmp_path / "packed", dtype=torch.float32)(IDS_OF_TOKENS).logits
    # float32 sums of at most 128 products per output, in another order, through one block and a head
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("grid", ALL_GRIDS)
@pytest.mark.parametrize("method", SOLVERS)
def test_a_method_says_before_work_that_it_does_not_know_a_grid(
    dense: Path, tmp_path: Path, grid: str, method: str
) -> None:
    row = ALL_GRIDS[grid]
    made = row.make(row.bits[0], row.symmetric[0])
    known = VECTOR_SOLVERS if grid.startswith("vq") else SOLVERS
    if method in known and known[method].refuses(made) is None:
        return
    recipe = make_recipe({"grid": grid, "bits": row.bits[0], "sym": row.symmetric[0], "method": method})
    with pytest.raises(SpecError, match=method):
        llmq.quantize(dense, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
