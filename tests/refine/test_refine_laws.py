"""Laws that every refiner obeys, and `refine`, which takes them in turn."""

import gc
from dataclasses import replace

import pytest
import torch
from descent_reference import U
from hypothesis import given, settings
from hypothesis import strategies as st
from refine_cases import Problem, allowance, different_rows, losses, problem, problems, rows_of, run, same

from llmq.descent import State, begin, complete, descent, take
from llmq.planning.counting import Held
from llmq.refine import REFINERS, Refiner, refine
from llmq.refine.relevel import relevel

every_refiner = pytest.mark.parametrize("refiner", REFINERS.values(), ids=REFINERS.keys())
both_signs = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
many, few = settings(max_examples=60), settings(max_examples=25)


@every_refiner
@many
@given(case=problems())
def test_no_row_gets_worse(refiner: Refiner, case: Problem) -> None:
    q, w, h = case
    found = run(refiner, q, w, h)
    assert (losses(found, w, h) <= losses(q, w, h) + allowance(q, found, w, h)).all()


@every_refiner
@many
@given(case=problems())
def test_the_answer_is_on_the_grid_and_can_be_stored(refiner: Refiner, case: Problem) -> None:
    q, w, h = case
    found = run(refiner, q, w, h)
    assert (found.codes.dtype, found.scales.dtype, found.zeros.dtype) == (torch.uint8, torch.float32, torch.float32)
    assert found.codes.shape == q.codes.shape
    assert found.codes.max() < 2**q.grid.bits
    assert found.scales.shape == q.scales.shape
    assert found.scales.isfinite().all()
    assert found.scales.all()
    assert torch.equal(found.scales, found.scales.half().float())
    assert torch.equal(found.scales, found.scales.bfloat16().float())
    assert torch.equal(found.zeros, found.zeros.round())
    assert found.zeros.min() >= 0
    assert found.zeros.max() < 2**q.grid.bits
    assert not q.grid.symmetric or torch.equal(found.zeros, q.zeros)
    assert (found.grid, found.group_size) == (q.grid, q.group_size)


@every_refiner
@many
@given(case=problems(), first=st.sampled_from(sorted(REFINERS)))
def test_the_gradient_that_is_handed_on_is_that_of_the_answer(refiner: Refiner, case: Problem, first: str) -> None:
    q, w, h = case
    state = begin(q, w, h)
    for each in (REFINERS[first], refiner):
        state = complete(each(state))
    error = w - state.values.T
    assert torch.equal(state.values.T, state.weight().dequantize())
    # the errors at the start and the changes of both passes went into it
    reach = 3 * ((w - q.dequantize()).abs() + error.abs()).double() @ h.double().abs()
    off = state.gradient.T.double() - error.double() @ h.double()
    assert (off.abs() <= U * (4 * len(h) + 8) * reach).all()


@every_refiner
@few
@given(case=problems())
def test_rows_can_be_taken_before_the_gradient_is_completed(refiner: Refiner, case: Problem) -> None:
    q, w, h = case
    rows = torch.arange(0, len(w), 2)
    state = refiner(begin(q, w, h))
    early, late = complete(take(state, rows)), take(complete(state), rows)
    assert same(early.weight(), rows_of(state.weight(), rows))
    # the sums may run in another order
    reach = ((w - q.dequantize()).abs() + (w - state.values.T).abs())[rows].double() @ h.double().abs()
    assert ((early.gradient - late.gradient).T.abs() <= U * (4 * len(h) + 8) * reach).all()


@every_refiner
@few
@given(case=problems())
def test_two_runs_are_equal_and_arguments_untouched(refiner: Refiner, case: Problem) -> None:
    q, w, h = case
    kept = [t.clone() for t in (q.codes, q.scales, q.zeros, w, h)]
    assert same(run(refiner, q, w, h), run(refiner, q, w, h))
    assert all(torch.equal(a, b) for a, b in zip(kept, (q.codes, q.scales, q.zeros, w, h), strict=True))


@every_refiner
@pytest.mark.parametrize("n", [1, 6])
def test_layout_in_memory_does_not_matter(refiner: Refiner, n: int) -> None:
    # codes that lie K-major are untouched as well
    q, w, h = problem(n, 40, 16, 3, True, start="random", seed=7)
    other = replace(q, codes=q.codes.T.contiguous().T)
    kept = q.codes.clone()
    found = run(refiner, other, w.T.contiguous().T, h)
    assert torch.equal(other.codes, kept)
    assert different_rows(found, run(refiner, q, w, h)) == 0


@every_refiner
@few
@given(case=problems())
def test_a_power_of_four_in_the_hessian_changes_nothing(refiner: Refiner, case: Problem) -> None:
    q, w, h = case
    for factor in (4.0**-10, 4.0, 4.0**10):
        assert same(run(refiner, q, w, h), run(refiner, q, w, h * factor))


