"""What a model passes to its blocks besides the hidden states: recorded once, for blocks that then run by themselves.

Masks and rotary tables differ between the blocks of one model, so every block's call is recorded. The model runs with
the identity in place of its blocks, and computes everything around them itself. Where an encoder feeds a decoder, two
stacks of blocks run one after the other, and what the first returns is an argument of the second's blocks: it depends
on the encoder's weights, so only its place is recorded. It travels beside the decoder's own hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError, SpecError
from llmq.families import UNUSED, Structure, blocks_replaced, same_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HELP = "docs/families.md tells how to add a Family"


class _Memory:
    """Stands in a call for what the stack before this one returns."""


_MEMORY = _Memory()


@dataclass(frozen=True)
class Call:
    """Arguments of one call of one block, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    memory: int = 0  # size of the states of the stack before this one, which come beside the block's own

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return what `block` makes of `hidden`, [B, L, D] or, with memory beside it, [B, L, D + memory]."""
        own, memory = hidden, None
        if self.memory:
            sizes = [hidden.shape[-1] - self.memory, self.memory]
            # contiguous, or every linear that sees them makes a copy of its own
            own, memory = (part.contiguous() for part in hidden.split(sizes, dim=-1))
        args = [memory if x is _MEMORY else x for x in self.args]
        kwargs = {name: memory if x is _MEMORY else x for name, x in self.kwargs.items()}
        out = block(own, *args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        assert isinstance(out, Tensor), "what a block returns was recorded"
        return out if memory is None else torch.cat([out, memory], dim=-1)

    def sharing(self, other: Call) -> Call:
        """Return the call with every tensor that equals its counterpart in `other` replaced by it."""
        return Call(_shared(self.args, other.args), _shared(self.kwargs, other.kwargs), self.memory)


@torch.no_grad()
def record(
    model: PreTrainedModel, structure: Structure, ids: Tensor, valid: Tensor | None
) -> tuple[Tensor, list[Call]]:
    """Return what enters the first block [B, L, D], and the call of every block.

    Everything around the blocks must be loaded and, where the blocks of a stack share what its first computes, that.

    Args:
        model: the model.
        structure: its blocks.
        ids: int64 [B, L].
        valid: bool [B, L]; None where every token is.

    Raises:
        SpecError: the model does not call each block once, in order, with what the block before it returned.
    """
    recorder = _Recorder(model, structure)
    with _ended(model, structure, recorder.memory), blocks_replaced(structure, recorder.identity):
        try:
            _forward(model, ids, valid)
        except (LlmqError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # models fail in ways of their own at what they did not expect
            raise SpecError(
                f"{type(model).__name__}: its forward pass fails with blocks that return their input, after "
                f"{len(recorder.calls)} of {len(structure.blocks)} ({' '.join(str(error).split())[:200]}); {_HELP}"
            ) from error
    return recorder.result()


@torch.no_grad()
def joined(
    model: PreTrainedModel, structure: Structure, end: int, hidden: Tensor, ids: Tensor, valid: Tensor | None
) -> Tensor:
    """Return what enters the stack behind block number `end`, which returned `hidden` [B, L, D].

    That is the next stack's own states and, beside them, what this stack returns: [B, L, D' + D]. Everything around
    the blocks must be loaded. For other arguments and errors see `record`.
    """
    memory: list[Tensor] = []
    entering: list[Tensor] = []
    count = iter(range(len(structure.blocks)))

    def stand_in(x: Tensor, *_: Any, **__: Any) -> Tensor:
        index = next(count)
        if index > end:
            entering.append(x)
            raise _Entered
        return hidden if index == end else x

    with _ended(model, structure, memory), blocks_replaced(structure, stand_in):
        try:
            _forward(model, ids, valid)
        except _Entered:
            return torch.cat([entering[0], memory[-1]], dim=-1)
    raise SpecError(f"{type(model).__name__}: nothing runs behind {structure.names[end]}; {_HELP}")


class _Entered(Exception):  # noqa: N818  not an error
    """Ends a forward pass at the first block of a stack."""


class _Recorder:
    """Blocks that return their input and write down what they are called with."""

    def __init__(self, model: PreTrainedModel, structure: Structure) -> None:
        self.name = type(model).__name__
        self.structure = structure
        self.first: Tensor | None = None
        self.calls: list[Call] = []
        self.memory: list[Tensor] = []  # of each stack that has ended, what it returns
        self._last: Tensor | None = None  # what the block before returned
        self._shared: tuple[Any, ...] = ()  # what it returned besides

    def identity(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stand for the next block."""
        structure, index = self.structure, len(self.calls)
        if index == len(structure.blocks):
            self._refuse("calls more")
        if index in structure.starts:
            self._shared = ()
            if structure.family.shared:
                block = structure.blocks[index]
                self._shared = type(block).forward(block, hidden, *args, **kwargs)[1:]
        elif self._last is None or hidden.shape != self._last.shape or not same_memory(hidden, self._last):
            shapes = [list(x.shape) for x in (hidden, self._last) if x is not None]
            raise SpecError(
                f"{self.name}: {structure.names[index]} does not get what the block before it returned ({shapes[0]} "
                f"against {shapes[-1]}); llmq handles models that pass hidden states from block to block unchanged; "
                f"{_HELP}"
            )
        if any(x is UNUSED for x in (*args, *kwargs.values())):
            raise SpecError(
                f"{self.name}: {structure.names[index]} gets what the block before it returns beside its hidden "
                f"states; a Family with shared=True says that the first block computes it for all; {_HELP}"
            )
        kept = {name: x for name, x in kwargs.items() if name not in ("past_key_values", "use_cache")}
        self.calls.append(self._marked(index, args, kept))
        self.first = hidden if self.first is None else self.first
        self._last = hidden
        return (hidden, *self._shared) if self._shared else hidden

    def result(self) -> tuple[Tensor, list[Call]]:
        """Return what entered the first block, and all calls."""
        if self.first is None or len(self.calls) < len(self.structure.blocks):
            self._refuse(f"calls {len(self.calls)}")
        assert self.first is not None
        return self.first, self.calls

    def _marked(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return the call with the states of the stack before this one left out."""
        if index < self.structure.starts[-1] or len(self.structure.starts) == 1:
            return Call(args, kwargs)
        memory = self.memory[-1] if self.memory else None
        marked = tuple(_MEMORY if x is memory else x for x in args if memory is not None)
        named = {name: _MEMORY if x is memory else x for name, x in kwargs.items()}
        if memory is None or not any(x is _MEMORY for x in (*marked, *named.values())):
            raise SpecError(
                f"{self.name}: {self.structure.names[index]} does not get what the stack of blocks before it returns; "
                f"llmq handles encoders whose output the decoder's blocks attend to; {_HELP}"
            )
        return Call(marked, named, memory.shape[-1])

    def _refuse(self, seen: str) -> None:
        raise SpecError(
            f"{self.name}: a forward pass {seen} of the {len(self.structure.blocks)} blocks from "
            f"{self.structure.names[0]} to {self.structure.names[-1]}; llmq handles models that call each block once, "
            f"in order; {_HELP}"
        )


def _forward(model: PreTrainedModel, ids: Tensor, valid: Tensor | None) -> None:
    """Run the model without its head, where it can; an encoder and its decoder get the same tokens."""
    mask = None if valid is None else valid.long()
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    model.base_model(**inputs)


@contextmanager
def _ended(model: nn.Module, structure: Structure, memory: list[Tensor]) -> Iterator[None]:
    """Append to `memory` what the module around each stack but the last returns."""

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        memory.append(out if isinstance(out, Tensor) else out[0])

    handles = [model.get_submodule(structure.around(end)).register_forward_hook(keep) for end in structure.ends]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shared(new: Any, old: Any) -> Any:
    """Return `new` with every tensor that equals its counterpart in `old` replaced by it: one copy for all batches."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        same = new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old)
        return old if same else new
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_shared(n, o) for n, o in zip(new, old, strict=True))
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _shared(value, old.get(key)) for key, value in new.items()}
    return new
