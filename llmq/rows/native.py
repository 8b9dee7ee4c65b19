"""The rows of our own kernels in C, which multiply by the stream as it is read."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.formats.streams import Stream
from llmq.kernel import Grouped, Kernel, Layer
from llmq.rows import reference
from llmq.rows.devices import not_cpu


def _refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    from llmq_kernels import native

    return not_cpu(device) or native.pairs_refuse(layer.bits, layer.in_features, layer.group_size, dtype)


def _float_refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    from llmq_kernels import native

    return not_cpu(device) or native.refuses(layer.bits, layer.in_features, layer.group_size, dtype)


def _pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    from llmq_kernels import native

    native.check_zeros(stream.zeros, layer.bits)
    return [tensor.contiguous() for tensor in reference.pack(stream, layer, dtype)]


def _operands(packed: list[Tensor], layer: Layer) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what `_pack` put together, as the kernels have it."""
    return packed[0], packed[1], None if layer.symmetric else packed[2]


def _matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    from llmq_kernels import native

    weight = _operands(packed, layer)
    return native.matmul(x, weight, bias, layer.bits, layer.group_size)


def _path(layer: Layer, tokens: int, dtype: torch.dtype) -> str:
    from llmq_kernels import native

    return native.path(tokens, layer.in_features, layer.bits, layer.group_size, dtype)


def _grouped(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, routes: list[Tensor], layer: Layer, parts: int
) -> Tensor:
    from llmq_kernels.native import grouped

    weight = _operands(packed, layer)
    return grouped.matmul(x, weight, bias, routes[0], layer.bits, layer.group_size, parts=parts)


_SHARED = (_pack, reference.unpack, _matmul, (0, 0, 0), 1, _path, True, Grouped(_grouped))
NATIVE, NATIVE_FLOAT = Kernel(_refuses, *_SHARED), Kernel(_float_refuses, *_SHARED)
