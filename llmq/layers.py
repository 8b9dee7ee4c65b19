"""One stage of linears, from calibration inputs to codes: what is measured, what is solved, and what is taken back.

Linears that see one input share a Hessian, so their rows are stacked and solved as one problem. A tenth of the tokens
enters no Hessian; whatever improves a layer on the others must not make it worse on those, or it is undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import SolverError
from llmq.families import Linear
from llmq.guidance import group_rows
from llmq.hessian import HessianSum
from llmq.preflight import Job
from llmq.refine import refine
from llmq.report import LayerReport
from llmq.solvers.shift import shifted
from llmq.stream import Stage, Stream
from llmq.transforms import magr
from llmq.types import QuantizedWeight, Solution

# Below so many tokens per input, stronger damping is tried too and the best taken by the loss on held-out tokens.
_FEW_TOKENS = 16
_STRONGER_DAMPING = (3.0, 10.0)


@dataclass(frozen=True)
class Problem:
    """Rows that share a Hessian, and the moments of their inputs."""

    rows: list[tuple[Linear, slice]]  # stacked in this order
    train: HessianSum | None  # None: the solver needs no data
    held_out: HessianSum | None
    paired: bool

    @property
    def name(self) -> str:
        """The first linear, for errors."""
        return self.rows[0][0].name

    def weight(self) -> Tensor:
        """Return the stacked rows, float32 [N, K]."""
        return torch.cat([linear.weight[rows].float() for linear, rows in self.rows])


@dataclass(frozen=True)
class Layer:
    """A linear, solved."""

    linear: Linear
    weight: QuantizedWeight
    report: LayerReport


@dataclass
class _Piece:
    """Rows of one linear, solved, and what they lost."""

    linear: Linear
    weight: QuantizedWeight
    solution: Solution  # of the problem that they were part of
    undone: list[str]
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


@dataclass(frozen=True)
class Twin:
    """A stage in the original block, whose inputs are compared with."""

    stage: Stage
    last: bool  # whether none comes after it, so that the pass which shows its inputs is the block's last one


@dataclass(frozen=True)
class Observed:
    """A stage's inputs as they come along two streams: through what is quantized so far and, if wanted, originally."""

    stream: Stream
    block: nn.Module
    index: int
    reference: Stream | None = None
    original: nn.Module | None = None  # the block as it was

    def batches(self, stage: Stage, twin: Twin | None) -> Iterator[tuple[int, list[Tensor], list[Tensor | None]]]:
        """Yield the number of each batch, its inputs and those of the original model, one of each per call."""
        for number in range(len(self.stream.batches)):
            inputs = self.stream.inputs(self.block, self.index, stage, number)
            references: list[Tensor | None] = [None] * len(inputs)
            if self.reference is not None and self.original is not None and twin is not None:
                inputs_there = self.reference.inputs(self.original, self.index, twin.stage, number, passing=twin.last)
                references = list(inputs_there)
            yield number, inputs, references


def measure(seen: Observed | None, stage: Stage, twin: Twin | None, weights: Mapping[str, Tensor]) -> list[Problem]:
    """Return the problems of `stage`, their Hessians summed over all batches.

    Args:
        seen: where the inputs come from; None: nothing is to be measured.
        stage: linears that share an input.
        twin: the same stage in the original block, where the problems are to be paired. With the last one, the
            reference moves past the block.
        weights: by name, how much each linear's tokens count, [groups, S, L]; empty where all count alike.
    """
    whole = [(linear, slice(0, linear.shape[0])) for linear in stage.linears]
    if seen is None:
        return [Problem(whole, None, None, paired=False)]
    held_out = any(batch.held_out for batch in seen.stream.batches)
    device = seen.stream.hidden[0].device

    def problem(rows: list[tuple[Linear, slice]]) -> Problem:
        sums = [HessianSum(stage.linears[0].shape[1], device, paired=twin is not None) for _ in range(1 + held_out)]
        return Problem(rows, sums[0], sums[1] if held_out else None, twin is not None)

    split: list[tuple[Problem, Tensor | None]] = []
    own = [weights[linear.name] for linear in stage.linears if weights]
    if all(w is own[0] and len(w) == 1 for w in own):  # one Hessian does for all
        split.append((problem(whole), own[0][0] if own else None))
    else:
        for (linear, rows), groups in zip(whole, own, strict=True):
            start = 0
            for w, size in zip(groups, group_rows(rows.stop, len(groups), linear.name), strict=True):
                split.append((problem([(linear, slice(start, start + size))]), w))
                start += size
    for number, inputs, references in seen.batches(stage, twin):
        batch = seen.stream.batches[number]
        for part, tokens in split:
            total = part.held_out if batch.held_out else part.train
            assert total is not None, "a batch is held out only where the stream says so"
            mine = None if tokens is None else tokens[batch.windows].to(device)
            for x, reference in zip(inputs, references, strict=True):
                total.add_(x, batch.valid, mine, reference)
    return [part for part, _ in split]


