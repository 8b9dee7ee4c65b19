"""Relevel against least squares and plain conjugate gradients in float64, and its laws."""

from __future__ import annotations

from importlib import import_module

import codebook_reference as reference
import pytest
import torch
from descent_reference import U
from hypothesis import given, settings
from hypothesis import strategies as st
from refine_cases import Problem, allowance, losses, problem
from torch import Tensor

from llmq.descent import begin, complete, descent
from llmq.grids.codebook import CodebookGrid
from llmq.grids.level_bytes import LARGEST, from_bytes, to_bytes
from llmq.refine import REFINERS, refine
from llmq.refine.relevel import relevel
from llmq.solvers.rtn import rtn
from llmq.types import QuantizedWeight
from llmq.weights import select_rows

module = import_module("llmq.refine.relevel")  # the name is that of the function, too

many, few = settings(max_examples=25), settings(max_examples=10)


def learned(
    n: int, k: int, group_size: int, bits: int, kind: str = "full", start: str = "rtn", seed: int = 0
) -> Problem:
    """Return (q, w, h) with levels learned from other weights, which may be moved, and codes of `start`."""
    _, w, h = problem(n, k, group_size, 4, True, kind, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    grid, size = CodebookGrid(bits), min(group_size, k)
    q = rtn(w + 0.3 * torch.randn(n, k, generator=draw), None, grid, size).weight
    codes = q.codes
    if start == "random":
        codes = torch.randint(0, 2**bits, (n, k), generator=draw, dtype=torch.uint8)
    assert q.levels is not None
    values = reference.decode(codes, q.levels, size).float()  # equal levels have one code
    at = [grid.encode(part, place) for part, place in zip(values.T.split(size), _placements(q), strict=True)]
    return QuantizedWeight(torch.cat(at).T.contiguous(), q.scales, q.zeros, grid, size, q.levels), w, h


def _placements(q: QuantizedWeight) -> list:  # type: ignore[type-arg]
    return [
        place for _, place in begin(q, torch.zeros_like(q.codes).float(), torch.zeros(2 * [q.codes.shape[1]])).groups()
    ]


def cases() -> st.SearchStrategy[Problem]:
    return st.builds(
        learned,
        n=st.integers(1, 5),
        k=st.integers(1, 70),
        group_size=st.sampled_from([1, 7, 16, 32, 70]),
        bits=st.sampled_from([2, 3, 4]),
        kind=st.sampled_from(["full", "deficient", "dead", "none"]),
        start=st.sampled_from(["rtn", "random"]),
        seed=st.integers(0, 10**6),
    )


def places_of(q: QuantizedWeight) -> list[Tensor]:
    """Return P of each row."""
    assert q.levels is not None
    return [reference.places(codes, q.levels.shape[1], q.levels.shape[2], q.group_size) for codes in q.codes]


def found_by(q: QuantizedWeight, w: Tensor, h: Tensor) -> Tensor:
    """Return the levels that are found before they are rounded, [N, G·L]."""
    state = begin(q, w, h)
    assert state.levels is not None
    levels = state.levels.transpose(1, 2) + module._way(state, q.codes.T.contiguous())
    return levels.flatten(0, 1).T


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    assert a.levels is not None
    assert b.levels is not None
    return torch.equal(a.codes, b.codes) and torch.equal(a.levels, b.levels)


SIZES = [(24, 24, 2), (70, 70, 3), (70, 16, 2), (130, 130, 4), (65, 32, 3)]
every_size = pytest.mark.parametrize(("k", "group_size", "bits"), SIZES, ids=str)


@every_size
@pytest.mark.parametrize("kind", ["full", "dead", "none"])
@pytest.mark.parametrize("start", ["rtn", "random"])
def test_levels_are_those_of_plain_conjugate_gradients(
    k: int, group_size: int, bits: int, kind: str, start: str
) -> None:
    q, w, h = learned(5, k, group_size, bits, kind, start, seed=k)
    assert q.levels is not None
    for row, p, found in zip(range(5), places_of(q), found_by(q, w, h), strict=True):
        expected = reference.conjugate_gradients(p, q.levels[row].flatten(), w[row], h, module._STEPS)
        # sums of K² products in float32, in three steps, whose factors are quotients of such sums
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@every_size
def test_with_a_step_for_each_level_they_are_least_squares(
    monkeypatch: pytest.MonkeyPatch, k: int, group_size: int, bits: int
) -> None:
    q, w, h = learned(4, k, group_size, bits, start="random", seed=k)
    monkeypatch.setattr(module, "_STEPS", 3 * 2**bits * -(-k // group_size))
    assert q.levels is not None
    for row, p, found in zip(range(4), places_of(q), found_by(q, w, h), strict=True):
        used = p.sum(0) > 0
        expected = reference.least_squares(p, w[row], h)
        torch.testing.assert_close(found.double()[used], expected[used], rtol=5e-3, atol=5e-3)
        assert torch.equal(found[~used], q.levels[row].flatten()[~used])


@every_size
@pytest.mark.parametrize("start", ["rtn", "random"])
def test_few_steps_gain_nearly_what_least_squares_does(k: int, group_size: int, bits: int, start: str) -> None:
    # rounded levels keep 70 % and more of what there is to gain here from levels that are not right
    q, w, h = learned(12, k, group_size, bits, start=start, seed=k)
    before, after = losses(q, w, h).sum(), losses(relevel(begin(q, w, h)).weight(), w, h).sum()
    least = 0.0
    for row, p in enumerate(places_of(q)):
        e = w[row].double() - p @ reference.least_squares(p, w[row], h)
        least += float(e @ h.double() @ e)
    assert before - after > 0.6 * (before - least)


@many
@given(case=cases())
def test_no_row_gets_worse_and_codes_stay(case: Problem) -> None:
    q, w, h = case
    found = relevel(begin(q, w, h)).weight()
    assert (losses(found, w, h) <= losses(q, w, h) + allowance(q, found, w, h)).all()
    # levels that meet become one, so that codes may fall; equal codes remain equal
    assert found.codes.shape == q.codes.shape
    for row in range(len(w)):
        for start in range(0, w.shape[1], q.group_size):
            old, new = (t.codes[row, start : start + q.group_size].int() for t in (q, found))
            pairs = {(int(a), int(b)) for a, b in zip(old, new, strict=True)}
            assert len(pairs) == len(set(old.tolist()))


@many
@given(case=cases())
def test_the_answer_can_be_stored_and_the_state_fits_it(case: Problem) -> None:
    q, w, h = case
    state = relevel(begin(q, w, h))
    found = state.weight()
    assert found.levels is not None
    assert torch.equal(from_bytes(to_bytes(found.levels)), found.levels)
    assert (found.levels.diff(dim=2) >= 0).all()
    assert (found.scales == 1).all()
    assert (found.grid, found.group_size) == (q.grid, q.group_size)
    assert state.unheard is None
    assert torch.equal(state.values.T, found.dequantize())
    error = w - state.values.T
    reach = 2 * ((w - q.dequantize()).abs() + error.abs()).double() @ h.double().abs()
    off = state.gradient.T.double() - error.double() @ h.double()
    assert (off.abs() <= U * (4 * len(h) + 8) * reach).all()


@few
@given(case=cases())
def test_turns_with_descent_never_raise_the_loss(case: Problem) -> None:
    q, w, h = case
    state, before = begin(q, w, h), q
    for _ in range(3):
        for refiner in (relevel, descent):
            was, state = state.weight(), complete(refiner(state))
            now = state.weight()
            assert (losses(now, w, h) <= losses(was, w, h) + allowance(was, now, w, h)).all()
    rounds = refine(q, w, h, 3)
    assert losses(rounds, w, h).sum() <= losses(before, w, h).sum() * (1 + 1e-4) + 1e-6


@few
@given(case=cases())
def test_a_power_of_four_in_the_hessian_changes_nothing(case: Problem) -> None:
    q, w, h = case
    found = relevel(begin(q, w, h)).weight()
    for factor in (4.0**-10, 4.0**10):
        assert same(relevel(begin(q, w, h * factor)).weight(), found)


@few
@given(case=cases())
def test_two_runs_are_equal_and_arguments_untouched(case: Problem) -> None:
    q, w, h = case
    state = begin(q, w, h)
    parts = ("values", "scales", "zeros", "gradient", "levels")
    kept = [getattr(state, name).clone() for name in parts]
    assert same(relevel(state).weight(), relevel(state).weight())
    assert all(torch.equal(a, getattr(state, name)) for a, name in zip(kept, parts, strict=True))


@pytest.mark.parametrize("columns", [1, 7, 1000])
def test_how_many_columns_are_looked_at_together_changes_nothing(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    q, w, h = learned(6, 70, 32, 3, seed=1)
    usual = relevel(begin(q, w, h)).weight()
    monkeypatch.setattr(module, "_COLUMNS", columns)
    assert same(relevel(begin(q, w, h)).weight(), usual)


def test_rows_are_refined_as_if_alone() -> None:
    q, w, h = learned(6, 70, 32, 3, seed=2)
    whole = refine(q, w, h, 2)
    for row in range(6):
        alone = refine(select_rows(q, slice(row, row + 1)), w[row : row + 1], h, 2)
        assert losses(alone, w[row : row + 1], h).item() == pytest.approx(losses(whole, w, h)[row].item(), rel=1e-3)


def test_a_weight_on_its_levels_is_kept() -> None:
    q, _, h = learned(6, 70, 32, 3, seed=3)
    state = begin(q, q.dequantize(), h)
    assert same(relevel(state).weight(), q)
    assert same(refine(q, q.dequantize(), h, 2), q)


def test_a_row_may_take_what_others_refuse() -> None:
    q, w, h = learned(8, 64, 64, 3, seed=4)
    for _ in range(20):
        q = relevel(begin(q, w, h)).weight()
    off = w.clone()
    off[::2] *= 1.3
    found = relevel(begin(q, off, h)).weight()
    assert q.levels is not None
    assert found.levels is not None
    moved = (found.levels != q.levels).flatten(1).any(1)
    assert moved[::2].all()
    assert not moved[1::2].any()


def test_levels_that_no_input_meets_stay() -> None:
    q, w, h = learned(4, 48, 16, 2, seed=5)
    h[16:32], h[:, 16:32] = 0.0, 0.0
    found = relevel(begin(q, w, h)).weight()
    assert q.levels is not None
    assert found.levels is not None
    assert torch.equal(found.levels[:, 1], q.levels[:, 1])
    assert not torch.equal(found.levels[:, 0], q.levels[:, 0])


def test_levels_stay_below_the_largest_that_there_can_be() -> None:
    q, w, h = learned(4, 32, 32, 3, seed=6)
    found = relevel(begin(q, 1e6 * w, h)).weight()
    assert found.levels is not None
    assert found.levels.abs().max() == LARGEST


def test_a_grid_without_learned_levels_is_left_alone() -> None:
    state = begin(*problem(4, 32, 16, 3, False))
    assert relevel(state) is state
    assert REFINERS["relevel"] is relevel
