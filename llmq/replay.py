"""Parts of a block that no longer change while its later stages are worked on: run once per batch, then replayed.

A block is passed once for every stage, and once more at the end. Once all linears of its attention are solved, that
returns the same in every pass that follows; what it returned the first time is kept and stands in for it. In a block
that nobody changes all parts are final from the start.

A part is final when all linears in it, and all that run before it returns, are. Nothing is taken on trust: what a part
returned is used only while neither it nor any parameter that it can depend on has been written to since, and the first
pass with a new set of parts is compared with one that runs everything (`Stream` does that).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn


class Enough(Exception):  # noqa: N818  not an error
    """Ends a block's forward pass once all that was wanted has passed."""


@dataclass(frozen=True)
class Part:
    """A module within a block that can be replayed."""

    name: str  # within the block
    last: int  # number of the last stage of which a linear is in it
    final: int  # how many stages must be finished before what it returns is


class Watch:
    """Notes, during one forward pass of a block, what runs before which part returns.

    Args:
        block: the block.
        linears: by name within the block, those that belong to stages, and banks of them.
    """

    def __init__(self, block: nn.Module, linears: Mapping[str, nn.Module]) -> None:
        self._block = block
        self._linears = linears
        within = {name: [one for one in linears if one.startswith(f"{name}.")] for name, _ in block.named_modules()}
        self._inside = {name: found for name, found in within.items() if name and found}
        self._returned: dict[str, list[Any]] = {}  # by part, for each call: the linears that ran before; None: no part
        self._ran: dict[str, None] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch, for the duration of the context."""

        def ran(name: str, *_: Any) -> None:
            self._ran[name] = None

        def returned(name: str, _: nn.Module, __: Any, out: Any) -> None:
            before = None if _tensor_of(out) is None else list(self._ran)
            self._returned.setdefault(name, []).append(before)

        with ExitStack() as stack:
            for name, module in self._linears.items():
                stack.callback(module.register_forward_pre_hook(partial(ran, name)).remove)
            for name in self._inside:
                module = self._block.get_submodule(name)
                stack.callback(module.register_forward_hook(partial(returned, name)).remove)
            yield

    def parts(self, stage_of: Mapping[str, tuple[int, int]]) -> list[Part]:
        """Return what can be replayed, outer modules first; `stage_of` each linear: the first and the last."""
        found = []
        for name, inside in self._inside.items():
            before = self._returned.get(name, [])
            if len(before) == 1 and before[0] is not None:
                last = max(stage_of[linear][1] for linear in inside)
                found.append(Part(name, last, 1 + max(stage_of[linear][1] for linear in (*inside, *before[0]))))
        return sorted(found, key=lambda part: part.name.count("."))


@dataclass(frozen=True)
class _Kept:
    """What a part returned for one batch."""

    out: Any
    tensor: Tensor  # in it
    version: int  # of that
    versions: tuple[int, ...]  # of what it depends on

    @property
    def stale(self) -> bool:
        """Whether somebody has written to it since."""
        return self.tensor._version != self.version


@dataclass(frozen=True)
class Playing:
    """What one forward pass does without."""

    played: tuple[str, ...]  # parts that are replayed
    late: bool  # whether it ends where a part around its target returns, and not before


NOTHING = Playing((), late=False)


class Replay:
    """What is kept of one block's parts, for all batches.

    Args:
        block: the block.
        parts: what can be replayed, outer ones first.
        stage_of: the first and the last stage of each linear or bank, by name within the block.
        frozen: whether no linear of the block will change.
    """

    def __init__(
        self, block: nn.Module, parts: list[Part], stage_of: Mapping[str, tuple[int, int]], *, frozen: bool = False
    ) -> None:
        self.block = block
        self._parts = parts
        self._stage_of = stage_of
        self._frozen = frozen
        self._stages = {block.get_submodule(name): first for name, (first, _) in stage_of.items()}
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._sources = {part.name: self._tensors(part) for part in parts}

    def twin(self, block: nn.Module) -> Replay:
        """Return the same, empty, for a copy of the block that nobody changes."""
        return Replay(block, self._parts, self._stage_of, frozen=True)

    def drop(self, batch: int) -> None:
        """Forget what is kept of a batch, which has passed the block."""
        for key in [key for key in self._kept if key[1] == batch]:
            del self._kept[key]

    @property
    def nbytes(self) -> int:
        """What is held."""
        return sum(kept.tensor.untyped_storage().nbytes() for kept in self._kept.values())

    @contextmanager
    def playing(self, batch: int, target: nn.Module | None, hidden: Tensor, *, final: bool) -> Iterator[Playing]:
        """Replay and keep what can be, for the duration of one forward pass.

        Args:
            batch: the number of the batch.
            target: the module whose inputs are wanted; None: that of no one, but what the block returns.
            hidden: what enters the block; no part that returns more numbers is kept.
            final: whether the batch does not pass the block again.
        """
        end = 1 + max((last for _, last in self._stage_of.values()), default=-1)
        stage = end if target is None else self._stages.get(target, -1)
        played: list[str] = []
        kept: dict[str, _Kept] = {}
        late = False
        with ExitStack() as stack:
            for part in self._parts:
                if stage < (part.last if self._frozen else part.final) or _within(part.name, played):
                    continue
                module, versions = self.block.get_submodule(part.name), self._versions(part)
                known = self._kept.get((part.name, batch))
                if known is not None and known.versions == versions and stage > part.last:
                    stack.enter_context(_standing_in(module, known.out))
                    played.append(part.name)
                elif not final:
                    ends = stage == part.last and any(inner is target for inner in module.modules())
                    late |= ends
                    keep = partial(_keep, kept, part.name, versions, hidden.numel(), ends)
                    stack.callback(module.register_forward_hook(keep).remove)
            yield Playing(tuple(played), late)
        self._kept |= {(name, batch): found for name, found in kept.items()}
        names = [name for name, number in self._kept if number == batch]
        for name in names:
            if self._kept[name, batch].stale or _within(name, names):
                del self._kept[name, batch]

    def _tensors(self, part: Part) -> list[Tensor]:
        """Return the parameters and buffers that a part's output can depend on."""
        later = [self.block.get_submodule(name) for name, (first, _) in self._stage_of.items() if first >= part.final]
        to_come = {inner for module in later for inner in module.modules()}
        owners = [module for module in self.block.modules() if module not in to_come]
        tensors = [x for module in owners for x in (*module._parameters.values(), *module._buffers.values())]
        return [tensor for tensor in tensors if tensor is not None]

    def _versions(self, part: Part) -> tuple[int, ...]:
        return tuple(tensor._version for tensor in self._sources[part.name])


