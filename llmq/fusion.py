"""Linear layers that see the same input, as one product: q, k and v of an attention, gate and up of a gated MLP.

`Fused` holds their packed weights one above the other, as one matrix. What each layer has is a view of its part, so
that it multiplies, saves and moves as if it were alone. The one that a model calls first multiplies for all. The
others' parts wait, in the same thread, until they are called with the very same tensor, unchanged; who is called with
another multiplies alone. So it is speed, and never a result, that depends on whether layers see the same input.

It is done for few tokens: there one larger product keeps a GPU busier than several, and is one call. For many a product
is busy anyway, and its result would have to be copied apart. Where gradients are recorded each multiplies alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from llmq import ops

if TYPE_CHECKING:
    from llmq.nn import QuantLinear

# Tokens up to which layers are multiplied at once, by the kind of device. On a CPU the parts of more than one token are
# copied, which takes longer than the calls that are saved.
TOKENS = {"cpu": 1, "cuda": 64}
_UNKNOWN = -1


def unite_(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Let the packed layers of each of `groups`, given by name in the order of calls, be one product where they can."""
    for names in groups:
        for alike in alike_in({name: cast("QuantLinear", model.get_submodule(name)).layer for name in names}):
            Fused([cast("QuantLinear", model.get_submodule(name)) for name in alike])


