"""Solvers of weights on codebooks, against slow float64 ones and by laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from vector_reference import costs_of, decoded, loss, random_weight, spread_inputs, swept_by_inverse

from llmq.errors import SolverError
from llmq.grids.vq import VectorGrid, VectorWeight, whole_vectors
from llmq.hessian import damped
from llmq.report import DESCENDED, ROUNDED
from llmq.solvers.vectors import VECTOR_SOLVERS, vector_descent, vector_gptq, vector_rtn, vector_weighted_rtn
from llmq.vectors.codebooks import vectors_of
from llmq.vectors.metrics import block_roots
from llmq.vectors.placing import per_vector, placed

GRIDS = [VectorGrid(2, 2), VectorGrid(1, 4), VectorGrid(2, 4), VectorGrid(1, 8), VectorGrid(4, 2)]
SHAPES = [(9, 16, 16), (17, 24, 8), (6, 19, 19), (5, 13, 128), (12, 30, 16)]  # N, K, group size


def weight_of(method: str, w: Tensor, h: Tensor, grid: VectorGrid, size: int, **options: Any) -> VectorWeight:
    found = VECTOR_SOLVERS[method].run(w, h, grid, size, **options).weight
    assert isinstance(found, VectorWeight)
    return found


@pytest.mark.parametrize("method", VECTOR_SOLVERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_what_files_hold(method: str, grid: VectorGrid, shape: tuple[int, int, int]) -> None:
    n, k, size = shape
    w = random_weight(n, k)
    found = weight_of(method, w, spread_inputs(k), grid, size)
    assert found.codes.dtype == torch.uint8
    assert found.codes.shape == (n, -(-k // grid.columns))
    assert found.scales.shape == (n, -(-k // size))
    assert found.codebook.shape == (grid.entries, grid.columns)
    assert int(found.codes.max()) < grid.entries
    assert torch.equal(found.codebook.to(torch.int8).float(), found.codebook)
    assert found.codebook.abs().max() <= 127
    assert torch.equal(found.scales.half().bfloat16().float(), found.scales)
    assert (found.scales > 0).all()
    expected = decoded(found.codes, found.scales, found.codebook, size, k)
    torch.testing.assert_close(found.dequantize().double(), expected, rtol=1e-6, atol=0)
    again = weight_of(method, w, spread_inputs(k), grid, size)
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(again.codebook, found.codebook)


@pytest.mark.parametrize("order", ["natural", "act"])
@pytest.mark.parametrize(
    ("shape", "grid"), [((4, 40, 8), GRIDS[0]), (SHAPES[1], GRIDS[2]), (SHAPES[0], GRIDS[3]), ((20, 68, 68), GRIDS[1])]
)
def test_gptq_is_the_textbook_s(order: str, shape: tuple[int, int, int], grid: VectorGrid) -> None:
    n, k, size = shape
    w, h = random_weight(n, k), spread_inputs(k)
    found = weight_of("gptq", w, h, grid, size, order=order, damp_percent=0.05)
    full = damped(h, 0.05, torch.float64)
    d = grid.columns
    visit = list(range(k // d))
    if order == "act":
        visit.sort(key=lambda p: -float(h.diagonal()[p * d : p * d + d].sum()))
    scales = per_vector(found.scales, grid, size, k // d)
    expected = swept_by_inverse(w, full, scales, found.codebook, visit)
    # a tie within float32 rounding would move all that follows in its row: none of these rows has one
    assert torch.equal(found.codes.long(), expected)


@pytest.mark.parametrize(("n", "k", "grid"), [(40, 10, VectorGrid(1, 4)), (200, 9, VectorGrid(1, 8))], ids=str)
def test_gptq_of_a_ragged_row_is_that_of_a_longer_one_of_no_energy(n: int, k: int, grid: VectorGrid) -> None:
    w, h, count = random_weight(n, k), spread_inputs(k), grid.codes_in(k)
    found = weight_of("gptq", w, h, grid, k, order="natural", damp_percent=1.0)  # strong: its size shows
    longer = torch.zeros(count * grid.columns, count * grid.columns, dtype=torch.float64)
    longer[:k, :k] = damped(h, 1.0, torch.float64)
    longer.diagonal()[k:] = 1e-9
    scales = found.scales.expand(-1, count)
    expected = swept_by_inverse(whole_vectors(w, grid.columns), longer, scales, found.codebook, list(range(count)))
    # entries may be alike in what is within the row
    assert torch.equal(found.dequantize(), replace(found, codes=expected.to(torch.uint8)).dequantize())


def test_on_uncorrelated_inputs_gptq_is_plain_assignment() -> None:
    w, energy, grid = random_weight(20, 16), torch.rand(16) + 0.1, VectorGrid(2, 4)
    h = torch.diag(energy)
    swept, plain = (weight_of(m, w, h, grid, 16) for m in ("gptq", "weighted_rtn"))
    damping = 0.05 * float(energy.mean())
    vectors = vectors_of(w, swept.scales.expand(-1, 4), torch.diag_embed((energy + damping).sqrt().view(4, 4)))
    costs = costs_of(vectors.values, vectors.scales, vectors.roots, swept.codebook)
    taken = costs.gather(2, swept.codes.T.long()[:, :, None])[:, :, 0]
    assert (taken <= costs.amin(dim=2) * (1 + 1e-4) + 1e-9).all()
    assert loss(w, swept.dequantize(), h) < 1.1 * loss(w, plain.dequantize(), h)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_solvers_lose_less_the_more_they_know(grid: VectorGrid) -> None:
    k = 32
    n = 5 * grid.entries  # fewer vectors than that an entry each would nearly have, and any change would harm
    w, h = random_weight(min(n, 600), k), spread_inputs(k, tokens=40)
    lost = {
        method: loss(w, weight_of(method, w, h, grid, k).dequantize(), h)
        for method in ("rtn", "weighted_rtn", "gptq", "descent")
    }
    assert lost["gptq"] < lost["weighted_rtn"] < 1.05 * lost["rtn"]
    assert lost["descent"] < lost["weighted_rtn"]


def test_plain_rounding_takes_the_nearest_entry() -> None:
    w, grid = random_weight(30, 22), VectorGrid(2, 4)
    found = vector_rtn(w, None, grid, 22).weight
    assert isinstance(found, VectorWeight)
    error = (w - found.dequantize()).square()
    for entry in range(grid.entries):
        other = found.scales * found.codebook[entry].repeat(6)[:22]
        alone = (w - other).square()
        for p in range(6):
            block = slice(4 * p, min(4 * p + 4, 22))
            mine, there = error[:, block].sum(dim=1), alone[:, block].sum(dim=1)
            assert (mine <= there * (1 + 1e-4) + 1e-7).all()


def test_the_size_of_h_and_of_rows_does_not_matter() -> None:
    w, h, grid = random_weight(16, 24), spread_inputs(24), VectorGrid(2, 4)
    for method in ("weighted_rtn", "gptq", "descent"):
        one, other = (weight_of(method, w, h * factor, grid, 24) for factor in (1.0, 1024.0))
        assert torch.equal(one.codes, other.codes)
    one, other = weight_of("gptq", w, h, grid, 24), weight_of("gptq", w * 0.25, h, grid, 24)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales * 0.25, other.scales)


def test_inputs_that_never_occur_are_rounded_to_nearest() -> None:
    w, grid = random_weight(40, 16), VectorGrid(2, 4)
    h = spread_inputs(16)
    h[4:8] = h[:, 4:8] = 0.0
    for method in ("weighted_rtn", "gptq", "descent"):
        found = weight_of(method, w, h, grid, 16)
        error = (w - found.dequantize())[:, 4:8].square().sum(dim=1)
        tried = (w[:, None, 4:8] - found.scales[:, None] * found.codebook).square().sum(dim=2)
        assert (error <= tried.amin(dim=1) * (1 + 1e-4) + 1e-7).all()


def test_a_hessian_without_factor_is_descended_on() -> None:
    w, grid = random_weight(12, 16), VectorGrid(2, 4)
    h = spread_inputs(16)
    h -= 0.9 * torch.linalg.eigvalsh(h)[-1] * torch.ones(16, 16) / 16  # one direction of negative energy
    h.diagonal().clamp_(min=0.1)
    assert torch.linalg.eigvalsh(h)[0] < -h.diagonal().mean()
    found = vector_gptq(w, h, grid, 16)
    assert found.remedies == (DESCENDED,)
    assert found.damp_percent == 0
    start = placed(w, grid, 16, block_roots(h, 4))
    error = w - found.weight.dequantize()
    impossible = ((error @ h) * error).sum(dim=1) < 0
    assert torch.equal(found.weight.codes[impossible], start.codes[impossible])
    worse = torch.eye(16) - 0.5  # every row finds errors of negative loss, which no inputs could cause
    assert torch.equal(vector_gptq(w, worse, grid, 16).weight.codes, placed(w, grid, 16, block_roots(worse, 4)).codes)
    negative = vector_gptq(w, -torch.eye(16), grid, 16)
    assert negative.remedies == (ROUNDED,)
    assert torch.equal(negative.weight.codes, vector_rtn(w, None, grid, 16).weight.codes)


def test_zero_rows_and_zero_weights_stay_zero() -> None:
    w = random_weight(6, 16)
    w[2] = 0
    for method in VECTOR_SOLVERS:
        found = weight_of(method, w * 0, spread_inputs(16), VectorGrid(1, 4), 16)
        assert not found.dequantize().any()
        mixed = weight_of(method, w, spread_inputs(16), VectorGrid(2, 4), 16)
        assert mixed.dequantize().isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_and_hessians_that_are_not_finite_are_refused(bad: float) -> None:
    w, h, grid = random_weight(4, 8), spread_inputs(8), VectorGrid(1, 4)
    for method, row in VECTOR_SOLVERS.items():
        broken = w.clone()
        broken[1, 3] = bad
        with pytest.raises(SolverError, match="--ignore"):
            weight_of(method, broken, h, grid, 8)
        if row.calibrated:
            h[2, 2] = bad
            with pytest.raises(SolverError, match="Hessian"):
                weight_of(method, w, h, grid, 8)
            h = spread_inputs(8)


def test_orders_that_take_vectors_apart_are_refused() -> None:
    with pytest.raises(SolverError, match="natural, act, group"):
        vector_gptq(random_weight(4, 8), spread_inputs(8), VectorGrid(1, 4), 8, order="pivot")


def test_large_layers_are_learned_from_some_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    w, grid = random_weight(64, 16), VectorGrid(1, 4)
    monkeypatch.setattr("llmq.vectors.placing._SAMPLE", 100)
    found = vector_rtn(w, None, grid, 16).weight
    monkeypatch.undo()
    whole = vector_rtn(w, None, grid, 16).weight
    one, all_of_them = ((w - q.dequantize()).square().sum() for q in (found, whole))
    assert all_of_them < one < 2 * all_of_them


def test_far_entries_are_cut_off_where_that_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """One vector lies ten times as far out as the others, and hardly counts: its entry would make all steps coarse."""
    w, grid = torch.randn(60, 200, generator=torch.Generator().manual_seed(0)), VectorGrid(4, 2)
    w[0, :2] = 100.0
    roots = torch.eye(2).repeat(100, 1, 1)
    roots[0] *= 1e-3

    def cost(found: VectorWeight) -> float:
        return float((w - found.dequantize())[:, 2:].square().sum())

    found = placed(w, grid, 200, roots)
    monkeypatch.setattr("llmq.vectors.placing._SPANS", (1.0,))
    whole = placed(w, grid, 200, roots)
    assert found.codebook.abs().max() == whole.codebook.abs().max() == 127
    assert found.scales[1] < 0.7 * whole.scales[1]
    assert cost(found) < 0.99 * cost(whole)


def test_descent_ends_where_no_code_could_be_better() -> None:
    w, h, grid = random_weight(10, 16), spread_inputs(16), VectorGrid(1, 4)
    found = vector_descent(w, h, grid, 16, damp_percent=0.05).weight
    assert isinstance(found, VectorWeight)
    full = damped(h, 0.05, torch.float64)
    here = ((w - found.dequantize()).double() @ full * (w - found.dequantize()).double()).sum(dim=1)
    for p in range(4):
        for entry in range(grid.entries):
            other = found.codes.clone()
            other[:, p] = entry
            error = (w - decoded(other, found.scales, found.codebook, 16, 16)).double()
            assert (here <= (error @ full * error).sum(dim=1) * (1 + 1e-5)).all()


def test_half_precision_weights_are_taken() -> None:
    w = random_weight(8, 16).bfloat16()
    one, other = (vector_weighted_rtn(x, spread_inputs(16), VectorGrid(1, 4), 16).weight for x in (w, w.float()))
    assert torch.equal(one.codes, other.codes)
