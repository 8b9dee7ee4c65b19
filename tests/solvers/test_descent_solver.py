"""Round to nearest on weighted scales, and coordinate descent from there, without and with a usable Hessian."""

import pytest
import torch
from descent_reference import one_pass
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import assert_same, correlated, losses

from llmq.errors import SolverError
from llmq.grids.uniform import UniformGrid
from llmq.hessian import damped, symmetric
from llmq.solvers.descent import descent, without_factor
from llmq.solvers.gptq import gptq
from llmq.solvers.placing import floored, placer
from llmq.solvers.rtn import rtn
from llmq.solvers.weighted_rtn import weighted_rtn

REMEDY = "coordinate descent, no factorization"
both_signs = pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])


@both_signs
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("k", "group_size"), [(12, 5), (64, 16), (33, 33)], ids=str)
def test_weighted_rtn_takes_the_best_span_by_the_diagonal(k: int, group_size: int, bits: int, sym: bool) -> None:
    w, h = correlated(8, k, seed=k)
    grid = UniformGrid(bits, sym)
    found = weighted_rtn(w, h, grid, group_size).weight
    for g, (columns, energy) in enumerate(zip(w.split(group_size, 1), h.diagonal().split(group_size), strict=True)):
        at = grid.fit(columns, energy)
        assert torch.equal(found.scales[:, g : g + 1], at.scale)
        assert torch.equal(found.zeros[:, g : g + 1], at.zero)
        assert torch.equal(found.codes[:, g * group_size : (g + 1) * group_size], grid.encode(columns, at))


def test_what_is_not_on_the_diagonal_does_not_count_for_weighted_rtn() -> None:
    w, h = correlated(8, 64, seed=1)
    grid = UniformGrid(3, symmetric=False)
    assert_same(weighted_rtn(w, h, grid, 16).weight, weighted_rtn(w, torch.diag(h.diagonal()), grid, 16).weight)


@pytest.mark.parametrize("search_norm", [1.0, 2.0, 2.4])
def test_mse_looks_at_no_hessian_and_sums_the_power_that_it_is_told(search_norm: float) -> None:
    w, h = correlated(16, 64, seed=2)
    grid = UniformGrid(2, symmetric=False)
    found = weighted_rtn(w, h, grid, 64, scale_search="mse", search_norm=search_norm).weight
    other = weighted_rtn(w, h.flip(0, 1), grid, 64, scale_search="mse", search_norm=search_norm).weight
    assert_same(found, other)
    at = grid.fit(w, torch.ones(64), norm=search_norm)
    assert torch.equal(found.scales, at.scale)


def test_the_power_is_that_of_mse_alone() -> None:
    w, h = correlated(16, 64, seed=2)
    grid = UniformGrid(2, symmetric=False)
    a, b = (weighted_rtn(w, h, grid, 64, search_norm=norm).weight for norm in (2.0, 4.0))
    assert_same(a, b)


def test_columns_that_never_occurred_neither_decide_nor_vanish() -> None:
    energy = torch.tensor([4.0, 0.0, 2.0, 0.0])
    assert floored(energy).tolist() == pytest.approx([4.0, 1.5e-6, 2.0, 1.5e-6])
    w, _ = correlated(16, 32, seed=3)
    grid = UniformGrid(2, symmetric=False)
    h = torch.diag(torch.tensor([0.0, 1.0]).repeat_interleave(16))
    for solve in (weighted_rtn, descent, gptq):
        found = solve(w, h, grid, 16, scale_search="hessian").weight  # type: ignore[operator]
        dead = grid.fit(w[:, :16], torch.ones(16))  # all alike among themselves
        assert torch.equal(found.scales[:, :1], dead.scale)
        mixed = solve(w, h, grid, 32, scale_search="hessian").weight  # type: ignore[operator]
        alive = grid.fit(w, torch.diagonal(h))  # among the living they do not count
        assert (mixed.scales == alive.scale).float().mean() > 0.9


@both_signs
@pytest.mark.parametrize(("k", "group_size", "bits"), [(6, 3, 2), (24, 8, 3), (40, 16, 4)], ids=str)
def test_descent_is_the_repeated_pass_of_the_reference(k: int, group_size: int, bits: int, sym: bool) -> None:
    w, h = correlated(24, k, seed=k)
    h = symmetric(h)
    found = descent(w, h, UniformGrid(bits, sym), group_size, damp_percent=0.02)
    assert (found.damp_percent, found.remedies) == (0.02, ())
    start = weighted_rtn(w, h, UniformGrid(bits, sym), group_size).weight
    full = damped(h, 0.02, torch.float32)
    codes, clear = start.codes, torch.ones(24, dtype=torch.bool)
    for _ in range(8):
        result = one_pass(codes, start.scales, start.zeros, group_size, bits, w, full)
        codes, clear = result.codes.to(torch.uint8), clear & result.clear
    assert clear.float().mean() > 0.3, "too few rows are clear of ties to tell anything"
    assert torch.equal(found.weight.codes[clear], codes[clear])
    assert torch.equal(found.weight.scales, start.scales)


