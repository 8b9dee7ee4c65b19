"""Scales of codebooks: each takes the factor under which its vectors cost least, and more is lost without."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from vector_reference import random_weight, spread_inputs

from llmq.grids.vq import VectorGrid, VectorWeight, whole_vectors
from llmq.vectors import placing
from llmq.vectors.codebooks import least_costs
from llmq.vectors.metrics import block_roots, plain
from llmq.vectors.placing import Rows, fitted, normalized, placed

GRIDS = [VectorGrid(bits, d) for d in (2, 4, 8) for bits in range(1, 8 // d + 1)]
SHAPES = [(5, 16, 16), (3, 24, 8), (4, 19, 19), (6, 13, 128), (4, 30, 16)]  # N, K, group size


def problem(n: int, k: int, grid: VectorGrid, size: int) -> tuple[Tensor, Rows]:
    """Return a weight, and its rows in a metric in which what reaches beyond the last column weighs nothing."""
    w = random_weight(n, k)
    return w, Rows(whole_vectors(w, grid.columns), block_roots(spread_inputs(k), grid.columns), grid, size)


def book_of(grid: VectorGrid, seed: int = 0) -> Tensor:
    return torch.randn(grid.entries, grid.columns, generator=torch.Generator().manual_seed(seed))


def costs_of_groups(w: Tensor, h: Tensor, scales: Tensor, book: Tensor, size: int) -> Tensor:
    """Return what each group costs at `scales` [N, G], every vector on its best entry: float64, one after the other."""
    d, (n, k) = book.shape[1], w.shape
    found = torch.zeros(scales.shape, dtype=torch.float64)
    for row in range(n):
        for start in range(0, k, d):
            stop, group = min(start + d, k), start // size
            error = w[row, start:stop].double() - scales[row, group].double() * book[:, : stop - start].double()
            block = h[start:stop, start:stop].double()
            found[row, group] += (error @ block * error).sum(dim=1).min()
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_scale_takes_the_best_factor(grid: VectorGrid, shape: tuple[int, int, int]) -> None:
    n, k, size = shape
    w, rows = problem(n, k, grid, size)
    book, sizes = book_of(grid), normalized(w, size)
    found = fitted(rows, sizes, book)
    tried = torch.stack([sizes * factor for factor in placing._FACTORS])
    assert (found == tried).any(dim=0).all()
    expected = torch.stack([costs_of_groups(w, spread_inputs(k), scales, book, size) for scales in tried]).amin(dim=0)
    taken = costs_of_groups(w, spread_inputs(k), found, book, size)
    # costs in float32 of vectors that entries hit closely: rounding of the energy of whole groups, 2^-24 of it a term
    slack = 1e-5 * costs_of_groups(w, spread_inputs(k), torch.zeros_like(sizes), book, size)
    assert (taken <= expected * (1 + 1e-4) + slack).all()


def test_of_equal_factors_the_present_scale_stays() -> None:
    grid = VectorGrid(1, 4)
    w, rows = problem(6, 24, grid, 8)
    sizes = normalized(w, 8)
    assert torch.equal(fitted(rows, sizes, torch.zeros(16, 4)), sizes)


@pytest.mark.parametrize("size", [24, 8])
def test_scales_that_are_off_come_back(size: int) -> None:
    """Weights that entries hit exactly at some scale, and scales that are all a factor too large, or too small."""
    grid, draw = VectorGrid(1, 4), torch.Generator().manual_seed(4)
    book, right = book_of(grid), torch.rand(7, 24 // size, generator=draw) + 0.5
    codes = torch.randint(0, grid.entries, (7, 6), generator=draw)
    w = (book[codes].flatten(1).view(7, -1, size) * right[:, :, None]).flatten(1)
    rows = Rows(w, plain(6, 4, 24, w.device), grid, size)
    for factor in placing._FACTORS:
        found = fitted(rows, right / factor, book)
        torch.testing.assert_close(found, right)


def test_each_step_costs_no_more_than_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = VectorGrid(2, 4)
    w, rows = problem(300, 32, grid, 16)
    history: list[float] = []

    def cost(sizes: Tensor, book: Tensor) -> float:
        return float(least_costs(rows.vectors(sizes), book).double().sum())

    real_fitted, real_learn = placing.fitted, placing.learn

    def watched_fitted(own: Rows, sizes: Tensor, book: Tensor) -> Tensor:
        history.append(cost(sizes, book))
        found = real_fitted(own, sizes, book)
        history.append(cost(found, book))
        return found

    def watched_learn(*args: Any) -> tuple[Tensor, list[float]]:
        found, costs = real_learn(*args)
        history.extend(costs)
        return found, costs

    monkeypatch.setattr(placing, "_FEW", 10**6)  # all of them from the beginning, so that costs can be compared
    monkeypatch.setattr(placing, "fitted", watched_fitted)
    monkeypatch.setattr(placing, "learn", watched_learn)
    placed(w, grid, 16, rows.roots)
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(history))
    assert history[-1] < 0.97 * history[0]


def lost(w: Tensor, h: Tensor, found: VectorWeight) -> float:
    error = w - found.dequantize()
    d = found.codebook.shape[1]
    return sum(
        float((error[:, at : at + d] @ h[at : at + d, at : at + d] * error[:, at : at + d]).sum())
        for at in range(0, w.shape[1], d)
    )


@pytest.mark.parametrize("grid", [VectorGrid(3, 2), VectorGrid(2, 2)], ids=str)
@pytest.mark.parametrize("size", [32, 64])
def test_more_is_lost_without(grid: VectorGrid, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, rows = problem(200, 64, grid, size)
    w = w * torch.randn(w.shape, generator=torch.Generator().manual_seed(5)).abs().sqrt()  # tails, as weights have
    h = spread_inputs(64)
    with_search = lost(w, h, placed(w, grid, size, rows.roots))
    monkeypatch.setattr(placing, "_FACTORS", (1.0,))
    assert with_search < 0.97 * lost(w, h, placed(w, grid, size, rows.roots))


@pytest.mark.parametrize(("few", "many"), [(200, 10**6), (10**6, 300), (200, 300)])
def test_rows_that_no_entry_is_learned_from_have_scales_of_their_own(
    few: int, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = VectorGrid(1, 4)
    w, rows = problem(160, 24, grid, 8)
    monkeypatch.setattr(placing, "_FEW", few)
    monkeypatch.setattr(placing, "_SAMPLE", many)
    found = placed(w, grid, 8, rows.roots)
    ratio = (found.scales / normalized(w, 8)).view(160, 3)
    for some in (ratio[1::2], ratio[:-1:2]):
        assert len((some / ratio.median()).mul(100).round().unique()) > 4
    whole = found
    monkeypatch.undo()
    whole = placed(w, grid, 8, rows.roots)
    assert lost(w, spread_inputs(24), found) < 1.5 * lost(w, spread_inputs(24), whole)


def test_scales_are_tried_on_some_rows_and_then_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    w, rows = problem(160, 24, VectorGrid(1, 4), 24)
    sizes, calls = normalized(w, 24), []
    real = placing.fitted

    def watched(own: Rows, given: Tensor, book: Tensor) -> Tensor:
        found = real(own, given, book)
        calls.append((given.clone(), found))
        return found

    monkeypatch.setattr(placing, "fitted", watched)
    monkeypatch.setattr(placing, "_FEW", 240)  # of 960 vectors: every fourth row
    before = sizes.clone()
    placing._learned(rows, sizes)
    assert torch.equal(sizes, before)
    assert [len(given) for given, _ in calls] == [40] * placing._ROUNDS + [160] * placing._LAST_ROUNDS
    some, first = calls[placing._ROUNDS - 1][1], calls[placing._ROUNDS][0]
    assert torch.equal(first[::4], some)
    assert torch.equal(first[1::4], sizes[1::4])
