"""The rows of the Triton kernels."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from llmq.formats.streams import Stream
from llmq.kernel import Grouped, Kernel, Layer
from llmq.rows.devices import no_tensor_cores
from llmq.rows.unpacking import codes_of, weight_of
from llmq.types import QuantizedWeight

# which module's layout those of others are, where experts are multiplied at once
_PACKINGS = {
    "llmq_kernels.w4a16": "llmq_kernels.w4a16",
    "llmq_kernels.w3a16": "llmq_kernels.w4a16",
    "llmq_kernels.w2a16": "llmq_kernels.w2a16",
    "llmq_kernels.w8a16": "llmq_kernels.w8a16",
}
_TILE = 128  # outputs that kernels pad to, `layout.TILE_N` there


def triton(module: str) -> Kernel:
    """Return the row of a Triton dequant-GEMM, `llmq_kernels.<module>`; Triton is imported when a GPU asks for it."""

    def refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        if reason := no_tensor_cores(device, dtype):
            return reason
        n, k, bits = layer.out_features, layer.in_features, layer.bits
        return _reason(import_module(module).refuses(n, k, bits, layer.group_size, dtype))

    def pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        codes, scales = codes_of(stream, layer), stream.scales.float()
        zeros = None if stream.zeros is None else stream.zeros.float()
        packed = import_module(module).pack(codes, scales, zeros, layer.group_size, dtype)
        return list(packed.tensors())

    def unpack(packed: list[Tensor], layer: Layer) -> QuantizedWeight:
        n, k = layer.out_features, layer.in_features
        codes, scales, zeros = import_module(module).unpack(packed, n, k, layer.group_size)
        return weight_of(codes, scales, zeros, layer)

    def matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
        n, k = layer.out_features, layer.in_features
        y: Tensor = import_module(module).matmul(x, packed, bias, n, k, layer.group_size)
        return y

    return Kernel(refuses, pack, unpack, matmul, (0, 1, 1), _TILE, grouped=_experts(module))


def _experts(module: str) -> Grouped | None:
    """Return how experts packed by `module` are multiplied at once; None: the grouped kernel does not know how."""
    packing = _PACKINGS.get(module)
    if packing is None:
        return None

    def matmul(
        x: Tensor, packed: list[Tensor], bias: Tensor | None, routes: list[Tensor], layer: Layer, parts: int
    ) -> Tensor:
        from llmq_kernels.routing import Routes

        grouped, layout = import_module("llmq_kernels.grouped"), import_module(packing).LAYOUT
        experts = grouped.experts_of(layout, packed, parts, layer.out_features, layer.in_features, layer.group_size)
        picked, *ordered = routes
        y: Tensor = grouped.matmul(x, experts, bias, Routes(*ordered) if ordered else Routes(picked, None))
        return y

    return Grouped(matmul, _route)


def _route(picked: Tensor, experts: int) -> list[Tensor]:
    from llmq_kernels.routing import route

    routes = route(picked, experts)
    return [] if routes.firsts is None else [routes.rows, routes.firsts]


def _reason(found: object) -> str | None:
    return None if found is None else str(found)
