"""The rows of our own kernels in C, which multiply by the stream as it is read."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.formats.streams import Stream
from llmq.kernel import Grouped, Kernel, Layer
from llmq.rows import reference


def _refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    from llmq_kernels import native

    if device.type != "cpu":
        return f"runs on a CPU, not on {device.type}"
    return native.pairs_refuse(layer.bits, layer.in_features, layer.group_size, dtype)


def _float_refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    from llmq_kernels import native

    if device.type != "cpu":
        return f"runs on a CPU, not on {device.type}"
    return native.refuses(layer.bits, layer.in_features, layer.group_size, dtype)


def _pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    from llmq_kernels import native

    native.check_zeros(stream.zeros, layer.bits)
    return [tensor.contiguous() for tensor in reference.pack(stream, layer, dtype)]


def _matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    from llmq_kernels import native

    weight = (packed[0], packed[1], None if layer.symmetric else packed[2])
    return native.matmul(x, weight, bias, layer.bits, layer.group_size)


def _path(layer: Layer, tokens: int, dtype: torch.dtype) -> str:
    from llmq_kernels import native

    return native.path(tokens, layer.in_features, layer.bits, layer.group_size, dtype)


def _grouped(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, routes: list[Tensor], layer: Layer, parts: int
) -> Tensor:
    from llmq_kernels.native import grouped

    weight = (packed[0], packed[1], None if layer.symmetric else packed[2])
    return grouped.matmul(x, weight, bias, routes[0], layer.bits, layer.group_size, parts=parts)


_SHARED = (_pack, reference.unpack, _matmul, (0, 0, 0), 1, _path, True, Grouped(_grouped))
NATIVE, NATIVE_FLOAT = Kernel(_refuses, *_SHARED), Kernel(_float_refuses, *_SHARED)