def solve_stage(job: Job, block: int, problems: list[Problem]) -> list[Layer]:
    """Return the solved linears of one stage, in its order.

    Raises:
        SolverError: a Hessian holds NaN or infinity, or a scale does not fit its dtype.
        CalibrationError: no token arrived, or too many of them were not finite.
    """
    pieces: dict[str, list[_Piece]] = {}
    for problem in problems:
        for piece in _solve(job, problem):
            pieces.setdefault(piece.linear.name, []).append(piece)
    return [_join(block, parts) for parts in pieces.values()]


def _solve(job: Job, problem: Problem) -> list[_Piece]:
    """Return the pieces of a problem, in the order of its rows; errors name its first linear."""
    try:
        return _pieces(job, problem, problem.weight())
    except SolverError as error:
        raise SolverError(f"{problem.name}: {error}") from error


def _pieces(job: Job, problem: Problem, w: Tensor) -> list[_Piece]:
    """Return the solved rows of stacked weights `w` [N, K], linear by linear, with the losses of each."""
    if problem.train is None:
        solution = job.solver.run(w, None, job.grid, job.spec.group_columns(w.shape[1]))
        return _split(problem, [solution] * len(problem.rows), solution.weight, [[] for _ in problem.rows])
    h = problem.train.mean(problem.name)
    judge = None
    if problem.held_out is not None and problem.held_out.tokens:
        pull = w @ problem.held_out.cross(problem.name) if problem.paired else None
        judge = Measure(w, problem.held_out.mean(problem.name), pull)
    solutions, result, undone = _judged(job, problem, w, h, judge)
    pieces = _split(problem, solutions, result, undone)
    own = Measure(w, h, None)
    fair = None if judge is None else Measure(w, judge.h, None)
    start = 0
    for piece in pieces:
        rows = slice(start, start + len(piece.weight.codes))
        piece.tokens = problem.train.tokens, problem.train.dropped
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
    sizes = [rows.stop - rows.start for _, rows in problem.rows]
    parts = zip(whole.codes.split(sizes), whole.scales.split(sizes), whole.zeros.split(sizes), strict=True)
    return [
        _Piece(linear, replace(whole, codes=codes, scales=scales, zeros=zeros), solution, names)
        for (linear, _), (codes, scales, zeros), solution, names in zip(
            problem.rows, parts, solutions, undone, strict=True
        )
    ]


def _join(block: int, pieces: list[_Piece]) -> Layer:
    """Return the layer whose rows `pieces` are; its module still holds the original weight."""
    first, linear = pieces[0], pieces[0].linear
    codes, scales, zeros = (
        torch.cat([getattr(piece.weight, name) for piece in pieces]) for name in ("codes", "scales", "zeros")
    )
    whole = replace(first.weight, codes=codes, scales=scales, zeros=zeros)
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
        max(piece.solution.damp_percent for piece in pieces),
        tuple(dict.fromkeys(remedy for piece in pieces for remedy in piece.solution.remedies)),
        tuple(dict.fromkeys(name for piece in pieces for name in piece.undone)),
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
    """Return the solver's answer, the refined one, and whether both aim at shifted weights."""
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
        refined = refine(refined, target, damped, recipe.refine_rounds)
    return solution, refined, target is not w


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
    codes, scales, zeros = (
        torch.where(take[:, None], getattr(after, name), getattr(before, name)) for name in ("codes", "scales", "zeros")
    )
    return replace(after, codes=codes, scales=scales, zeros=zeros)
