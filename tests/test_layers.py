"""One stage, from Hessians to codes: what is solved, what held-out tokens decide, and what the report says of it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import K, linear, tokens
from tiny_models import make_llama
from torch import Tensor

from llmq import layers, preflight
from llmq.families import Linear
from llmq.grids.uniform import UniformGrid
from llmq.hessian import HessianSum
from llmq.layers import Measure, solve_stage
from llmq.preflight import Job
from llmq.problems import Problem, measure
from llmq.recipe import Recipe
from llmq.refine import refine
from llmq.report import LayerReport
from llmq.solvers import Solver
from llmq.solvers.gptq import gptq
from llmq.solvers.rtn import rtn
from llmq.solvers.shift import shifted
from llmq.stream import Stage
from llmq.types import QuantizedWeight, Solution

CPU = torch.device("cpu")
GROUP = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("layers") / "model")


@pytest.fixture
def job(folder: Path) -> Job:
    return with_recipe(folder)


def with_recipe(folder: Path, **fields: Any) -> Job:
    pinned: dict[str, Any] = {
        "group_size": GROUP, "bits": 3, "sym": False, "order": "act", "scale_search": "hessian", "damp_percent": 0.01,
        "refine_rounds": 2, "shift": 0.0,
    }  # fmt: skip
    return preflight.prepare(folder, Recipe(**{**pinned, **fields}))


def with_recipe_of(job: Job, **fields: Any) -> Job:
    return replace(job, recipe=job.recipe.model_copy(update=fields))


def summed(x: Tensor, reference: Tensor | None = None, weights: Tensor | None = None) -> HessianSum:
    total = HessianSum(K, CPU, paired=reference is not None)
    total.add_(x, None, weights, reference)
    return total


def whole(*linears: Linear) -> list[tuple[Linear, slice]]:
    return [(one, slice(0, one.shape[0])) for one in linears]


def problem_of(
    rows: list[tuple[Linear, slice]],
    train: Tensor,
    held_out: Tensor | None = None,
    drift: float | None = None,
) -> Problem:
    """Return the problem with these inputs; with `drift`, paired with others that are off by so much."""

    def moments(x: Tensor) -> HessianSum:
        if drift is None:
            return summed(x)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
        return summed(x, x + drift * (0.5 * x.roll(1, dims=1) + noise))

    judge = None if held_out is None else moments(held_out)
    return Problem(rows, moments(train), judge, paired=drift is not None)


def by_hand(job: Job, w: Tensor, h: Tensor, damp_percent: float = 0.01) -> QuantizedWeight:
    """Return what the default solver and the refiners make of `w`, nothing taken back."""
    recipe = job.recipe
    start = gptq(
        w, h, job.grid, GROUP, damp_percent=damp_percent, order=recipe.order, scale_search=recipe.scale_search
    ).weight
    return refine(start, w, h + damp_percent * h.diagonal().mean() * torch.eye(len(h)), recipe.refine_rounds)


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)
    assert torch.equal(a.zeros, b.zeros)


def loss(w: Tensor, q: QuantizedWeight, x: Tensor) -> float:
    return 2 * float(((w.double() - q.dequantize().double()) @ x.double().T).square().sum()) / len(x)


# --- solving


def test_slices_are_solved_with_their_own_hessians_and_joined_in_order(job: Job) -> None:
    a, b = linear("a", 6, seed=1), linear("b", 4, seed=2)
    x = [tokens(2000, seed) for seed in range(4)]
    cut = [(a, slice(0, 3)), (a, slice(3, 6)), (b, slice(0, 2)), (b, slice(2, 4))]
    found = solve_stage(job, 7, [problem_of([rows], x[i]) for i, rows in enumerate(cut)])
    assert [(layer.linear.name, layer.report.block) for layer in found] == [("a", 7), ("b", 7)]
    for layer, parts in zip(found, (cut[:2], cut[2:]), strict=True):
        alone = [by_hand(job, one.weight[rows], summed(x[cut.index((one, rows))]).mean("x")) for one, rows in parts]
        assert torch.equal(layer.weight.codes, torch.cat([q.codes for q in alone]))
        assert torch.equal(layer.weight.scales, torch.cat([q.scales for q in alone]))
        assert torch.equal(layer.weight.zeros, torch.cat([q.zeros for q in alone]))
        sums = [
            loss(one.weight[rows], q, x[cut.index((one, rows))]) for (one, rows), q in zip(parts, alone, strict=True)
        ]
        assert layer.report.loss == pytest.approx(sum(sums), rel=1e-4)


def test_linears_of_one_stage_are_solved_as_if_alone(job: Job) -> None:
    a, b = linear("a", 6, seed=1), linear("b", 4, seed=2)
    x = tokens(2000)
    found = solve_stage(job, 0, [problem_of(whole(a, b), x)])
    for layer, one in zip(found, (a, b), strict=True):
        assert layer.linear is one
        assert_same(layer.weight, by_hand(job, one.weight, summed(x).mean("x")))


def test_a_solver_without_data_gets_none(folder: Path) -> None:
    a = linear("a", 4)
    (found,) = solve_stage(with_recipe(folder, method="rtn"), 0, measure(None, Stage([a], 0), None, {}))
    assert_same(found.weight, rtn(a.weight, None, UniformGrid(3, False), GROUP).weight)
    report = found.report
    assert (report.tokens, report.loss, report.relative_loss, report.held_out_loss) == (0, None, None, None)
    assert (report.damp_percent, report.undone) == (0, ())


@dataclass
class Spy:
    """A solver that rounds to nearest on a grid that `coarse` says, and keeps what it was given."""

    coarse: dict[float, float] = field(default_factory=dict)  # damping -> by how much scales are blown up
    given: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)

    def __call__(self, w: Tensor, h: Tensor, grid: Any, group_size: int, *, damp_percent: float) -> Solution:
        self.given.append((w, h, damp_percent))
        found = rtn(w, None, grid, group_size).weight
        factor = self.coarse.get(round(damp_percent, 6), 1.0)
        scales = grid.storable(found.scales * factor)
        return Solution(replace(found, scales=scales), damp_percent)


def spied(job: Job, spy: Spy) -> Job:
    solver = Solver(spy, calibrated=True, options=("damp_percent",))
    return replace(job, solver=solver, recipe=job.recipe.model_copy(update={"refine_rounds": 0}))


# --- the shift


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_target_answers_for_errors_in_front(job: Job, alpha: float) -> None:
    a, spy = linear("a", 6), Spy()
    problem = problem_of(whole(a), tokens(2000), drift=0.2)
    solve_stage(spied(with_recipe_of(job, shift=alpha), spy), 0, [problem])
    ((target, h, _),) = spy.given
    assert problem.train is not None
    d, damped = problem.train.cross("x").double(), h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(K)
    expected = a.weight.double() + alpha * a.weight.double() @ d @ torch.linalg.inv(damped)
    torch.testing.assert_close(target.double(), expected, rtol=1e-5, atol=1e-5)
    assert (target - a.weight).abs().max() > 0.01


def test_inputs_that_are_right_move_nothing(job: Job) -> None:
    a, x = linear("a", 6), tokens(2000)
    plain = solve_stage(job, 0, [problem_of(whole(a), x)])[0]
    shift = solve_stage(with_recipe_of(job, shift=1.0), 0, [problem_of(whole(a), x, drift=0.0)])[0]
    assert_same(plain.weight, shift.weight)


def test_refinement_aims_at_the_shifted_weight_too(job: Job) -> None:
    a, x = linear("a", 6), tokens(2000)
    job = with_recipe_of(job, shift=0.7)
    problem = problem_of(whole(a), x, drift=0.2)
    assert problem.train is not None
    h = problem.train.mean("x")
    target = shifted(a.weight, h, problem.train.cross("x"), alpha=0.7, damp_percent=0.01)
    assert_same(solve_stage(job, 0, [problem])[0].weight, by_hand(job, target, h))


@given(seed=st.integers(0, 2**31), drift=st.sampled_from([0.0, 0.1, 1.0]))
def test_measure_is_the_squared_error_against_the_original_up_to_a_constant(seed: int, drift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, k, t = 5, 12, 40
    w = torch.randn(n, k, generator=generator, dtype=torch.float64)
    x = torch.randn(k, t, generator=generator, dtype=torch.float64)
    right = x + drift * torch.randn(k, t, generator=generator, dtype=torch.float64)
    rounded = [rtn(w.float() + s, None, UniformGrid(3, False), 5).weight for s in (0.0, 0.3)]
    pull = None if drift == 0 else w @ (2 * (right - x) @ x.T / t)
    found = [Measure(w, 2 * x @ x.T / t, pull).rows(q) for q in rounded]
    brute = [2 * (w @ right - q.dequantize().double() @ x).square().sum(1) / t for q in rounded]
    constant = 2 * (w @ (right - x)).square().sum(1) / t
    for one, other in zip(found, brute, strict=True):
        torch.testing.assert_close(one, other - constant, rtol=1e-9, atol=1e-9)


# --- the guard


@pytest.mark.parametrize("losing", [(), ("a",), ("b",), ("a", "b")], ids=str)
def test_refinement_is_taken_back_for_the_linears_that_lose_by_it(
    job: Job, losing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = linear("a", 6, seed=1), linear("b", 4, seed=2)
    start = slice(0, 6), slice(6, 10)

    def worse(q: QuantizedWeight, w: Tensor, h: Tensor, rounds: int) -> QuantizedWeight:
        found = refine(q, w, h, 2)
        scales = found.scales.clone()
        for name, rows in zip("ab", start, strict=True):
            if name in losing:
                scales[rows] = q.grid.storable(q.scales[rows] * 1.5)
        return replace(found, scales=scales)

    x, judges = tokens(2000), tokens(500, seed=5)
    h = summed(x).mean("x")
    w = torch.cat([a.weight, b.weight])
    before = gptq(w, h, job.grid, GROUP, order="act", scale_search="hessian").weight
    after = refine(before, w, h + 0.01 * h.diagonal().mean() * torch.eye(K), 2)
    monkeypatch.setattr(layers, "refine", worse)
    for held_out in (judges, None):
        found = solve_stage(job, 0, [problem_of(whole(a, b), x, held_out)])
        for layer, rows in zip(found, start, strict=True):
            lost = layer.linear.name in losing
            if held_out is None:
                assert layer.report.undone == ()
                assert not lost or not torch.equal(layer.weight.scales, before.scales[rows])
                continue
            kept = before if lost else after
            assert torch.equal(layer.weight.codes, kept.codes[rows])
            assert torch.equal(layer.weight.scales, kept.scales[rows])
            assert torch.equal(layer.weight.zeros, kept.zeros[rows])
            assert layer.report.undone == (("refinement",) if lost else ())


def test_a_shift_that_held_out_tokens_speak_against_is_taken_back(job: Job) -> None:
    a, x = linear("a", 6), tokens(2000)
    plain = solve_stage(job, 0, [problem_of(whole(a), x, tokens(500, seed=5))])[0]
    job = with_recipe_of(job, shift=1.0)
    train = problem_of(whole(a), x, drift=0.3)
    good = replace(train, held_out=problem_of(whole(a), tokens(500, seed=5), drift=0.3).train)
    bad = replace(train, held_out=problem_of(whole(a), tokens(500, seed=5), drift=-0.3).train)
    kept, undone = solve_stage(job, 0, [good])[0], solve_stage(job, 0, [bad])[0]
    assert kept.report.undone == ()
    assert kept.report.relative_loss != plain.report.relative_loss
    assert undone.report.undone == ("shift",)
    assert_same(undone.weight, plain.weight)


def test_what_is_undone_is_what_became_of_the_weight_that_stays(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refinement that was bad only on shifted weights is not undone once the shift is, and the other way round."""
    a, x = linear("a", 6), tokens(2000)

    def run(bad_on_shifted: bool) -> LayerReport:
        def sometimes(q: QuantizedWeight, w: Tensor, h: Tensor, rounds: int) -> QuantizedWeight:
            if (not torch.equal(w, a.weight)) == bad_on_shifted:
                return replace(q, scales=q.grid.storable(q.scales * 1.5))
            return refine(q, w, h, rounds)

        monkeypatch.setattr(layers, "refine", sometimes)
        train = problem_of(whole(a), x, drift=0.3)
        bad = replace(train, held_out=problem_of(whole(a), tokens(500, seed=5), drift=-0.3).train)
        return solve_stage(with_recipe_of(job, shift=1.0), 0, [bad])[0].report

    assert run(bad_on_shifted=True).undone == ("shift",)
    assert run(bad_on_shifted=False).undone == ("refinement", "shift")