@every_refiner
@both_signs
@pytest.mark.parametrize("seed", range(3))
def test_permuting_rows_permutes_the_answer(refiner: Refiner, symmetric: bool, seed: int) -> None:
    q, w, h = problem(20, 70, 16, 3, symmetric, start="random", seed=seed)
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    assert different_rows(rows_of(run(refiner, q, w, h), rows), run(refiner, rows_of(q, rows), w[rows], h)) <= 1


@every_refiner
@both_signs
def test_rows_are_refined_as_if_alone(refiner: Refiner, symmetric: bool) -> None:
    q, w, h = problem(12, 70, 16, 3, symmetric, start="random", seed=3)
    whole = run(refiner, q, w, h)
    alone = [run(refiner, rows_of(q, torch.tensor([i])), w[i : i + 1], h) for i in range(12)]
    joined = replace(
        q,
        codes=torch.cat([a.codes for a in alone]),
        scales=torch.cat([a.scales for a in alone]),
        zeros=torch.cat([a.zeros for a in alone]),
    )
    assert different_rows(whole, joined) <= 1


@every_refiner
@both_signs
@pytest.mark.parametrize("bits", [2, 3])
def test_rounding_to_nearest_is_improved_on_correlated_inputs(refiner: Refiner, bits: int, symmetric: bool) -> None:
    q, w, h = problem(24, 64, 16, bits, symmetric, seed=4)
    # a refiner that does nothing has 1, as those of learned levels have here (test_relevel.py)
    share = 1.0 if refiner is relevel else 0.98
    assert losses(run(refiner, q, w, h), w, h).sum() <= share * losses(q, w, h).sum()


@every_refiner
def test_a_weight_on_its_grid_is_kept(refiner: Refiner) -> None:
    q, _, h = problem(6, 40, 16, 3, False, start="random", seed=5)
    assert same(run(refiner, q, q.dequantize(), h), q)


@few
@given(case=problems())
def test_no_rounds_return_the_input(case: Problem) -> None:
    q, w, h = case
    assert refine(q, w, h, 0) is q


@few
@given(case=problems())
def test_rounds_take_the_refiners_in_turn_and_never_raise_the_loss(case: Problem) -> None:
    q, w, h = case
    state, before = begin(q, w, h), q
    allowed = torch.zeros(len(w), dtype=torch.float64)
    for rounds in range(1, 5):
        for refiner in REFINERS.values():
            was, state = state, complete(refiner(state))
            allowed += allowance(was.weight(), state.weight(), w, h)
        found = refine(q, w, h, rounds)
        # fewer rows are left in later rounds, and sums may run in another order
        assert different_rows(found, state.weight()) <= 1
        assert (losses(found, w, h) <= losses(before, w, h) + 2 * allowed).all()
        before = found


def test_finished_rows_are_left_alone_and_come_back_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    q, w, h = problem(24, 40, 16, 3, False, start="random", seed=8)
    w[::3] = q.dequantize()[::3]  # finished from the start
    seen = []

    def counted(state: State) -> State:
        seen.append(state.values.shape[1])
        return descent(state)

    expected = refine(q, w, h, 2)
    monkeypatch.setitem(REFINERS, "descent", counted)
    found = refine(q, w, h, 2)
    assert seen == [24, 16]
    assert same(found, expected)
    assert same(rows_of(found, torch.arange(0, 24, 3)), rows_of(q, torch.arange(0, 24, 3)))
    assert (losses(found, w, h) < losses(q, w, h))[torch.arange(24) % 3 > 0].all()


@pytest.mark.parametrize("kind", ["full", "deficient", "dead", "none"])
@both_signs
def test_refine_stops_at_a_fixed_point(monkeypatch: pytest.MonkeyPatch, symmetric: bool, kind: str) -> None:
    q, w, h = problem(4, 40, 16, 3, symmetric, kind, "random", seed=6)
    calls = 0

    def counted(state: State) -> State:
        nonlocal calls
        calls += 1
        return descent(state)

    monkeypatch.setitem(REFINERS, "descent", counted)
    end = refine(q, w, h, 500)
    assert calls < 100
    calls = 0
    assert same(refine(end, w, h, 500), end)
    assert calls == 1


@every_refiner
def test_what_is_given_up_is_free_at_once(refiner: Refiner) -> None:
    # no cycle of references: those hold their matrices until the collector happens to look
    gc.collect()
    gc.disable()
    try:
        with Held() as live:
            state = begin(*problem(24, 64, 16, 3, symmetric=False))
            before = live.now
            found = refiner(state).weight()
            kept = sum(t.nbytes for t in (found.codes, found.scales, found.zeros))
            assert live.now - before <= kept
    finally:
        gc.enable()
