"""The grid of CONTRIBUTING.md, added by the very code that stands there."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import WORDS, make_llama

import llmq
import llmq.hf
from llmq import grids
from llmq.calibration import Calibration
from llmq.driver import quantize
from llmq.packed import PackedCheckpoint
from llmq.recipe import Recipe
from llmq.verify.reference import reference_model

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
MODULE, ROW = re.findall(r"```python\n(.*?)```", TEXT.split("## A grid")[1].split("\n## ")[0], flags=re.DOTALL)


@pytest.fixture
def cubic(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"GRIDS": dict[str, grids.GridRow](), "GridRow": grids.GridRow}
    exec(MODULE + ROW, names)
    for name, row in names["GRIDS"].items():  # type: ignore[attr-defined]
        monkeypatch.setitem(grids.GRIDS, name, row)


@pytest.mark.usefixtures("cubic")
def test_the_example_makes_a_grid() -> None:
    assert MODULE.count("\n") + ROW.count("\n") <= 60
    grid = grids.make_grid("cubic", 4, True)
    assert grid.tables is not None
    assert grid.tables[0, :15].tolist() == pytest.approx([(i / 7) ** 3 for i in range(-7, 8)])
    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    at, full = grid.fit(w, torch.ones(40)), grid.fit(w)
    codes = grid.encode(w, at)
    assert torch.equal(grid.encode(grid.decode(codes, at), at), codes)
    assert (grid.nearest(w, at) - w).square().sum() < (grid.nearest(w, full) - w).square().sum()


@pytest.mark.usefixtures("cubic")
def test_the_example_quantizes_and_runs_a_model(tmp_path: Path) -> None:
    ids = torch.randint(1, WORDS, (8, 24), generator=torch.Generator().manual_seed(1))
    recipe = Recipe(grid="cubic", group_size=32, refine_rounds=1)
    dense = make_llama(tmp_path / "dense", num_hidden_layers=1)
    quantize(dense, tmp_path / "packed", recipe, calibration=Calibration(ids, None, "random", "none"))
    with torch.no_grad():
        found = llmq.load(tmp_path / "packed", dtype=torch.float32)(ids).logits
        expected = reference_model(PackedCheckpoint(tmp_path / "packed"))(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()  # float32 sums in another order