# --- damping


@pytest.mark.parametrize(
    ("count", "judged", "damp", "tried"),
    [
        (16 * K - 1, True, 0.01, [0.01, 0.03, 0.1]),
        (16 * K, True, 0.01, [0.01]),
        (16 * K - 1, False, 0.01, [0.01]),
        (100, True, 0.2, [0.2, 0.6]),
        (100, True, 0.05, [0.05, 0.15, 0.5]),
    ],
)
def test_damping_is_chosen_only_where_tokens_are_few(
    job: Job, count: int, judged: bool, damp: float, tried: list[float]
) -> None:
    spy = Spy()
    problem = problem_of(whole(linear("a", 6)), tokens(count), tokens(100, seed=5) if judged else None)
    solve_stage(spied(with_recipe_of(job, damp_percent=damp), spy), 0, [problem])
    assert [given[2] for given in spy.given] == pytest.approx(tried)


@pytest.mark.parametrize("best", [0.01, 0.03, 0.1])
def test_the_damping_with_the_least_held_out_loss_is_taken(job: Job, best: float) -> None:
    a = linear("a", 6)
    spy = Spy({damp: 1.0 if damp == best else 1.5 for damp in (0.01, 0.03, 0.1)})
    (found,) = solve_stage(spied(job, spy), 0, [problem_of(whole(a), tokens(200), tokens(100, seed=5))])
    assert_same(found.weight, rtn(a.weight, None, job.grid, GROUP).weight)
    assert found.report.damp_percent == pytest.approx(best)


