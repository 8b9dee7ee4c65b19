"""One stage of linears, from the moments of its inputs to codes: what is solved, and what is taken back.

A tenth of the tokens enters no Hessian; whatever improves a layer on the others must not make it worse on those, or it
is undone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmq.errors import SolverError
from llmq.families import Linear
from llmq.grids.vq import VectorGrid, VectorWeight
from llmq.preflight import Job
from llmq.problems import Problem
from llmq.ranks import ALONE
from llmq.refine import refine
from llmq.report import STARVED, LayerReport
from llmq.solvers.shift import shifted
from llmq.solvers.vectors import solvers_of
from llmq.transforms import magr
from llmq.types import QuantizedWeight, Solution
from llmq.vectors import refining
from llmq.weights import chosen, select_rows, stacked

# Below so many tokens per input, stronger damping is tried too and the best taken by the loss on held-out tokens.
_FEW_TOKENS = 16
_STRONGER_DAMPING = (3.0, 10.0)


@dataclass(frozen=True)
class Layer:
    """A linear, solved."""

    linear: Linear
    weight: QuantizedWeight
    report: LayerReport


@dataclass
class _Piece:
    """Rows of one linear, solved, and what they lost."""

    linear: str
    weight: QuantizedWeight
    damp_percent: float
    remedies: tuple[str, ...]
    undone: list[str]
    routed: int | None = None
    tokens: tuple[int, int] = (0, 0)  # used, dropped
    train: tuple[float, float] | None = None  # loss, energy
    held_out: tuple[float, float] | None = None


@dataclass(frozen=True)
class Measure:
    """The squared output error that quantized rows of weights `w` make, against the outputs of the original model."""

    w: Tensor  # [N, K]
    h: Tensor  # [K, K]
    pull: Tensor | None  # W D [N, K]: what the inputs being off adds; None where they count as right

    def rows(self, q: QuantizedWeight) -> Tensor:
        """Return the loss of each row, up to what no Q changes: ``e H eᵀ + 2 e·(w D)``, [N]."""
        error = self.w - q.dequantize()
        slope = error @ self.h
        if self.pull is not None:
            slope += 2 * self.pull
        return (slope * error).sum(dim=1)

    def loss_and_energy(self, q: QuantizedWeight, rows: slice) -> tuple[float, float]:
        """Return ``tr(E H Eᵀ)`` of `q`, which is these rows, and ``tr(W H Wᵀ)``."""
        w = self.w[rows]
        error = w - q.dequantize()
        return float(((error @ self.h) * error).sum()), float(((w @ self.h) * w).sum())


def solve_stage(job: Job, block: int, problems: Iterable[Problem]) -> list[Layer]:
    """Return the solved linears of one stage, in its order.

    Raises:
        SolverError: a Hessian holds NaN or infinity, or a scale does not fit its dtype.
        CalibrationError: no token arrived, or too many of them were not finite.
    """
    linears: dict[str, Linear] = {}
    pieces: dict[int, list[_Piece]] = {}  # by number of the problem
    owned: dict[int, list[_Piece]] = {}
    dealt = False
    for number, problem in enumerate(problems):
        linears |= {linear.name: linear for linear, _ in problem.rows}
        dealt |= problem.owner is not None
        if problem.owner is None:
            pieces[number] = _solve(job, problem)
        elif problem.owner == job.ranks.rank:
            owned[number] = _solve(replace(job, ranks=ALONE), problem)
    if dealt:
        for found in job.ranks.gather(owned):
            pieces |= found
    found_of: dict[str, list[_Piece]] = {}
    for number in sorted(pieces):
        for piece in pieces[number]:
            found_of.setdefault(piece.linear, []).append(piece)
    return [_join(block, linear, found_of[name]) for name, linear in linears.items()]


def _solve(job: Job, problem: Problem) -> list[_Piece]:
    """Return the pieces of a problem, in the order of its rows; errors name its first linear."""
    if STARVED in problem.remedies:
        plain = job.recipe.model_copy(update={"shift": 0.0, "refine_rounds": 0, "magr": 0.0})
        job = replace(job, recipe=plain, solver=solvers_of(job.grid)["weighted_rtn"])
    # rows that share a codebook are those of one linear
    parts = [[row] for row in problem.rows] if isinstance(job.grid, VectorGrid) else [problem.rows]
    try:
        return [
            piece
            for part in (replace(problem, rows=rows) for rows in parts)
            for piece in _pieces(job, part, part.weight())
        ]
    except SolverError as error:
        raise SolverError(f"{problem.name}: {error}") from error


def _pieces(job: Job, problem: Problem, w: Tensor) -> list[_Piece]:
    """Return the solved rows of stacked weights `w` [N, K], linear by linear, with the losses of each."""
    if problem.train is None:
        solution = job.solver.run(w, None, job.grid.adapted(w), job.spec.group_columns(w.shape[1]))
        return _split(problem, [solution] * len(problem.rows), solution.weight, [[] for _ in problem.rows])
    h = problem.train.mean(problem.name)
    job = replace(job, grid=job.grid.adapted(w))
    judge = None
    if problem.held_out is not None and problem.held_out.tokens:
        pull = w @ problem.held_out.cross(problem.name) if problem.paired else None
        if problem.routed is None and not isinstance(job.grid, VectorGrid):  # experts share their sums, linears too
            problem.held_out.drop_cross()
        judge = Measure(w, problem.held_out.mean(problem.name), pull)
    solutions, result, undone = _judged(job, problem, w, h, judge)
    pieces = _split(problem, solutions, result, undone)
    own = Measure(w, h, None)
    fair = None if judge is None else Measure(w, judge.h, None)
    start = 0
    for piece in pieces:
        rows = slice(start, start + len(piece.weight.codes))
        piece.tokens = problem.train.tokens, problem.train.dropped
        piece.routed, piece.remedies = problem.routed, (*problem.remedies, *piece.remedies)
        piece.train = own.loss_and_energy(piece.weight, rows)
        piece.held_out = None if fair is None else fair.loss_and_energy(piece.weight, rows)
        start = rows.stop
    return pieces


def _judged(
    job: Job, problem: Problem, w: Tensor, h: Tensor, judge: Measure | None
) -> tuple[list[Solution], QuantizedWeight, list[list[str]]]:
    """Return each linear's solution, the rows of all, and per linear the stages that `judge` has undone."""
    assert problem.train is not None, "what needs no data needs no judge"
    cross = problem.train.cross(problem.name) if problem.paired else None
    solution, result, shifted_away = _best_damping(job, w, h, cross, problem.train.tokens, judge)
    solutions = [solution] * len(problem.rows)
    undone: list[list[str]] = [[] for _ in problem.rows]
    if judge is None:
        return solutions, result, undone
    result = _guard(judge, problem, solution.weight, result, "refinement", undone)
    if not shifted_away:
        return solutions, result, undone
    plain, steady, _ = _attempt(job, w, h, None, job.recipe.damp_percent)
    without: list[list[str]] = [[] for _ in problem.rows]
    steady = _guard(judge, problem, plain.weight, steady, "refinement", without)
    back: list[list[str]] = [[] for _ in problem.rows]
    result = _guard(judge, problem, steady, result, "shift", back)
    for i, names in enumerate(back):
        if names:  # what is reported is what became of the weight that stays
            undone[i], solutions[i] = [*without[i], *names], plain
    return solutions, result, undone


