"""Solvers on learned levels, against textbook ones in float64 on the levels that they chose."""

from typing import Any

import codebook_reference as reference
import pytest
import torch
from order_reference import visit
from solver_cases import correlated, losses
from torch import Tensor

from llmq.descent import begin, descend, take
from llmq.grids.codebook import CodebookGrid
from llmq.hessian import damped
from llmq.refine import refine
from llmq.solvers import SOLVERS
from llmq.solvers.placing import floored
from llmq.types import QuantizedWeight
from llmq.weights import chosen, select_rows, stacked

SIZES = [(48, 48, 2), (48, 16, 3), (50, 16, 2), (70, 70, 4)]  # K, columns of a group, bits
every_size = pytest.mark.parametrize(("k", "group_size", "bits"), SIZES, ids=str)


def solved(name: str, w: Tensor, h: Tensor, bits: int, group_size: int, **options: Any) -> QuantizedWeight:
    return SOLVERS[name].run(w, h, CodebookGrid(bits), group_size, **options).weight


def levels_of(q: QuantizedWeight) -> Tensor:
    assert q.levels is not None
    return q.levels


def fitted(w: Tensor, energy: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Return the levels [N, G, L] of each group of `w` by itself."""
    grid, parts = CodebookGrid(bits), []
    for start in range(0, w.shape[1], group_size):
        columns = slice(start, start + group_size)
        parts.append(grid.fit(w[:, columns], None if energy is None else energy[columns]).levels)
    return torch.cat(parts, dim=1)  # type: ignore[arg-type]


def by_group(w: Tensor, levels: Tensor, group_size: int) -> Tensor:
    """Return the nearest codes of each group."""
    parts = w.split(group_size, dim=1)
    return torch.cat([reference.nearest_codes(part, levels[:, g]) for g, part in enumerate(parts)], dim=1)


@every_size
def test_rounding_to_nearest(k: int, group_size: int, bits: int) -> None:
    w, h = correlated(9, k)
    plain, weighted = solved("rtn", w, h, bits, group_size), solved("weighted_rtn", w, h, bits, group_size)
    assert torch.equal(levels_of(plain), fitted(w, None, bits, group_size))
    assert torch.equal(levels_of(weighted), fitted(w, floored(h.diagonal()), bits, group_size))
    for q in (plain, weighted):
        assert torch.equal(q.codes.long(), by_group(w, levels_of(q), group_size))
        assert torch.equal(q.dequantize().double(), reference.decode(q.codes, levels_of(q), group_size))
        assert (q.scales.shape, q.zeros.shape, levels_of(q).shape) == (
            (9, -(-k // group_size)),
            (9, -(-k // group_size)),
            (9, -(-k // group_size), 2**bits),
        )


@every_size
@pytest.mark.parametrize("order", ["natural", "act", "group"])
def test_gptq_is_that_of_the_textbook(k: int, group_size: int, bits: int, order: str) -> None:
    w, h = correlated(24, k)
    q = solved("gptq", w, h, bits, group_size, damp_percent=0.05, order=order, scale_search="hessian")
    expected = reference.gptq(w, h, levels_of(q), group_size, 0.05, visit(h, order, group_size))
    assert expected.clear.sum() >= 12, "too few rows are clear of ties to tell anything"
    assert torch.equal(q.codes.long()[expected.clear], expected.codes[expected.clear])


@every_size
def test_gptq_learns_levels_when_it_enters_a_group(k: int, group_size: int, bits: int) -> None:
    w, h = correlated(12, k)
    q = solved("gptq", w, h, bits, group_size, damp_percent=0.05, order="natural", scale_search="hessian")
    for group, start in enumerate(range(0, k, group_size)):
        stop = min(start + group_size, k)
        moved, energies = reference.entering(w, h, q.dequantize(), start, stop, 0.05)
        own = CodebookGrid(bits).fit(moved.float(), energies[start:stop].float()).levels
        assert own is not None
        # a cut or a rounding may fall otherwise in float32, seldom
        assert (own[:, 0] == levels_of(q)[:, group]).all(1).sum() >= 11


@every_size
def test_act_order_learns_levels_beforehand_by_energies(k: int, group_size: int, bits: int) -> None:
    w, h = correlated(12, k)
    q = solved("gptq", w, h, bits, group_size, damp_percent=0.05, order="act", scale_search="hessian")
    columns = visit(h, "act", group_size)
    _, energies = reference.entering(w[:, columns], h[columns][:, columns], torch.zeros_like(w), 0, k, 0.05)
    original = torch.empty_like(energies)
    original[columns] = energies
    own = fitted(w, original.float(), bits, group_size)
    assert (own == levels_of(q)).all(2).sum() >= own.shape[0] * own.shape[1] - 1


@every_size
def test_a_pass_of_descent_is_that_of_the_reference(k: int, group_size: int, bits: int) -> None:
    w, h = correlated(24, k)
    start = solved("rtn", w, h, bits, group_size)
    expected = reference.descend(w, h, start.codes, levels_of(start), group_size)
    assert expected.clear.sum() >= 12
    found = descend(start, w, h)
    assert torch.equal(found.codes.long()[expected.clear], expected.codes[expected.clear])
    assert torch.equal(levels_of(found), levels_of(start))


@pytest.mark.parametrize(("k", "bits"), [(48, 2), (70, 3), (70, 4)], ids=str)
def test_each_solver_gains_on_the_one_before(k: int, bits: int) -> None:
    # of few columns levels learn each one: then a sweep, which moves them, loses to rounding to nearest
    (w, h), group_size = correlated(24, k), k
    dense = damped(h, 0.01, torch.float32)
    nearest = losses(w, h, solved("rtn", w, h, bits, group_size)).sum()
    weighted = solved("weighted_rtn", w, h, bits, group_size)
    swept = solved("gptq", w, h, bits, group_size, scale_search="hessian")
    walked = solved("descent", w, h, bits, group_size)
    assert losses(w, h, weighted).sum() < nearest
    assert losses(w, h, swept).sum() < 0.95 * losses(w, h, weighted).sum()
    assert losses(w, h, walked).sum() < 0.95 * losses(w, h, weighted).sum()
    assert losses(w, dense, refine(swept, w, dense, 2)).sum() < 0.98 * losses(w, dense, swept).sum()


def test_a_diagonal_hessian_gives_nearest_levels() -> None:
    w, _ = correlated(6, 40)
    h = torch.diag(torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.1)
    plain = solved("rtn", w, h, 3, 40)
    for name in ("gptq", "descent"):
        found = solved(name, w, h, 3, 40, scale_search="none")
        assert torch.equal(found.codes, plain.codes)
        assert torch.equal(levels_of(found), levels_of(plain))


def test_rows_carry_their_levels_along() -> None:
    w, h = correlated(10, 48)
    q, other = solved("rtn", w, h, 2, 16), solved("rtn", w + 1, h, 2, 16)
    rows = torch.tensor([7, 2, 2, 9])
    assert torch.equal(select_rows(q, rows).dequantize(), q.dequantize()[rows])
    assert torch.equal(stacked([q, other]).dequantize(), torch.cat([q.dequantize(), other.dequantize()]))
    pick = torch.arange(10) % 3 == 0
    assert torch.equal(
        chosen(pick, q, other).dequantize(), torch.where(pick[:, None], q.dequantize(), other.dequantize())
    )
    taken = take(begin(q, w, h), rows).weight()
    assert torch.equal(taken.dequantize(), q.dequantize()[rows])
    assert torch.equal(levels_of(taken), levels_of(q)[rows])


def test_rows_that_refinement_finishes_early_come_back_in_their_place() -> None:
    w, h = correlated(16, 48)
    q = solved("rtn", w, h, 2, 16)
    w[::2] = q.dequantize()[::2]
    found = refine(q, w, h, 3)
    assert torch.equal(found.dequantize()[::2], w[::2])
    assert (losses(w, h, found) < losses(w, h, q))[1::2].all()
