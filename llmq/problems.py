"""What a stage of linears is solved with: rows that share a Hessian, and the moments of their inputs.

Linears that see one input share a Hessian, so their rows are stacked and solved as one problem. A tenth of the tokens
enters no Hessian: they judge.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from llmq.families import Linear
from llmq.guidance import group_rows
from llmq.hessian import HessianSum
from llmq.ranks import ALONE, Ranks
from llmq.stream import Batch, Stage, Stream


@dataclass(frozen=True)
class Problem:
    """Rows that share a Hessian, and the moments of their inputs."""

    rows: list[tuple[Linear, slice]]  # stacked in this order
    train: HessianSum | None  # None: the solver needs no data
    held_out: HessianSum | None
    paired: bool
    routed: int | None = None  # tokens that the router sends to the expert whose rows these are
    remedies: tuple[str, ...] = ()  # what was done for want of tokens
    owner: int | None = None  # the rank that solves it, and alone needs the moments; None: all ranks share its rows

    @property
    def name(self) -> str:
        """The first linear, for errors."""
        return self.rows[0][0].name

    def weight(self) -> Tensor:
        """Return the stacked rows, float32 [N, K]."""
        return torch.cat([linear.weight[rows].float() for linear, rows in self.rows])


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

    def __post_init__(self) -> None:
        """Let the reference replay the same parts of its block."""
        if self.reference is not None and self.original is not None:
            self.reference.follow(self.stream, self.original)

    def batches(self, stage: Stage, twin: Twin | None) -> Iterator[tuple[int, list[Tensor], list[Tensor | None]]]:
        """Yield the number of each batch of this rank, its inputs and the original model's, one of each per call."""
        for number in self.stream.hidden.mine:
            inputs = self.stream.inputs(self.block, self.index, stage, number)
            references: list[Tensor | None] = [None] * len(inputs)
            if self.reference is not None and self.original is not None and twin is not None:
                inputs_there = self.reference.inputs(self.original, self.index, twin.stage, number, passing=twin.last)
                references = list(inputs_there)
            yield number, inputs, references


def measure(
    seen: Observed | None, stage: Stage, twin: Twin | None, weights: Mapping[str, Tensor], ranks: Ranks = ALONE
) -> list[Problem]:
    """Return the problems of `stage`, their Hessians summed over all batches, lane by lane.

    Args:
        seen: where the inputs come from; None: nothing is to be measured.
        stage: linears that share an input.
        twin: the same stage in the original block, where the problems are to be paired. With the last one, the
            reference moves past the block.
        weights: by name, how much each linear's tokens count, [groups, S, L]; empty where all count alike.
        ranks: who shares the batches. Where there are no more of them than problems, each gets some to solve.
    """
    whole = [(linear, slice(0, linear.shape[0])) for linear in stage.linears]
    if seen is None:
        return [Problem(whole, None, None, paired=False)]
    batches = seen.stream.batches
    totals = split_rows(seen, stage.linears, weights, paired=twin is not None)
    arriving = seen.batches(stage, twin)
    for lanes in ranks.rounds(len(batches)):
        own = split_rows(seen, stage.linears, weights, paired=twin is not None)
        mine = lanes[ranks.rank] if ranks.rank < len(lanes) else []
        for number, inputs, references in islice(arriving, len(mine)):
            for x, reference in zip(inputs, references, strict=True):
                accumulate_(own, batches[number], x, reference)
        for source, lane in enumerate(lanes):
            kinds = {batches[number].held_out for number in lane}
            for (total, _), (part, _) in zip(totals, own, strict=True):
                for into, found, held_out in ((total.train, part.train, False), (total.held_out, part.held_out, True)):
                    if into is not None and found is not None and held_out in kinds:
                        into.absorb_(ranks.broadcast(found, source))
    if twin is not None and twin.last and seen.reference is not None:
        seen.reference.arrive()
    problems = [part for part, _ in totals]
    if ranks.world == 1 or len(problems) < ranks.world:
        return problems
    return [replace(problem, owner=number % ranks.world) for number, problem in enumerate(problems)]


def split_rows(
    seen: Observed, linears: list[Linear], weights: Mapping[str, Tensor], *, paired: bool
) -> list[tuple[Problem, Tensor | None]]:
    """Return the problems of `linears`, which share an input, empty yet, each with the weights of its tokens [S, L].

    There is one for all of them, unless their outputs weigh tokens differently; `weights` as for `measure`.
    """
    held_out = any(batch.held_out for batch in seen.stream.batches)
    device = seen.stream.hidden.device
    whole = [(linear, slice(0, linear.shape[0])) for linear in linears]

    def problem(rows: list[tuple[Linear, slice]]) -> Problem:
        sums = [HessianSum(linears[0].shape[1], device, paired=paired) for _ in range(1 + held_out)]
        return Problem(rows, sums[0], sums[1] if held_out else None, paired)

    split: list[tuple[Problem, Tensor | None]] = []
    own = [weights[linear.name] for linear in linears if weights]
    if all(w is own[0] and len(w) == 1 for w in own):  # one Hessian does for all
        split.append((problem(whole), own[0][0] if own else None))
    else:
        for (linear, rows), groups in zip(whole, own, strict=True):
            start = 0
            for w, size in zip(groups, group_rows(rows.stop, len(groups), linear.name), strict=True):
                split.append((problem([(linear, slice(start, start + size))]), w))
                start += size
    return split


def accumulate_(
    split: Iterable[tuple[Problem, Tensor | None]],
    batch: Batch,
    x: Tensor,
    reference: Tensor | None,
    rows: Tensor | None = None,
) -> None:
    """Add inputs `x` [..., K] of a batch, and those in the original model, to the problems of `split_rows`.

    `rows`: which tokens of the batch they are, int64 [T]; None: all, in order.
    """

    def pick(t: Tensor | None) -> Tensor | None:
        return t if t is None or rows is None else t.reshape(-1)[rows]

    for part, tokens in split:
        total = part.held_out if batch.held_out else part.train
        assert total is not None, "a batch is held out only where the stream says so"
        mine = None if tokens is None else tokens[batch.windows].to(x.device)
        total.add_(x, pick(batch.valid), pick(mine), reference)