def alike_in(layers: Mapping[str, ops.Layer]) -> list[list[str]]:
    """Return the names of layers that differ in their number of outputs only, where there are several such."""
    found: dict[ops.Layer, list[str]] = {}
    for name, layer in layers.items():
        found.setdefault(layer._replace(out_features=0), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def in_one_order(columns: Sequence[Tensor | None]) -> bool:
    """Return whether the columns of some weights belong to inputs in the same order; None: in that of the inputs."""
    first, *others = columns
    if first is None:
        return all(other is None for other in others)
    return all(other is not None and torch.equal(first, other) for other in others)


class _Waiting(threading.local):
    """What the first of some layers has computed for the others and they have not taken yet, in one thread."""

    owner: Fused | None = None
    x: Tensor | None = None  # what it is made of
    mark: tuple[int, int] = (_UNKNOWN, _UNKNOWN)  # of that tensor, then
    parts: dict[int, Tensor] | None = None  # by the places of the layers
    finished: bool = True  # whether these are outputs, or the input with its columns in the weight's order

    def clear(self) -> None:
        """Let go of all."""
        self.owner = self.x = self.parts = None


_waiting = _Waiting()


class Fused:
    """Layers that one product computes, as long as their weights are arranged alike.

    Args:
        members: at least two, of as many inputs, in the order in which a model calls them.
    """

    def __init__(self, members: Sequence[QuantLinear]) -> None:
        self.members = tuple(members)
        self.kernel: str | None = None  # row of `ops.KERNELS` that multiplies for all; None: each does for itself
        self.layer = members[0].layer  # the matrix of all
        self.packed: list[Tensor] = []  # the arrangement of all, of which the members have views
        self._views: list[list[Tensor]] = []
        self._widths: list[int] = []  # outputs in the arrangement of each member, padding included
        self._order: Tensor | None = None
        self._tokens = 0
        for place, member in enumerate(self.members):
            member.fused, member.place = self, place
        self.settle_()

    def run(self, member: QuantLinear, x: Tensor) -> Tensor:
        """Return the output [..., N] of a member for `x` [..., K]; no gradient is recorded."""
        found = self._taken(member.place, x) if member.place else self._led(member, x)
        if found is None:
            return member.multiply(member.in_order(x))
        tensor, finished = found
        return tensor if finished else member.multiply(tensor)

    @torch.no_grad()
    def settle_(self) -> None:
        """Hold the weights as one if the members are arranged alike, all for the same kernel and activations."""
        first = self.members[0]
        states = {(member.kernel, member.prepared_for) for member in self.members}
        self.kernel = None
        if first.kernel is None or len(states) > 1:
            return
        each = [member.packed() for member in self.members]
        if not self._holds(each):
            self.release_()
            if not self._is_alike(each):
                return
            self._join_(each)
        self.kernel, self._tokens = first.kernel, TOKENS.get(self.packed[0].device.type, 0)

    def release_(self) -> None:
        """Let go of the weights: a member has taken its own away, or is about to."""
        self.kernel, self._order = None, None
        self.packed, self._views, self._widths = [], [], []
        if _waiting.owner is self:  # for outputs of the weights as they were
            _waiting.clear()

    def _holds(self, each: Sequence[Sequence[Tensor]]) -> bool:
        """Return whether what the members have are the very views that they were given."""
        ours = [id(tensor) for views in self._views for tensor in views]
        return bool(ours) and ours == [id(tensor) for own in each for tensor in own]

    def _is_alike(self, each: Sequence[Sequence[Tensor]]) -> bool:
        """Return whether the arrangements of the members, one above the other, are that of one matrix."""
        row = ops.KERNELS[self.members[0].kernel or ""]
        if row.outputs is None or {len(own) for own in each} != {len(each[0])} or len(each[0]) > len(row.outputs):
            return False
        for member, own in zip(self.members, each, strict=True):
            widths = {tensor.shape[dim] for tensor, dim in zip(own, row.outputs, strict=False)}
            if len(widths) > 1 or (width := widths.pop()) < member.out_features or width % row.rows:
                return False
        for dim, *parts in zip(row.outputs, *each, strict=False):
            shapes = {(*part.shape[:dim], *part.shape[dim + 1 :], part.dtype, part.device) for part in parts}
            if len(shapes) > 1:
                return False
        return in_one_order([member.columns() for member in self.members])

    def _join_(self, each: Sequence[Sequence[Tensor]]) -> None:
        """Make one matrix of the arrangements of the members, and give them views of it."""
        import torch._dynamo

        first = self.members[0]
        outputs = ops.KERNELS[first.kernel or ""].outputs or ()
        self._widths = [own[0].shape[outputs[0]] for own in each]
        self.layer, self._order = first.layer._replace(out_features=sum(self._widths)), first.columns()
        self._views = [[] for _ in self.members]
        for dim, *parts in zip(outputs, *each, strict=False):
            whole = torch.cat(parts, dim)
            torch._dynamo.mark_static_address(whole)  # CUDA graphs would take a copy of it for each replay
            self.packed.append(whole)
            for views, view in zip(self._views, whole.split(self._widths, dim), strict=True):
                views.append(view)
        for member, views in zip(self.members, self._views, strict=True):
            member.share_(views, self._order)

    def _led(self, member: QuantLinear, x: Tensor) -> tuple[Tensor, bool] | None:
        """Return the first member's part and let the others' wait; None: each is to multiply for itself."""
        finished = x.numel() <= self._tokens * self.layer.in_features
        if self.kernel is None or not (finished or self._order is not None):
            return None
        if member._buffers.get("packed_0") is not self._views[0][0]:
            return None  # it is a copy of the member on another device, or somebody has given it another weight
        if (mark := self._mark(x)) is None:
            return None
        rows = member.in_order(x)
        if finished:
            parts = self._parts(ops.matmul(rows, self.packed, self._bias(x), self.kernel, self.layer))
        else:
            parts = [rows] * len(self.members)
        _waiting.owner, _waiting.x, _waiting.mark = self, x, mark
        _waiting.parts, _waiting.finished = dict(enumerate(parts[1:], 1)), finished
        return parts[0], finished

    def _taken(self, place: int, x: Tensor) -> tuple[Tensor, bool] | None:
        """Return the part that waits for the member at `place`, if it is one of `x` as it is now."""
        if _waiting.x is not x or _waiting.owner is not self or _waiting.mark != self._mark(x):
            return None
        assert _waiting.parts is not None, "they come with x"
        part = _waiting.parts.pop(place, None)
        if not _waiting.parts:
            _waiting.clear()
        return None if part is None else (part, _waiting.finished)

    def _mark(self, x: Tensor) -> tuple[int, int] | None:
        """Return what changes with the content of a tensor and with the stream that it is used in; None: do not wait.

        Compilers and inference mode count no changes. There the models' own code is trusted, which has been watched:
        it changed nothing between the calls. Hooks are not.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and type(x) is not Tensor:
            return None
        stream = torch.cuda.current_stream(x.device).cuda_stream if not compiling and x.is_cuda else 0
        if not compiling and not x.is_inference():
            return x._version, stream
        hooked = any(member._forward_hooks or member._forward_pre_hooks for member in self.members)
        return None if hooked else (_UNKNOWN, stream)

    def _bias(self, x: Tensor) -> Tensor | None:
        """Return the biases of all, put together anew: each is a parameter, and may be another by now."""
        if all(member.bias is None for member in self.members):
            return None
        found: list[Tensor] = []
        for member, width in zip(self.members, self._widths, strict=True):
            missing = width if member.bias is None else width - member.out_features
            found += [] if member.bias is None else [member.bias]
            found += [x.new_zeros(missing)] if missing else []
        return torch.cat(found)

    def _parts(self, y: Tensor) -> list[Tensor]:
        """Return the outputs of the members, contiguous as they are of each alone."""
        parts = y.split(self._widths, -1)
        return [
            (part if part.shape[-1] == member.out_features else part[..., : member.out_features]).contiguous()
            for part, member in zip(parts, self.members, strict=True)
        ]