@settings(max_examples=40)
@given(
    k=st.integers(1, 40),
    group_size=st.sampled_from([1, 7, 40]),
    bits=st.sampled_from([2, 3, 4]),
    sym=st.booleans(),
    tokens=st.sampled_from([1, 5, 100]),
    seed=st.integers(0, 10**6),
)
def test_descent_never_loses_to_where_it_starts(
    k: int, group_size: int, bits: int, sym: bool, tokens: int, seed: int
) -> None:
    w, h = correlated(4, k, seed, tokens)
    grid = UniformGrid(bits, sym)
    full = damped(symmetric(h), 0.01, torch.float64)
    before = losses(w, full, weighted_rtn(w, h, grid, group_size).weight)
    after = losses(w, full, descent(w, h, grid, group_size).weight)
    # float32 misjudges a step by K roundings of sums of up to K products
    assert (after <= before * (1 + 1e-5) + 1e-12).all()


@both_signs
def test_descent_gains_by_searching_scales(sym: bool) -> None:
    ratios = []
    for seed in range(4):
        w, h = correlated(16, 96, seed)
        grid = UniformGrid(2, sym)
        searched, plain = (descent(w, h, grid, 32, scale_search=s).weight for s in ("hessian", "none"))
        ratios.append(losses(w, h, searched).sum() / losses(w, h, plain).sum())
    assert torch.stack(ratios).mean() < 0.95


def indefinite(k: int, seed: int) -> torch.Tensor:
    """Return an H that no damping up to its mean diagonal makes positive definite: two of its entries are too large."""
    _, h = correlated(1, k, seed)
    h = symmetric(h)
    h[0, 1] = h[1, 0] = 4 * h.diagonal().mean()
    return h


def test_an_indefinite_hessian_never_raises_the_loss_nor_makes_it_negative() -> None:
    returned = []
    for seed in range(6):
        w, _ = correlated(16, 24, seed)
        h = indefinite(24, seed)
        grid = UniformGrid(3, symmetric=False)
        found = without_factor(w, h, grid, 8, placer(grid, "none", 2.0))
        assert (found.damp_percent, found.remedies) == (0.0, (REMEDY,))
        nearest = rtn(w, None, grid, 8).weight
        before, after = losses(w, h, nearest), losses(w, h, found.weight)
        kept = (found.weight.codes == nearest.codes).all(1)
        assert ((after <= before * (1 + 1e-5)) | kept).all()
        assert ((after > -1e-5 * before.abs().max()) | kept).all()
        returned.append(kept)
    # descent helps some rows; others it would lead to a negative loss
    assert 0.1 < torch.cat(returned).float().mean() < 0.95


def test_a_negative_diagonal_is_skipped() -> None:
    w, h = correlated(8, 32, seed=5)
    h[3, 3] = -1.0
    found = gptq(w, h, UniformGrid(4, symmetric=True), 8)
    assert found.remedies == (REMEDY,)
    nearest = rtn(w, None, UniformGrid(4, symmetric=True), 8).weight
    assert torch.equal(found.weight.codes[:, 3], nearest.codes[:, 3])
    assert not torch.equal(found.weight.codes, nearest.codes)


@pytest.mark.parametrize("diagonal", [0.0, -1.0])
def test_without_any_positive_diagonal_it_is_round_to_nearest(diagonal: float) -> None:
    w, _ = correlated(4, 16)
    h = torch.full((16, 16), 0.5).fill_diagonal_(diagonal)
    grid = UniformGrid(4, symmetric=True)
    found = without_factor(w, h, grid, 8, placer(grid, "hessian", 2.0))
    assert found.remedies == ("round to nearest",)
    assert_same(found.weight, rtn(w, None, grid, 8).weight)


def test_the_scales_of_the_last_rung_are_searched_as_told() -> None:
    w, _ = correlated(16, 24, seed=7)
    h = indefinite(24, 7)
    grid = UniformGrid(2, symmetric=False)
    for search in ("none", "hessian"):
        found = gptq(w, h, grid, 8, scale_search=search)
        assert found.remedies == (REMEDY,)
        assert torch.equal(found.weight.scales, weighted_rtn(w, h, grid, 8, scale_search=search).weight.scales)


def test_descent_on_nan_is_an_error() -> None:
    w, h = correlated(4, 8)
    h[0, 1] = float("nan")
    with pytest.raises(SolverError, match="NaN"):
        without_factor(w, h, UniformGrid(4, symmetric=True), 8, placer(UniformGrid(4, True), "none", 2.0))