def test_damping_is_chosen_by_held_out_tokens_and_not_by_the_others(job: Job) -> None:
    a = linear("a", 6)
    x, judges = tokens(K // 2), tokens(2000, seed=5)  # fewer tokens than inputs: the training loss misleads
    (found,) = solve_stage(job, 0, [problem_of(whole(a), x, judges)])
    h = summed(x).mean("x")
    attempts = {damp: by_hand(job, a.weight, h, damp) for damp in (0.01, 0.03, 0.1)}
    held_out = {damp: loss(a.weight, q, judges) for damp, q in attempts.items()}
    train = {damp: loss(a.weight, q, x) for damp, q in attempts.items()}
    best = min(held_out, key=held_out.__getitem__)
    assert best != min(train, key=train.__getitem__)
    assert found.report.damp_percent == pytest.approx(best)


# --- the report


@pytest.mark.parametrize("drift", [None, 0.2])
def test_the_report_is_true(job: Job, drift: float | None) -> None:
    a, b = linear("a", 6, seed=1), linear("b", 4, seed=2)
    x, judges = tokens(1999), tokens(500, seed=5)
    x = torch.cat([x, torch.full((1, K), float("nan"))])
    job = with_recipe_of(job, shift=0.0 if drift is None else 0.5)
    found = solve_stage(job, 3, [problem_of(whole(a, b), x, judges, drift)])
    for layer, one in zip(found, (a, b), strict=True):
        w, report, q = one.weight, layer.report, layer.weight
        assert (report.name, report.block, report.out_features, report.in_features) == (one.name, 3, *w.shape)
        assert (report.tokens, report.dropped_tokens) == (1999, 1)
        assert report.loss == pytest.approx(loss(w, q, x[:-1]), rel=1e-4)
        zero = replace(q, codes=torch.zeros_like(q.codes), zeros=torch.zeros_like(q.zeros))
        assert report.relative_loss == pytest.approx(loss(w, q, x[:-1]) / loss(w, zero, x[:-1]), rel=1e-4)
        assert report.held_out_loss == pytest.approx(loss(w, q, judges) / loss(w, zero, judges), rel=1e-4)
        assert report.weight_error == pytest.approx(float((w - q.dequantize()).norm() / w.norm()), rel=1e-5)
        assert (report.damp_percent, report.remedies) == (0.01, ())


def test_the_damping_of_the_report_is_that_of_the_weight(job: Job) -> None:
    """Where the shift is undone, the weight is the recipe's own attempt, whatever damping suited the shift."""
    a = linear("a", 6)
    spy = Spy({0.01: 1.0, 0.03: 1.0, 0.1: 1.0})
    train = problem_of(whole(a), tokens(200), drift=2.0)
    bad = replace(train, held_out=problem_of(whole(a), tokens(500, seed=5), drift=-2.0).train)
    (found,) = solve_stage(spied(with_recipe_of(job, shift=1.0), spy), 0, [bad])
    assert found.report.undone == ("shift",)
    used = [damp for w, _, damp in spy.given if torch.equal(w, a.weight)]
    assert used == [0.01]
    assert found.report.damp_percent == 0.01