def _split(
    problem: Problem, solutions: list[Solution], whole: QuantizedWeight, undone: list[list[str]]
) -> list[_Piece]:
    pieces, start = [], 0
    for (linear, own), solution, names in zip(problem.rows, solutions, undone, strict=True):
        part = select_rows(whole, slice(start, start + own.stop - own.start))
        start += len(part.codes)
        pieces.append(_Piece(linear.name, part, solution.damp_percent, solution.remedies, names))
    return pieces


def _join(block: int, linear: Linear, pieces: list[_Piece]) -> Layer:
    """Return the layer whose rows `pieces` are; its module still holds the original weight."""
    first = pieces[0]
    whole = stacked([piece.weight for piece in pieces])
    loss, relative = _relative([piece.train for piece in pieces])
    weight = linear.weight.float()
    norm = float(weight.norm())
    report = LayerReport(
        linear.name,
        block,
        *linear.shape,
        *first.tokens,
        loss,
        relative,
        _relative([piece.held_out for piece in pieces])[1],
        float((weight - whole.dequantize()).norm()) / norm if norm else 0.0,
        max(piece.damp_percent for piece in pieces),
        tuple(dict.fromkeys(remedy for piece in pieces for remedy in piece.remedies)),
        tuple(dict.fromkeys(name for piece in pieces for name in piece.undone)),
        first.routed,
    )
    return Layer(linear, whole, report)


def _relative(parts: list[tuple[float, float] | None]) -> tuple[float | None, float | None]:
    """Return the summed loss, and its share of the summed energy."""
    known = [part for part in parts if part is not None]
    if not known:
        return None, None
    loss, energy = (sum(values) for values in zip(*known, strict=True))
    return loss, loss / energy if energy else 0.0


