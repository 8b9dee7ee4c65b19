"""The weighted search for a span, against trying every one."""

from typing import NamedTuple

import pytest
import torch
from grid_cases import every_grid, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.grids.scales import MIN_SCALE
from llmq.types import Affine, Grid

every_uniform = uniform((2, 3, 4, 8))
U = 2.0**-24
SPANS = [1 - 0.02 * step for step in range(35)]  # 100 % to 32 %


class Case(NamedTuple):
    """A group [N, S] and the weights [S] of its columns."""

    w: Tensor
    weight: Tensor


def case(n: int, s: int, seed: int) -> Case:
    draw = torch.Generator().manual_seed(seed)
    # heavy tails, so that shrinking pays; weights over three decades, some 0
    w = torch.randn(n, s, generator=draw) * torch.rand(n, s, generator=draw).pow(-0.5)
    weight = 10 ** (3 * torch.rand(s, generator=draw)) * (torch.rand(s, generator=draw) > 0.1)
    return Case(w, weight)


cases = st.builds(case, st.integers(1, 6), st.integers(1, 40), st.integers(0, 10**6))


def error(grid: Grid, c: Case, at: Affine) -> Tensor:
    """Return the weighted squared error of each row, float64 [N]."""
    found = grid.decode(grid.encode(c.w, at), at).double()
    return (found - c.w.double()).square() @ c.weight.double()


def rounding(c: Case, *errors: Tensor) -> Tensor:
    """Return by how much float32 may misjudge the difference of these errors.

    Levels are exact; the difference to w, its square and the product with the weight round once each, the first
    counting twice, and the sum S times: (S + 4)·u of a sum without cancellation, doubled for the second order.
    """
    return 2 * (c.w.shape[1] + 4) * U * torch.stack(errors).sum(0)


@every_grid
@settings(max_examples=4)
@given(c=cases)
def test_the_weighted_error_is_never_above_that_of_the_full_span(grid: Grid, c: Case) -> None:
    full, found = error(grid, c, grid.fit(c.w)), error(grid, c, grid.fit(c.w, c.weight))
    assert (found <= full + rounding(c, full, found)).all()


@every_uniform
@settings(max_examples=4)
@given(c=cases)
def test_the_span_is_the_best_of_all_tried(grid: Grid, c: Case) -> None:
    ends = torch.stack([c.w.amin(1), c.w.amax(1)], dim=1)
    tried = [grid.fit(ends * span) for span in SPANS]
    errors = torch.stack([error(grid, c, at) for at in tried])
    found = grid.fit(c.w, c.weight)
    least, best = errors.min(0)
    assert (error(grid, c, found) <= least + rounding(c, least, least)).all()
    placed = torch.stack([torch.cat(at[:2], dim=1) for at in tried])  # [spans, N, 2]
    here = torch.cat(found[:2], dim=1)
    assert (placed == here).all(2).any(0).all()
    for row, span in enumerate(best.tolist()):
        other = (placed[:, row] != placed[span, row]).any(1)
        gap = errors[other, row] - least[row]
        if (gap > rounding(c, errors[:, row], least[row].expand(len(SPANS)))[other]).all():
            assert torch.equal(here[row], placed[span, row])


@uniform((2, 3, 4))
def test_the_search_pays_on_heavy_tails(grid: Grid) -> None:
    c = case(64, 40, 0)
    assert error(grid, c, grid.fit(c.w, c.weight)).sum() < 0.95 * error(grid, c, grid.fit(c.w)).sum()


@every_uniform
def test_the_full_span_is_kept_where_it_is_best(grid: Grid) -> None:
    # each level once: no error, which no smaller span can undercut
    at = Affine(torch.full((1, 1), 0.5), torch.full((1, 1), 2.0 ** (grid.bits - 1)))
    w = grid.decode(torch.arange(2**grid.bits, dtype=torch.uint8)[None], at)
    found = grid.fit(w, torch.ones(w.shape[1]))
    assert (found.scale.item(), found.zero.item()) == (at.scale.item(), at.zero.item())


@every_grid
def test_without_any_weight_the_span_is_full(grid: Grid) -> None:
    w = case(8, 20, 1).w
    full, found = grid.fit(w), grid.fit(w, torch.zeros(20))
    assert torch.equal(found.scale, full.scale)
    assert torch.equal(found.zero, full.zero)


@every_grid
def test_only_proportions_of_the_weights_matter(grid: Grid) -> None:
    c = case(8, 20, 2)
    found, other = grid.fit(c.w, c.weight), grid.fit(c.w, 2.0**20 * c.weight)
    assert torch.equal(found.scale, other.scale)
    assert torch.equal(found.zero, other.zero)


@every_uniform
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_outlier_without_weight_is_sacrificed(grid: Grid, sign: float) -> None:
    # entries of up to 1 and one of 2.5: 40 % of its span is the span of the rest
    rest = sign * torch.linspace(0, 1, 21).expand(1, 21)
    w = torch.cat([rest, torch.full((1, 1), sign * 2.5)], dim=1)
    weight = torch.ones(22)
    weight[21] = 0
    full, found = grid.fit(w), grid.fit(w, weight)
    assert found.scale.abs().item() < 0.8 * full.scale.abs().item()
    alone = error(grid, Case(rest, torch.ones(21)), grid.fit(rest))
    assert error(grid, Case(w, weight), found).item() <= alone.item() * (1 + 2 * 25 * U)  # one of the spans
    weight[21] = 1e4
    assert grid.fit(w, weight).scale.abs().item() > 0.9 * full.scale.abs().item()


@every_grid
def test_rows_are_searched_one_by_one(grid: Grid) -> None:
    c = case(7, 16, 3)
    whole = grid.fit(c.w, c.weight)
    alone = [grid.fit(row[None], c.weight) for row in c.w]
    # a sum in another order may move a near tie, of which seven rows see none
    assert torch.equal(whole.scale, torch.cat([at.scale for at in alone]))
    assert torch.equal(whole.zero, torch.cat([at.zero for at in alone]))


@every_grid
def test_a_group_of_zeros_stays_zero(grid: Grid) -> None:
    at = grid.fit(torch.zeros(2, 5), torch.ones(5))
    smallest = MIN_SCALE if grid.name == "binary" else 0.0
    assert (grid.nearest(torch.zeros(2, 5), at) == smallest).all()
    assert at.scale.tolist() == [[smallest or 1.0]] * 2


@every_grid
@settings(max_examples=4)
@given(c=cases)
def test_found_scales_are_exact_in_float16_and_bfloat16(grid: Grid, c: Case) -> None:
    scale = grid.fit(c.w, c.weight).scale
    assert scale.all()
    assert torch.equal(scale.half().float(), scale)
    assert torch.equal(scale.bfloat16().float(), scale)
