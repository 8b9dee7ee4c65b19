"""Methods and grids that do not go together are refused before work; those that do are run to a packed folder."""

from pathlib import Path

import pytest
import torch
from tiny_models import WORDS, make_llama

import llmq
from llmq.calibration import Calibration
from llmq.driver import quantize
from llmq.errors import SpecError
from llmq.grids import make_grid
from llmq.packed import PackedCheckpoint
from llmq.preflight import prepare
from llmq.recipe import Recipe
from llmq.solvers import SOLVERS
from llmq.verify.reference import reference_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("dense"), num_hidden_layers=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "bitsplit", "sym": False}, "method bitsplit makes codes of signed digits.*use --sym"),
        ({"method": "bitsplit", "grid": "apot"}, "method bitsplit knows equally spaced levels, not the apot grid"),
        ({"method": "admm", "grid": "codebook"}, "method admm moves scales, which the codebook grid has not"),
        ({"method": "obq", "grid": "nf4"}, "method obq knows equally spaced levels, not the nf4 grid; use gptq or"),
        ({"method": "bitsplit", "grid": "vq4"}, "method bitsplit decides on single weights"),
    ],
    ids=str,
)
def test_refused_before_work(dense: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        prepare(dense, Recipe(**{"group_size": 16} | fields))


def test_which_solver_takes_which_grid() -> None:
    grids = {
        "sym": make_grid("uniform", 4, True),
        "asym": make_grid("uniform", 4, False),
        "table": make_grid("nf4", 4, True),
        "learned": make_grid("codebook", 4, True),
    }
    refused = {name: {key for key, grid in grids.items() if row.refuses(grid)} for name, row in SOLVERS.items()}
    assert {name: found for name, found in refused.items() if found} == {
        "obq": {"table", "learned"},
        "bitsplit": {"asym", "table", "learned"},
        "admm": {"learned"},
    }


@pytest.mark.parametrize(
    "fields",
    [{"method": "bitsplit"}, {"method": "slb", "grid": "nf4"}, {"method": "admm", "sym": False}],
    ids=lambda fields: str(fields["method"]),
)
def test_a_folder_is_made(dense: Path, tmp_path: Path, fields: dict[str, object]) -> None:
    ids = torch.randint(1, WORDS, (8, 24), generator=torch.Generator().manual_seed(1))
    recipe = Recipe(**{"group_size": 16, "refine_rounds": 1, "shift": 0.0} | fields)
    quantize(dense, tmp_path / "packed", recipe, calibration=Calibration(ids, None, "random", "none"))
    with torch.no_grad():
        expected = reference_model(PackedCheckpoint(tmp_path / "packed"))(ids[:1]).logits
        found = llmq.load(tmp_path / "packed", dtype=torch.float32)(ids[:1]).logits
    # float32 sums of at most 128 products in another order, through a block
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
