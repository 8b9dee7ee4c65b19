"""Calibration activations on their way through the blocks.

`Stream.start` runs everything before the first block and records, for every batch and block, what the model passes to
the block besides the hidden states (masks, rotary tables, which differ between blocks of one model). From then on
hidden states move block by block with `advance`, and the model around the blocks is needed again only for `logits`.
A `fork` of a stream moves on its own: one through the quantized blocks, one through the original ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmq.activations import HiddenStates
from llmq.budget import TOKENS_PER_BATCH
from llmq.calibration import Calibration
from llmq.calls import Call, joined, record
from llmq.errors import SpecError
from llmq.families import Linear, Structure, blocks_replaced, same_memory
from llmq.moe import Entry, ExpertStage, banks_of
from llmq.replay import NOTHING, Enough, Replay, Watch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Batch:
    """Calibration windows that pass a block together."""

    ids: Tensor  # int64 [B, L]
    valid: Tensor | None  # bool [B, L]; None where every token is valid
    windows: slice  # which of all windows they are: text, then random tokens, then what is held out
    held_out: bool  # whether they only judge
    text: bool  # whether they are text, and not random tokens
    counted: Tensor | None  # bool [B, L]; the tokens whose outputs matter; None where all do
    calls: list[Call]  # per block, what the model passes to it besides the hidden states

    def pick(self, t: Tensor) -> Tensor:
        """Return the entries of `t` [B, L, D] at the tokens whose outputs matter, float32 [T, D]."""
        return (t.flatten(0, -2) if self.counted is None else t[self.counted]).float()


@dataclass(frozen=True)
class Stage:
    """Linears that see the same input, hence share a Hessian, in the order in which they run."""

    linears: list[Linear]
    calls: int  # how often a forward pass of the block runs the first of them, or the bank that they are in
    experts: ExpertStage | None = None  # of linears in a bank, each of which sees what the router sends to its expert


_Joints = dict[int, Callable[[Tensor, Tensor, Tensor | None], Tensor]]
_Inputs = list[tuple[Tensor, ...]]  # of a module, for each call


class Stream:
    """Hidden states of all calibration batches in front of one block, and the arguments of every block's call.

    Args:
        batches: all of them.
        hidden: their states.
        joints: by the last block of a stack, what makes of its output the next one's input.
        replays: whether what parts of a block returned is kept for its later passes (`llmq.replay`).
    """

    def __init__(
        self, batches: list[Batch], hidden: HiddenStates, joints: _Joints | None = None, *, replays: bool = False
    ) -> None:
        self.batches = batches
        self.hidden = hidden
        self.replays = replays
        self._joints = joints or {}
        self._replay: Replay | None = None  # of the block under way
        self._trusted: set[object] = set()  # what was compared with passes that run everything

    @classmethod
    def start(  # noqa: PLR0913  three kinds of windows
        cls,
        model: PreTrainedModel,
        structure: Structure,
        calibration: Calibration,
        device: torch.device,
        *,
        random: Calibration | None = None,
        held_out: Calibration | None = None,
        batch_tokens: int | None = None,
        hidden: HiddenStates | None = None,
        replays: bool = False,
    ) -> Stream:
        """Return the stream in front of the first block; everything around the blocks must be loaded on `device`.

        It keeps its states in `hidden`, empty now, or in memory. States that are there already were restored: then the
        stream stands where they do.
        """
        joints: _Joints = {end: partial(joined, model, structure, end) for end in structure.ends}
        stream, first = cls([], HiddenStates(device) if hidden is None else hidden, joints, replays=replays), 0
        restored = len(stream.hidden) > 0
        size = max(1, (batch_tokens or TOKENS_PER_BATCH) // calibration.input_ids.shape[1])
        parts = [part for part in (calibration, random, held_out) if part is not None]
        total = sum(-(-len(part.input_ids) // size) for part in parts)
        for part in parts:
            count, masks = part.input_ids.shape[0], part.attention_mask
            for start in range(0, count, size):
                ids = part.input_ids[start : start + size].to(device)
                valid = None if masks is None else masks[start : start + size].to(device)
                entering, calls = record(model, structure, ids, valid)
                if stream.batches:
                    calls = [new.sharing(old) for new, old in zip(calls, stream.batches[-1].calls, strict=True)]
                windows = slice(first + start, first + start + ids.shape[0])
                counted = valid if part.loss_mask is None else part.loss_mask[start : start + size].to(device)
                mine = stream.hidden.ranks.owns(len(stream.batches), total)
                stream.batches.append(Batch(ids, valid, windows, part is held_out, part is not random, counted, calls))
                if not restored:
                    stream.hidden.append(entering, mine=mine)
            first += count
        return stream

    def split(self, *, random: bool) -> tuple[list[int], list[int]]:
        """Return the numbers of the batches to learn from, those of random tokens only if wanted, and of the judges.

        The judges are what is held out; where nothing is, they are the same batches.
        """
        train = [i for i, batch in enumerate(self.batches) if not batch.held_out and (random or batch.text)]
        return train, [i for i, batch in enumerate(self.batches) if batch.held_out] or train

    def fork(self, folder: Path | None = None) -> Stream:
        """Return a stream at the same place that moves on its own; files of its states go to `folder`."""
        return self.at(self.hidden.fork(folder))

    def at(self, hidden: HiddenStates) -> Stream:
        """Return a stream of the same batches that stands where `hidden` does."""
        return Stream(self.batches, hidden, self._joints, replays=self.replays)

    def follow(self, other: Stream, block: nn.Module) -> None:
        """Replay in `block`, which nobody changes, the parts that `other` replays in the one that it is a copy of."""
        self._replay = None if other._replay is None else other._replay.twin(block)

    @property
    def kept_bytes(self) -> int:
        """What is held of parts of the block under way."""
        return 0 if self._replay is None else self._replay.nbytes

    def stages(self, block: nn.Module, index: int, linears: list[Linear]) -> list[Stage]:
        """Return the stages of block number `index`, observed on one sample.

        Raises:
            SpecError: a linear is never called, so that no Hessian can be had for it.
        """
        inputs: list[Tensor] = []  # kept alive, so that no two of them share an address
        order: dict[str, list[int]] = {}  # linear or bank -> position of its inputs
        banks = banks_of(block)
        places = {m: (name, last) for name, bank in banks.items() for m, (_, last) in bank.places().items()}
        watched = {x.name: x.module for x in linears if x.module not in places}
        watched |= {
            name: banks[name] for name in dict.fromkeys(places[x.module][0] for x in linears if x.module in places)
        }

        def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen = next((i for i, x in enumerate(inputs) if same_memory(x, args[0])), len(inputs))
                if seen == len(inputs):
                    inputs.append(args[0])
                order.setdefault(name, []).append(seen)

            return hook

        local = {module: name for name, module in block.named_modules()}
        watch = Watch(block, {local[module]: module for module in watched.values()})
        self._replay = None
        with _hooked([(module, observe(name)) for name, module in watched.items()]), watch.on():
            self._run(block, index, 0)
        for name in watched:
            if name not in order:
                raise SpecError(f"{name}: never used in a forward pass; leave it out with --ignore")
        by_input: dict[tuple[int, ...] | str, Stage] = {}
        for name, seen in order.items():  # in the order of first use
            if name not in banks:
                member = next(x for x in linears if x.name == name)
                by_input.setdefault(tuple(seen), Stage([], len(seen))).linears.append(member)
                continue
            entries: list[Entry] = []
            for last in (False, True):
                members = [x for x in linears if places.get(x.module) == (name, last)]
                if members:
                    by_input[f"{name} {last}"] = Stage(members, len(seen), ExpertStage(name, last, entries))
        stages = list(by_input.values())
        if self.replays:
            stage_of: dict[str, tuple[int, int]] = {}
            for number, stage in enumerate(stages):
                names = [local[x.module] for x in stage.linears] if stage.experts is None else [stage.experts.bank]
                stage_of |= {name: (stage_of.get(name, (number, number))[0], number) for name in names}
            self._replay = Replay(block, watch.parts(stage_of), stage_of)
        return stages

    def inputs(self, block: nn.Module, index: int, stage: Stage, batch: int, *, passing: bool = False) -> list[Tensor]:
        """Return what enters the linears of `stage` for one batch: a tensor [..., K] for each call.

        With `passing`, the batch, one of `hidden.mine`, also moves on to what the block returns, which is then final.
        """
        found = self.arguments(block, index, batch, stage.linears[0].module, stage.calls, passing=passing)
        return [args[0] for args in found]

    def arguments(
        self, block: nn.Module, index: int, batch: int, module: nn.Module, calls: int, *, passing: bool = False
    ) -> list[tuple[Tensor, ...]]:
        """Return what `module`, somewhere in the block, is called with, for each of its `calls`; else as `inputs`."""
        seen, out = self._pass(block, index, batch, (module, calls), passing=passing)
        if passing:
            self._move(batch, index, out)
        return seen

    def advance(self, block: nn.Module, index: int) -> None:
        """Move the hidden states of all batches through block number `index`; errors as for `HiddenStates.arrive`."""
        for batch in self.hidden.mine:
            self._move(batch, index, self._pass(block, index, batch, None, passing=True)[1])
        self.arrive()

    def arrive(self) -> None:
        """Leave the block that all batches have passed; errors as for `HiddenStates.arrive`."""
        self._replay = None
        self.hidden.arrive()

    def through(self, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Return what block number `index` makes of `hidden` [B, L, D], called as for this batch; keeps gradients."""
        return self.batches[batch].calls[index].run(block, hidden)

    def _move(self, batch: int, index: int, out: Tensor | None) -> None:
        """Let a batch stand behind block number `index`, which returned `out`: in front of the next one."""
        assert out is not None, "no hook ends this pass"
        if self._replay is not None:
            self._replay.drop(batch)
        join = self._joints.get(index)
        self.hidden[batch] = out if join is None else join(out, self.batches[batch].ids, self.batches[batch].valid)

    def _pass(
        self, block: nn.Module, index: int, batch: int, wanted: tuple[nn.Module, int] | None, *, passing: bool
    ) -> tuple[_Inputs, Tensor | None]:
        """Return what the wanted module is called with so many times and, of a pass to the end, the block's output.

        What can be replayed is. The first time that this leaves something out, nothing is left out for comparison.
        """
        replay = self._replay
        if replay is None or replay.block is not block:
            return self._watched(block, index, batch, wanted, to_the_end=passing)
        with replay.playing(batch, wanted and wanted[0], self.hidden[batch], final=passing) as playing:
            found = self._watched(block, index, batch, wanted, to_the_end=passing or playing.late)
        key = type(block), playing
        if playing == NOTHING or key in self._trusted or self.hidden.device.type == "meta":
            return found
        expected = self._watched(block, index, batch, wanted, to_the_end=passing)
        if not _equal(found, expected):
            self.replays, self._replay = False, None
        self._trusted.add(key)
        return expected

    def _watched(
        self, block: nn.Module, index: int, batch: int, wanted: tuple[nn.Module, int] | None, *, to_the_end: bool
    ) -> tuple[_Inputs, Tensor | None]:
        """Return what `_pass` does, of a pass that does all that it is not kept from."""
        seen: _Inputs = []

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args)
            if wanted is not None and len(seen) == wanted[1] and not to_the_end:  # the rest is of no interest
                raise Enough

        with _hooked([] if wanted is None else [(wanted[0], keep)]):
            return seen, self._run(block, index, batch)

    @torch.no_grad()
    def _run(self, block: nn.Module, index: int, batch: int) -> Tensor | None:
        """Return the block's output for one batch, or None if a hook ended the pass."""
        try:
            return self.through(block, index, batch, self.hidden[batch])
        except Enough:
            return None


def logits(model: PreTrainedModel, structure: Structure, batch: Batch, hidden: Tensor) -> Tensor:
    """Return what the model makes of the last block's output `hidden` [B, L, D]: logits [B, L, V]; keeps gradients.

    Everything around the blocks must be loaded.
    """
    with blocks_replaced(structure, lambda *_, **__: hidden):
        mask = None if batch.valid is None else batch.valid.long()
        out = model(input_ids=batch.ids, attention_mask=mask, use_cache=False).logits
    assert isinstance(out, Tensor)
    return out


def _equal(one: tuple[_Inputs, Tensor | None], other: tuple[_Inputs, Tensor | None]) -> bool:
    """Return whether two passes showed the same numbers."""
    pairs = [(a, b) for x, y in zip(one[0], other[0], strict=True) for a, b in zip(x, y, strict=True)]
    ends = [(one[1], other[1])] if one[1] is not None and other[1] is not None else []
    return all(torch.equal(a, b) for a, b in [*pairs, *ends] if isinstance(a, Tensor))


@contextmanager
def _hooked(hooks: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Register forward pre-hooks for the duration of the block."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