def _best_damping(
    job: Job, w: Tensor, h: Tensor, cross: Tensor | None, tokens: int, judge: Measure | None
) -> tuple[Solution, QuantizedWeight, bool]:
    """Return the attempt whose damping does best on held-out tokens; the recipe's own where tokens are many."""
    first = _attempt(job, w, h, cross, job.recipe.damp_percent)
    if judge is None or "damp_percent" not in job.solver.options or tokens >= _FEW_TOKENS * w.shape[1]:
        return first
    stronger = [factor * job.recipe.damp_percent for factor in _STRONGER_DAMPING]
    attempts = [first, *(_attempt(job, w, h, cross, damp) for damp in stronger if damp <= 1)]
    return min(attempts, key=lambda attempt: float(judge.rows(attempt[1]).sum()))


def _attempt(
    job: Job, w: Tensor, h: Tensor, cross: Tensor | None, damp_percent: float
) -> tuple[Solution, QuantizedWeight, bool]:
    """Return the solver's answer, the refined one, and whether both aim at shifted weights.

    Rows know nothing of each other: they are solved as many at a time as the budget allows, and ranks share them.
    """
    parts = job.ranks.shared(
        {
            number: _attempt_rows(job, rows, h, cross, damp_percent)
            for number, rows in enumerate(w.split(_rows_at_once(job, w)))
            if number % job.ranks.world == job.ranks.rank
        }
    )
    first = parts[0][0]
    if len(parts) == 1:
        return parts[0]
    solved, refined = (stacked(weights) for weights in zip(*((s.weight, r) for s, r, _ in parts), strict=True))
    remedies = tuple(dict.fromkeys(remedy for solution, _, _ in parts for remedy in solution.remedies))
    return Solution(solved, first.damp_percent, remedies), refined, parts[0][2]


def _rows_at_once(job: Job, w: Tensor) -> int:
    """Return how many rows of `w` are solved together: as many as the budget allows, but all that share a codebook."""
    return len(w) if isinstance(job.grid, VectorGrid) else job.budget.solver_rows or len(w)


def _attempt_rows(
    job: Job, w: Tensor, h: Tensor, cross: Tensor | None, damp_percent: float
) -> tuple[Solution, QuantizedWeight, bool]:
    """Return what `_attempt` does, of all of these rows at once."""
    recipe, options = job.recipe, {}
    target = w
    if cross is not None and job.solver.paired:
        options = {"cross": cross, "alpha": recipe.shift}
    elif cross is not None:
        target = shifted(w, h, cross, alpha=recipe.shift, damp_percent=damp_percent)
    solution = _run_solver(job, target, h, damp_percent, **options)
    refined = solution.weight
    if solution.damp_percent > 0 and not job.solver.paired:  # 0: the Hessian was unusable
        # not `hessian.damped`, which gives inputs that never occur a weight of 1: here they must not pull at scales
        damped = h.clone()
        damped.diagonal().add_(solution.damp_percent * h.diagonal().mean())
        refined = _refined(refined, target, damped, recipe.refine_rounds)
    return solution, refined, target is not w


def _refined(q: QuantizedWeight, w: Tensor, h: Tensor, rounds: int) -> QuantizedWeight:
    """Return `q` after up to `rounds` rounds of the refiners of its kind."""
    return refining.refined(q, w, h, rounds) if isinstance(q, VectorWeight) else refine(q, w, h, rounds)


def answer(job: Job, w: Tensor, h: Tensor) -> QuantizedWeight:
    """Return the solver's answer to `w` [N, K] under `h` [K, K], before refinement."""
    return _run_solver(job, w, h, job.recipe.damp_percent).weight


def _run_solver(job: Job, w: Tensor, h: Tensor, damp_percent: float, **extra: Any) -> Solution:
    options = {name: getattr(job.recipe, name) for name in job.solver.options} | extra
    if "damp_percent" in options:
        options["damp_percent"] = damp_percent
    if job.recipe.magr > 0:
        w = magr(w, h, group_size=job.spec.group_columns(w.shape[1]), alpha=job.recipe.magr)
    return job.solver.run(w, h, job.grid, job.spec.group_columns(w.shape[1]), **options)


def _guard(
    judge: Measure,
    problem: Problem,
    before: QuantizedWeight,
    after: QuantizedWeight,
    what: str,
    undone: list[list[str]],
) -> QuantizedWeight:
    """Return `after`, with the rows of each linear taken back to `before` where held-out tokens speak against it."""
    if before is after:
        return before
    gain = judge.rows(before) - judge.rows(after)
    take, start = torch.ones(len(gain), dtype=torch.bool, device=gain.device), 0
    for names, (_, rows) in zip(undone, problem.rows, strict=True):
        size = rows.stop - rows.start
        if gain[start : start + size].double().sum() < 0:
            take[start : start + size] = False
            names.append(what)
        start += size
    return chosen(take, after, before)
