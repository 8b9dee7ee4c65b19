"""Packed layers read from files straight into a model, several at a time.

transformers takes about a hundred microseconds for each tensor that it loads, and packed layers have four; preparing
them one by one takes as long again. Here layers of one shape are read into one tensor, arranged for their kernel at
once, and divided: a packed model loads about as fast as a dense one. Large layers, and those whose files are not plain,
go alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq import ops
from llmq.checkpoint import ShardReader, TensorInfo
from llmq.embedding import QuantEmbedding
from llmq.errors import CheckpointError
from llmq.formats import streams
from llmq.nn import QuantLinear
from llmq.packed import PackedLayer

_TOGETHER = 2**20  # bytes in files of layers that are read together: temporary memory is a few times as much


@dataclass(frozen=True)
class Unread:
    """Packed layers of a model that are still in files.

    Args:
        infos: headers of the files.
        places: layers by the names of their modules, which are empty `QuantLinear` or `QuantEmbedding`.
        device: where they are to be.
    """

    infos: Mapping[str, TensorInfo]
    places: Mapping[str, PackedLayer]
    device: torch.device

    @property
    def pattern(self) -> str:
        """A regular expression that finds the names of their tensors, and of no dense ones."""
        parts = {local for layer in self.places.values() for local in layer.keys}
        return rf"\.(?:{'|'.join(sorted(parts))})$"

    @torch.no_grad()
    def read_(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Read them into their places in `model`, prepared for activations of `dtype`.

        Raises:
            CheckpointError: a file cannot be read, or the tensors of a layer do not fit each other.
        """
        layers = {name: layer for name, layer in model.named_modules() if name in self.places}
        with ShardReader(self.infos) as reader:
            for names in self._batches(layers, dtype):
                modules = [_packed(layers, name) for name in names]
                first = self.places[names[0]]
                stacks = {}
                for local in first.keys:
                    stack = reader.read_alike([self.places[name].keys[local] for name in names])
                    stacks[local] = stack.to(self.device)
                linears = [module for module in modules if isinstance(module, QuantLinear)]
                if not linears or not _hold_together(linears, stacks, dtype):
                    _hold_alone(modules, stacks, dtype, names)

    def _batches(self, layers: Mapping[str, nn.Module], dtype: torch.dtype) -> Iterator[list[str]]:
        """Yield the names of layers that are read together."""
        alike: dict[object, list[str]] = {}
        for name, layer in self.places.items():
            stored, linear = layer.stored, isinstance(_packed(layers, name), QuantLinear)
            kind = (linear, stored.spec, stored.out_features, stored.in_features, *stored.layout.items())
            alike.setdefault(kind, []).append(name)
        for names in alike.values():
            layer = self.places[names[0]]
            nbytes = sum(self.infos[key].nbytes for key in layer.keys.values())
            size = 1
            module = _packed(layers, names[0])
            if isinstance(module, QuantLinear):
                kernel = ops.KERNELS[ops.choose(module.layer, self.device, dtype)]
                if kernel.outputs is not None and module.out_features % kernel.rows == 0:
                    size = max(1, _TOGETHER // nbytes)
            for start in range(0, len(names), size):
                yield names[start : start + size]


def prepare_(module: QuantLinear | QuantEmbedding, name: str, dtype: torch.dtype) -> None:
    """Arrange a layer for its kernel, unless it is on the meta device, where nothing can be arranged.

    Raises:
        CheckpointError: its tensors do not fit each other; says that `name` has them.
    """
    if any(buffer.is_meta for buffer in module.buffers()):
        return
    try:
        module.prepare_(dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _hold_together(modules: Sequence[QuantLinear], stacks: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    """Give layers what their kernel makes of the stored tensors, one above the other in `stacks` [L, …].

    Return False, with nothing done, where these are not plain.
    """
    one = modules[0]
    stream = streams.from_stored(stacks, one.spec, one.in_features)
    if stream is None:
        return False
    tall = streams.Stream(*(None if part is None else part.flatten(0, 1) for part in stream))  # type: ignore[arg-type]
    layer = one.layer._replace(out_features=len(modules) * one.out_features)
    name = ops.choose(one.layer, tall.words.device, dtype)
    kernel = ops.KERNELS[name]
    packed = kernel.pack(tall, layer, dtype)
    rounded = ops.rounds(name, tall.scales, dtype)
    if len(modules) == 1:
        one.hold_(name, dtype, packed, tall.scales if rounded else None)
        return True
    assert kernel.outputs is not None, "else they go alone"
    parts = [tensor.chunk(len(modules), dim) for tensor, dim in zip(packed, kernel.outputs, strict=False)]
    for number, module in enumerate(modules):
        own = [part[number].contiguous() for part in parts]
        module.hold_(name, dtype, own, stream.scales[number] if rounded else None)
    return True


def _hold_alone(
    modules: Sequence[QuantLinear | QuantEmbedding],
    stacks: Mapping[str, Tensor],
    dtype: torch.dtype,
    names: Sequence[str],
) -> None:
    """Give each layer its stored tensors, and let it prepare them itself."""
    for number, (name, module) in enumerate(zip(names, modules, strict=True)):
        module.fill_({local: stack[number] for local, stack in stacks.items()})
        prepare_(module, name, dtype)


def _packed(layers: Mapping[str, nn.Module], name: str) -> QuantLinear | QuantEmbedding:
    module = layers[name]
    assert isinstance(module, (QuantLinear, QuantEmbedding)), "it was put there"
    return module
