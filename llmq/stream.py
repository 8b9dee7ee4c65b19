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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmq.calibration import Calibration
from llmq.errors import SpecError
from llmq.families import Linear, Structure, blocks_replaced, same_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_PER_BATCH = 8192  # large enough for efficient products, small next to a block's weights


@dataclass(frozen=True)
class Batch:
    """Calibration windows that pass a block together."""

    ids: Tensor  # int64 [B, L]
    valid: Tensor | None  # bool [B, L]; None where every token is valid
    windows: slice  # which of all windows they are: text, then random tokens, then what is held out
    held_out: bool  # whether they only judge
    text: bool  # whether they are text, and not random tokens
    counted: Tensor | None  # bool [B, L]; the tokens whose outputs matter; None where all do
    calls: list[_Call]  # per block, what the model passes to it besides the hidden states

    def pick(self, t: Tensor) -> Tensor:
        """Return the entries of `t` [B, L, D] at the tokens whose outputs matter, float32 [T, D]."""
        return (t.flatten(0, -2) if self.counted is None else t[self.counted]).float()


@dataclass(frozen=True)
class Stage:
    """Linears that see the same input, hence share a Hessian, in the order in which they run."""

    linears: list[Linear]
    calls: int  # how often a forward pass of the block runs the first of them


class _Enough(Exception):  # noqa: N818  not an error
    """Ends a block's forward pass once the inputs that were wanted have passed."""


class Stream:
    """Hidden states of all calibration batches in front of one block, and the arguments of every block's call."""

    def __init__(self, batches: list[Batch], hidden: list[Tensor]) -> None:
        self.batches = batches
        self.hidden = hidden  # per batch [B, L, D]

    @classmethod
    def start(
        cls,
        model: PreTrainedModel,
        structure: Structure,
        calibration: Calibration,
        device: torch.device,
        *,
        random: Calibration | None = None,
        held_out: Calibration | None = None,
        batch_tokens: int | None = None,
    ) -> Stream:
        """Return the stream in front of the first block; everything around the blocks must be loaded on `device`."""
        stream, first = cls([], []), 0
        size = max(1, (batch_tokens or TOKENS_PER_BATCH) // calibration.input_ids.shape[1])
        for part in (calibration, random, held_out):
            if part is None:
                continue
            count, masks = part.input_ids.shape[0], part.attention_mask
            for start in range(0, count, size):
                ids = part.input_ids[start : start + size].to(device)
                valid = None if masks is None else masks[start : start + size].to(device)
                hidden, calls = _record(model, structure, ids, valid)
                if stream.batches:
                    calls = [_shared(new, old) for new, old in zip(calls, stream.batches[-1].calls, strict=True)]
                windows = slice(first + start, first + start + ids.shape[0])
                counted = valid if part.loss_mask is None else part.loss_mask[start : start + size].to(device)
                stream.batches.append(Batch(ids, valid, windows, part is held_out, part is not random, counted, calls))
                stream.hidden.append(hidden)
            first += count
        return stream

    def split(self, *, random: bool) -> tuple[list[int], list[int]]:
        """Return the numbers of the batches to learn from, those of random tokens only if wanted, and of the judges.

        The judges are what is held out; where nothing is, they are the same batches.
        """
        train = [i for i, batch in enumerate(self.batches) if not batch.held_out and (random or batch.text)]
        return train, [i for i, batch in enumerate(self.batches) if batch.held_out] or train

    def fork(self) -> Stream:
        """Return a stream at the same place that moves on its own."""
        return Stream(self.batches, list(self.hidden))

    def stages(self, block: nn.Module, index: int, linears: list[Linear]) -> list[Stage]:
        """Return the stages of block number `index`, observed on one sample.

        Raises:
            SpecError: a linear is never called, so that no Hessian can be had for it.
        """
        inputs: list[Tensor] = []  # kept alive, so that no two of them share an address
        order: dict[str, list[int]] = {}  # linear -> position of its inputs

        def observe(linear: Linear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen = next((i for i, x in enumerate(inputs) if same_memory(x, args[0])), len(inputs))
                if seen == len(inputs):
                    inputs.append(args[0])
                order.setdefault(linear.name, []).append(seen)

            return hook

        with _hooked([(linear.module, observe(linear)) for linear in linears]):
            self._run(block, index, 0)
        for linear in linears:
            if linear.name not in order:
                raise SpecError(f"{linear.name}: never used in a forward pass; leave it out with --ignore")
        by_input: dict[tuple[int, ...], list[Linear]] = {}
        for name, seen in order.items():  # in the order of first use
            by_input.setdefault(tuple(seen), []).append(next(x for x in linears if x.name == name))
        return [Stage(members, calls=len(seen)) for seen, members in by_input.items()]

    def inputs(self, block: nn.Module, index: int, stage: Stage, batch: int, *, passing: bool = False) -> list[Tensor]:
        """Return what enters the linears of `stage` for one batch: a tensor [..., K] for each call.

        With `passing`, the batch also moves on to what the block returns, which is then final.
        """
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            if len(seen) == stage.calls and not passing:  # the rest of the block is of no interest
                raise _Enough

        with _hooked([(stage.linears[0].module, keep)]):
            out = self._run(block, index, batch)
        if passing:
            assert out is not None, "no hook ends this pass"
            self.hidden[batch] = out
        return seen

    def advance(self, block: nn.Module, index: int) -> None:
        """Move the hidden states of all batches through block number `index`."""
        for batch in range(len(self.batches)):
            out = self._run(block, index, batch)
            assert out is not None, "no hook ends this pass"
            self.hidden[batch] = out

    def through(self, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Return what block number `index` makes of `hidden` [B, L, D], called as for this batch; keeps gradients."""
        call = self.batches[batch].calls[index]
        out = block(hidden, *call.args, **call.kwargs)
        out = out[0] if isinstance(out, tuple) else out
        assert isinstance(out, Tensor)
        return out

    @torch.no_grad()
    def _run(self, block: nn.Module, index: int, batch: int) -> Tensor | None:
        """Return the block's output for one batch, or None if a hook ended the pass."""
        try:
            return self.through(block, index, batch, self.hidden[batch])
        except _Enough:
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


@dataclass(frozen=True)
class _Call:
    """Arguments of one call of one block, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@torch.no_grad()
def _record(
    model: PreTrainedModel, structure: Structure, ids: Tensor, valid: Tensor | None
) -> tuple[Tensor, list[_Call]]:
    """Return what enters the first block, and the call of every block, with each block replaced by the identity."""
    calls: list[_Call] = []
    first: list[Tensor] = []

    def identity(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(_Call(args, {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}))
        first.append(hidden)
        return hidden

    with blocks_replaced(structure, identity):
        model.base_model(input_ids=ids, attention_mask=None if valid is None else valid.long(), use_cache=False)
    if len(calls) != len(structure.blocks):
        raise SpecError(
            f"{type(model).__name__}: a forward pass calls {len(calls)} of the {len(structure.blocks)} blocks of "
            f"{structure.blocks_name}; llmq handles models that call each block once, in order"
        )
    return first[0], calls


def _shared(new: Any, old: Any) -> Any:
    """Return `new` with every tensor that equals its counterpart in `old` replaced by it: one copy for all batches."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        same = new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old)
        return old if same else new
    if isinstance(new, _Call):
        return _Call(_shared(new.args, old.args), _shared(new.kwargs, old.kwargs))
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_shared(n, o) for n, o in zip(new, old, strict=True))
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _shared(value, old.get(key)) for key, value in new.items()}
    return new


@contextmanager
def _hooked(hooks: list[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Register forward pre-hooks for the duration of the block."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
