"""Alternating projection: against a slow loop, monotone, and on every grid that has scales."""

import pytest
import torch
from solver_cases import correlated

from llmq.errors import SolverError
from llmq.grids import GRIDS as ROWS
from llmq.grids import make_grid
from llmq.grids.alternating import _best_scale, alternate, least_squares
from llmq.grids.uniform import UniformGrid
from llmq.solvers.admm import admm
from llmq.solvers.placing import placer
from llmq.types import Affine, Grid

ALL: dict[str, Grid] = {
    f"{name}-{bits}": make_grid(name, bits, row.symmetric[-1])
    for name, row in ROWS.items()
    for bits in {row.bits[0], row.bits[-1]}
    if name != "codebook"
}
GRIDS = [UniformGrid(bits, sym) for bits in (2, 3, 4, 5, 6, 8) for sym in (True, False)]


def slow(w: list[float], weight: list[float], scale: float, zero: int, bits: int) -> float:
    """Return the scale of a uniform group where it and the codes are each the best for the other."""
    for _ in range(50):
        steps = [min(max(round(v / scale), -zero), 2**bits - 1 - zero) for v in w]
        curvature = sum(g * u * u for g, u in zip(weight, steps, strict=True))
        if curvature == 0:
            return scale
        ideal = sum(g * u * v for g, u, v in zip(weight, steps, w, strict=True)) / curvature
        found = float(torch.tensor(ideal, dtype=torch.float32).bfloat16())
        if abs(found - ideal) >= abs(scale - ideal):
            return scale
        scale = found
    return scale


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.bits}-{'sym' if g.symmetric else 'asym'}")
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_a_slow_loop(grid: UniformGrid, weighted: bool) -> None:
    # rows of 11 weights: none is within the rounding of a tie
    w, h = correlated(6, 29, seed=grid.bits)
    energy = h.diagonal()
    found = admm(w, h, grid, 11, scale_search="hessian" if weighted else "mse").weight
    place = placer(grid, "hessian" if weighted else "mse", 2.0)
    for g, columns in enumerate(w.split(11, dim=1)):
        own = energy.split(11)[g] if weighted else torch.ones(columns.shape[1])
        at = place(columns, own)
        for i in range(len(w)):
            expected = slow(columns[i].tolist(), own.tolist(), float(at.scale[i]), int(at.zero[i]), grid.bits)
            assert found.scales[i, g] == expected
            assert found.zeros[i, g] == at.zero[i]
    levels = grid.encode(w[:, :11], Affine(found.scales[:, :1], found.zeros[:, :1]))
    assert torch.equal(found.codes[:, :11], levels)


@pytest.mark.parametrize("name", list(ALL))
def test_no_grid_loses_by_a_step(name: str) -> None:
    grid: Grid = ALL[name]
    w, h = correlated(8, 16, seed=2)
    own = grid.adapted(w)
    weight = h.diagonal()
    at = own.fit(w)
    first = before = ((own.nearest(w, at) - w).double().square() @ weight.double())[:, None]
    for _ in range(6):
        at = at._replace(scale=_best_scale(own, w, weight, at))
        assert torch.equal(own.storable(at.scale), at.scale)
        now = ((own.nearest(w, at) - w).double().square() @ weight.double())[:, None]
        assert (now <= before * (1 + 1e-6)).all()  # float32 levels
        before = now
    final = alternate(own, w, weight, own.fit(w))
    last = ((own.nearest(w, final) - w).double().square() @ weight.double())[:, None]
    assert (last <= before * (1 + 1e-6)).all()
    assert (last <= first).all()


def test_the_scale_that_is_found_is_the_nearest_that_there_is() -> None:
    grid, one = UniformGrid(4, True), torch.ones(1)
    for slope, curvature, expected in ((0.5, 1.0, 1.5), (0.5, 0.0, 1.0), (0.5, -1.0, 1.0), (-3.0, 1.0, -2.0)):
        parts = (torch.tensor([v], dtype=torch.float64) for v in (slope, curvature))
        assert least_squares(grid, one, *parts).tolist() == [expected]
    alike = torch.ones(1, dtype=torch.float64)
    # half of the step of 2^-7 between scales near 1, which rounds up to the even one, is as near to the old one
    odd = one + 2.0**-7
    assert torch.equal(least_squares(grid, odd, 2.0**-8 * alike, alike), odd)
    # files have no scale of 0: 1 stands for it
    assert least_squares(grid, one / 2, -alike / 2, alike).tolist() == [0.5]
    assert least_squares(grid, one, 1e9 * alike, alike).item() <= 65280


def test_the_search_says_where_it_starts_and_what_it_weighs() -> None:
    w, h = correlated(6, 32)
    h = h * torch.logspace(0, 3, 32).sqrt() * torch.logspace(0, 3, 32).sqrt()[:, None]
    grid, error = UniformGrid(3, True), {}
    for search in ("none", "mse", "hessian"):
        off = (admm(w, h, grid, 32, scale_search=search).weight.dequantize() - w).square()
        error[search] = float(off.sum()), float((off @ h.diagonal()).sum())
    assert error["mse"][0] < error["none"][0] < error["hessian"][0]
    assert error["hessian"][1] < error["mse"][1]


def test_only_the_diagonal_counts_and_below_zero_it_is_none() -> None:
    w, h = correlated(4, 16, seed=3)
    grid, none = UniformGrid(3, True), h.diagonal().clone()
    none[3] = 0.0
    expected = admm(w, torch.diag(none), grid, 8)
    assert expected.damp_percent == 0.0
    h[3, 3] = -2 * h.diagonal().sum()
    found = admm(w, h, grid, 8).weight
    assert torch.equal(found.scales, expected.weight.scales)
    assert torch.equal(found.codes, expected.weight.codes)


def test_a_group_that_never_occurs_is_placed_as_if_all_inputs_were_alike() -> None:
    w, h = correlated(6, 24, seed=4)
    h[8:16], h[:, 8:16] = 0.0, 0.0
    grid = UniformGrid(3, True)
    found, alone = admm(w, h, grid, 8).weight, admm(w[:, 8:16], torch.eye(8), grid, 8).weight
    assert torch.equal(found.scales[:, 1:2], alone.scales)
    assert torch.equal(found.codes[:, 8:16], alone.codes)
    assert not torch.equal(
        alone.scales, admm(w[:, 8:16], torch.zeros(8, 8), grid, 8, scale_search="none").weight.scales
    )


def test_levels_without_a_scale_are_refused() -> None:
    w, h = correlated(2, 8)
    with pytest.raises(SolverError, match="method admm moves scales, which the codebook grid has not; use gptq"):
        admm(w, h, make_grid("codebook", 2, True), 4)