def _keep(
    kept: dict[str, _Kept], name: str, versions: tuple[int, ...], most: int, ends: bool, _: Any, __: Any, out: Any
) -> None:
    """Keep what a part returns, if that is no more than `most` numbers in memory of their own."""
    tensor = _tensor_of(out)
    if tensor is not None and tensor.untyped_storage().nbytes() <= most * tensor.itemsize:
        kept[name] = _Kept(out, tensor, tensor._version, versions)
    if ends:
        raise Enough


@contextmanager
def _standing_in(module: nn.Module, out: Any) -> Iterator[None]:
    """Let a module return `out`, whatever it is called with, for the duration of the context."""
    before, everything = vars(module).get("forward"), cast("Any", module)
    everything.forward = lambda *_, **__: out
    try:
        yield
    finally:
        if before is None:
            del everything.forward
        else:
            everything.forward = before


def _tensor_of(out: Any) -> Tensor | None:
    """Return the one tensor that a module returns, alone or in a tuple of nothing else but None; None: it is not so."""
    parts = out if isinstance(out, tuple) else (out,)
    tensors = [part for part in parts if part is not None]
    return tensors[0] if len(tensors) == 1 and isinstance(tensors[0], Tensor) else None


def _within(name: str, others: Iterable[str]) -> bool:
    """Return whether a module of this name is inside one of `others`."""
    return any(name.startswith(f"{other}.") for other in others)
