"""OBQ as a solver against a reference that inverts what is left of H anew for every weight of every row."""

import importlib

import pytest
import torch
from gptq_reference import damped
from obq_reference import obq_rows
from solver_cases import assert_same, correlated, losses

from llmq.errors import SolverError
from llmq.grids.uniform import UniformGrid
from llmq.solvers.obq import obq
from llmq.solvers.rtn import rtn
from llmq.solvers.weighted_rtn import weighted_rtn

obq_module = importlib.import_module("llmq.solvers.obq")


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("k", "group_size", "bits"), [(1, 1, 4), (6, 6, 2), (13, 5, 3), (24, 8, 2), (24, 24, 4)], ids=str
)
def test_codes_are_those_of_the_reference(k: int, group_size: int, bits: int, symmetric: bool) -> None:
    w, h = correlated(12, k, seed=k)
    found = obq(w, h, UniformGrid(bits, symmetric), group_size)
    assert (found.damp_percent, found.remedies) == (0.01, ())
    nearest = rtn(w, None, UniformGrid(bits, symmetric), group_size).weight
    assert torch.equal(found.weight.scales, nearest.scales)
    assert torch.equal(found.weight.zeros, nearest.zeros)
    scales, zeros = (t.repeat_interleave(group_size, 1)[:, :k] for t in (nearest.scales, nearest.zeros))
    expected = obq_rows(w, h, scales, zeros, bits, 0.01)
    # the mean of the diagonal is float32 in the solver: λ off by 1e-7, amplified by a condition of hundreds
    rows = expected.gap > 1e-4
    assert rows.float().mean() >= 0.5, "too few rows are clear of ties to tell anything"
    assert torch.equal(found.weight.codes[rows].double(), expected.codes[rows])


def test_a_weight_pushed_off_the_grid_goes_next() -> None:
    # columns 0 and 1 nearly the same: rounding 0 down pushes 1 above the top level while 2 costs nothing
    h = torch.tensor([[1.0, 0.95, 0.0], [0.95, 1.0, 0.0], [0.0, 0.0, 1e-3]])
    w = torch.tensor([[0.45, 1.0, 0.4]]).repeat(40, 1) + torch.linspace(-0.3, 0.3, 40)[:, None]
    grid = UniformGrid(2, symmetric=False)
    nearest = rtn(w, None, grid, 3).weight
    scales, zeros = (t.repeat_interleave(3, 1) for t in (nearest.scales, nearest.zeros))
    expected = obq_rows(w, h, scales, zeros, 2, 0.01)
    rows = expected.gap > 1e-4
    assert rows.sum() > 20
    assert torch.equal(obq(w, h, grid, 3).weight.codes[rows].double(), expected.codes[rows])


def test_rows_are_independent_of_the_chunk_they_are_solved_in(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = correlated(9, 20, seed=1)
    grid = UniformGrid(3, symmetric=True)
    usual = obq(w, h, grid, 8).weight
    for memory in (1, 8 * 20 * 20 * 4):
        monkeypatch.setattr(obq_module, "_MEMORY", memory)
        assert_same(obq(w, h, grid, 8).weight, usual)


@pytest.mark.parametrize("search", ["none", "mse", "hessian"])
def test_groups_are_placed_beforehand_by_the_diagonal(search: str) -> None:
    w, h = correlated(9, 40, seed=3)
    grid = UniformGrid(2, symmetric=False)
    found = obq(w, h, grid, 16, scale_search=search, search_norm=3.0).weight
    assert torch.equal(found.scales, weighted_rtn(w, h, grid, 16, scale_search=search, search_norm=3.0).weight.scales)


def test_at_two_bits_it_beats_rounding_by_far() -> None:
    w, h = correlated(16, 64, seed=2)
    grid = UniformGrid(2, symmetric=False)
    full = damped(h, 0.01)
    assert (
        losses(w, full, obq(w, h, grid, 32).weight).sum() < 0.75 * losses(w, full, rtn(w, None, grid, 32).weight).sum()
    )


def test_wide_layers_are_refused() -> None:
    with pytest.raises(SolverError, match="limited to 2048 inputs; this layer has 2049: use --method gptq"):
        obq(torch.zeros(1, 2049), torch.zeros(1, 1), UniformGrid(4, symmetric=True), 128)


def test_a_hessian_beyond_remedy_is_descended_on() -> None:
    w, _ = correlated(4, 16)
    h = torch.full((16, 16), 10.0).fill_diagonal_(1.0)
    found = obq(w, h, UniformGrid(4, symmetric=True), 8)
    assert (found.damp_percent, found.remedies) == (0.0, ("coordinate descent, no factorization",))
