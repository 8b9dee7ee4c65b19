"""Problems of a bank's linears: each expert has inputs of its own, those that its router sends to it.

What enters a bank is recorded once, for all batches and both stages of it. An expert's Hessians are summed from the
rows that picked it when its turn to be solved comes, so that one Hessian is in memory and not one per expert.

An expert that few tokens reach would be solved on a Hessian that knows little. Its mean is shrunk towards that of all
tokens that enter the bank, ``H ← (N H + κ H_all) / (N + κ)``: inputs of other tokens are the best guess at those that
calibration did not show. For the last projection these are what the expert itself would make of them, a poorer guess:
where hardly any token reaches an expert, it is rounded to nearest there, on scales that this diagonal weighs.

Measured on layers of an 8 M Llama at 3 bits, tokens clustered into 12 as if by a router, losses on unseen tokens of a
cluster in thousandths, gate first (K = 256), then down (768), with N / K tokens of its own and κ from all other tokens:

    N / K       0    1/64    1/16     1/4       1       4
    κ = 0       -  20, 23  17, 22  12, 23  6.9, 16  5.5, 11
    κ = K/4  13, 23  12, 22  10, 20  8.5, 17  6.6, 13  5.6, 11
    κ = K    13, 23  12, 22  11, 20  8.7, 17  7.0, 13  5.8, 11
    rounded  26, 23  26, 22  27, 22  27, 21  26, 20  26, 20
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmq.errors import SpecError
from llmq.families import Linear
from llmq.hessian import HessianSum
from llmq.moe import Bank, Entry, ExpertStage
from llmq.preflight import Job
from llmq.problems import Observed, Problem, Twin, accumulate_, measure, split_rows
from llmq.ranks import ALONE, Ranks
from llmq.report import SHRUNK, STARVED
from llmq.stream import Stage

ENOUGH = 4.0  # tokens per input from which on an expert is solved on its own tokens alone
PRIOR = 0.25  # tokens per input that the mean of all tokens counts as in the Hessian of one that gets fewer
LEAST = 1 / 64  # tokens per input below which the last projection of an expert is rounded to nearest


def problems_of(
    job: Job, seen: Observed | None, stage: Stage, twin: Twin | None, weights: Mapping[str, Tensor]
) -> Iterable[Problem]:
    """Return the problems of a stage, whether of a bank or not; see `llmq.problems.measure` and `expert_problems`."""
    if seen is None or stage.experts is None:
        return measure(seen, stage, twin, weights, job.ranks)
    return expert_problems(seen, stage, twin, weights, all_experts=job.recipe.all_experts, ranks=job.ranks)


def expert_problems(
    seen: Observed,
    stage: Stage,
    twin: Twin | None,
    weights: Mapping[str, Tensor],
    *,
    all_experts: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[Problem]:
    """Yield the problems of a stage of a bank, expert by expert; each is measured when it is asked for.

    Every rank has what enters the bank, and measures every so many-th expert; of the others it knows the rows.

    Args:
        seen: where the inputs come from.
        stage: linears of one bank.
        twin: the same stage in the original block, where the problems are to be paired. With the last one, the
            reference moves past the block when the last problem has been taken.
        weights: as for `llmq.problems.measure`.
        all_experts: whether every expert learns from all tokens, as if the router sent them.
        ranks: who shares the batches and the experts.

    Raises:
        SpecError: the bank sees other tokens than those of the batch.
    """
    experts = stage.experts
    assert experts is not None, "other stages are measured in `llmq.layers`"
    if not experts.entries:
        experts.entries.extend(_record(seen, experts, stage.calls, ranks, paired=twin is not None))
    bank = _Measured(seen, experts, weights, paired=twin is not None)
    places = bank.here.places()
    routed = bank.counts()
    for expert in range(bank.here.size):
        linears = [linear for linear in stage.linears if places[linear.module][0] == expert]
        owner = None if ranks.world == 1 else expert % ranks.world
        if not linears:
            continue
        if owner in (None, ranks.rank):
            found = bank.problems(expert, replace(stage, linears=linears), routed[expert], all_experts)
        else:
            found = bank.unmeasured(linears)
        yield from (replace(problem, owner=owner) for problem in found)
    if experts.last:
        experts.entries.clear()
    if twin is not None and twin.last:
        assert seen.reference is not None, "a twin is part of it"
        assert seen.original is not None, "a twin is part of it"
        seen.reference.advance(seen.original, seen.index)


def _record(seen: Observed, experts: ExpertStage, calls: int, ranks: Ranks, *, paired: bool) -> Iterator[Entry]:
    """Yield every call of a bank on the calibration batches, those of other ranks too."""
    mine: dict[int, list[Entry]] = {}
    for entry in _record_mine(seen, experts, calls, paired=paired):
        mine.setdefault(entry.batch, []).append(entry)
    for entries in ranks.shared(mine):
        yield from entries


@torch.no_grad()
def _record_mine(seen: Observed, experts: ExpertStage, calls: int, *, paired: bool) -> Iterator[Entry]:
    """Yield every call of a bank on the batches of this rank."""
    for number in seen.stream.hidden.mine:
        batch = seen.stream.batches[number]
        bank = seen.block.get_submodule(experts.bank)
        here = seen.stream.arguments(seen.block, seen.index, number, bank, calls)
        there: list[Tensor | None] = [None] * len(here)
        if paired and seen.reference is not None and seen.original is not None:
            twin = seen.original.get_submodule(experts.bank)
            found = seen.reference.arguments(seen.original, seen.index, number, twin, calls)
            there = [arguments[0] for arguments in found]
        for (hidden, picked, *_), reference in zip(here, there, strict=True):
            if hidden.shape[:-1] != batch.ids.reshape(-1).shape:
                raise SpecError(
                    f"{experts.bank}: gets hidden states {list(hidden.shape)} for {batch.ids.numel()} tokens; llmq "
                    "knows banks of experts that get one row for each; leave it dense with --ignore"
                )
            yield Entry(number, hidden, picked, reference)


class _Measured:
    """A bank whose inputs are recorded."""

    def __init__(self, seen: Observed, experts: ExpertStage, weights: Mapping[str, Tensor], *, paired: bool) -> None:
        here = seen.block.get_submodule(experts.bank)
        assert isinstance(here, Bank)
        there = None if seen.original is None else seen.original.get_submodule(experts.bank)
        self.here, self.there = here, there if isinstance(there, Bank) else None
        self.seen, self.weights, self.paired = seen, weights, paired
        self.last, self.entries = experts.last, experts.entries
        self._shared: _Prior | None = None  # of what enters the bank: the same for all experts
        self._whole: Problem | None = None  # the first expert's, where it learns from the same tokens as all others

    def counts(self) -> list[int]:
        """Return how many tokens to learn from the router sends to each expert."""
        counts = torch.zeros(self.here.size, dtype=torch.long)
        for entry in self.entries:
            batch = self.seen.stream.batches[entry.batch]
            if not batch.held_out:
                picked = entry.picked if batch.valid is None else entry.picked[batch.valid.reshape(-1)]
                counts += torch.bincount(picked.reshape(-1), minlength=len(counts))[: len(counts)].cpu()
        return counts.tolist()

    def unmeasured(self, linears: list[Linear]) -> list[Problem]:
        """Return the problems of linears of one expert, which another rank measures."""
        split = split_rows(self.seen, linears, self.weights, paired=self.paired)
        return [replace(part, train=None, held_out=None) for part, _ in split]

    def problems(self, expert: int, stage: Stage, routed: int, all_experts: bool) -> list[Problem]:
        """Return the problems of the linears of `stage`, all of one expert."""
        split = split_rows(self.seen, stage.linears, self.weights, paired=self.paired)
        if self._whole is not None:
            return [replace(self._whole, rows=part.rows, routed=routed) for part, _ in split]
        for entry in self.entries:
            rows = None if all_experts else (entry.picked == expert).any(dim=1).nonzero().flatten()
            x, reference = self._inputs(expert, entry, rows)
            accumulate_(split, self.seen.stream.batches[entry.batch], x, reference, rows)
        inputs = stage.linears[0].shape[1]
        remedies: tuple[str, ...] = ()
        if not all_experts and routed < ENOUGH * inputs:
            remedies = (STARVED if self.last and routed < LEAST * inputs else SHRUNK,)
            prior = self._prior(expert, inputs)
            for part, _ in split:
                prior.blend_(part, PRIOR * inputs)
        paired = self.paired and STARVED not in remedies
        found = [replace(part, routed=routed, remedies=remedies, paired=paired) for part, _ in split]
        if all_experts and not self.last and not self.weights:
            self._whole = found[0]
        return found

    def _prior(self, expert: int, inputs: int) -> _Prior:
        """Return the moments of all tokens: of what enters the bank, or of what an expert would make of it."""
        if self._shared is not None and not self.last:
            return self._shared
        device = self.seen.stream.hidden.device
        prior = self._shared = _Prior(
            *(HessianSum(inputs, device, paired=self.paired) for _ in range(2)),
        )
        tokens = sum(entry.hidden.shape[0] for entry in self.entries)
        # a bank's own input costs nothing more; an expert would have to be run on all of them
        step = max(1, int(tokens / (ENOUGH * inputs))) if self.last else 1
        for entry in self.entries:
            batch = self.seen.stream.batches[entry.batch]
            rows = torch.arange(0, entry.hidden.shape[0], step, device=entry.hidden.device)
            x, reference = self._inputs(expert, entry, rows)
            counted = None if batch.counted is None else batch.counted.reshape(-1)[rows]
            (prior.held_out if batch.held_out else prior.train).add_(x, counted, None, reference)
        return prior

    @torch.no_grad()
    def _inputs(self, expert: int, entry: Entry, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return what an expert's linears see of `rows` [T] of a call, [T, K], and would see in the original model."""
        x, reference = entry.hidden, entry.reference
        if rows is not None:
            x, reference = x[rows], None if reference is None else reference[rows]
        if self.last:
            x = self.here.inner(expert, x)
            assert reference is None or self.there is not None, "references come from the original bank"
            reference = None if reference is None or self.there is None else self.there.inner(expert, reference)
        return x, reference


@dataclass(frozen=True)
class _Prior:
    """Moments of many tokens."""

    train: HessianSum
    held_out: HessianSum

    def blend_(self, problem: Problem, tokens: float) -> None:
        """Let the mean of these tokens count as `tokens` of the problem's own."""
        for own, other in ((problem.train, self.train), (problem.held_out, self.held_out)):
            if own is not None:
                own.blend_(other, tokens)
