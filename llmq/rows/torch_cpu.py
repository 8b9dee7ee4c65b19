"""The rows of PyTorch's own int4 and int8 operators on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.formats.streams import Stream
from llmq.kernel import Kernel, Layer
from llmq.rows.devices import not_cpu
from llmq.rows.unpacking import codes_of, weight_of
from llmq.types import QuantizedWeight


def _int4_refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    from llmq_kernels import cpu

    return not_cpu(device) or cpu.int4_refuses(
        layer.out_features, layer.in_features, layer.bits, layer.group_size, dtype
    )


def _int4_pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    from llmq_kernels import cpu

    return list(cpu.pack_int4_stream(stream.words, stream.scales, stream.zeros, layer.group_size))


def _int4_unpack(packed: list[Tensor], layer: Layer) -> QuantizedWeight:
    from llmq_kernels import cpu

    n, k = layer.out_features, layer.in_features
    return weight_of(*cpu.unpack_int4(packed[0], packed[1], n, k, layer.group_size), layer)


def _int4_matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    from llmq_kernels import cpu

    n, k = layer.out_features, layer.in_features
    return cpu.int4_matmul(x, packed[0], packed[1], bias, n, k, layer.group_size)


def _int8_refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    from llmq_kernels import cpu

    if reason := not_cpu(device):
        return reason
    if not layer.symmetric:
        return "needs a symmetric grid"
    return cpu.int8_refuses(layer.out_features, layer.in_features, layer.bits, layer.group_size, dtype)


def _int8_pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    from llmq_kernels import cpu

    return list(cpu.pack_int8(codes_of(stream, layer), stream.scales, None))


def _int8_unpack(packed: list[Tensor], layer: Layer) -> QuantizedWeight:
    from llmq_kernels import cpu

    return weight_of(*cpu.unpack_int8(packed[0], packed[1]), layer)


def _int8_matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    from llmq_kernels import cpu

    return cpu.int8_matmul(x, packed[0], packed[1], bias, layer.out_features, layer.in_features)


INT4PACK = Kernel(_int4_refuses, _int4_pack, _int4_unpack, _int4_matmul, (0, 1), 64)
INT8PACK = Kernel(_int8_refuses, _int8_pack, _int8_unpack, _int8_matmul, (0, 0))
