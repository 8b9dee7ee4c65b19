"""The rows of grids whose levels stand in tables, ``w = levels[code] * scale``: our kernels in C, and Triton's."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from llmq.formats.streams import Stream
from llmq.grids import make_grid
from llmq.kernel import Kernel, Layer
from llmq.rows import reference
from llmq.rows.devices import no_tensor_cores, not_cpu
from llmq.rows.unpacking import codes_of, weight_of
from llmq.types import QuantizedWeight


@lru_cache
def tables_of(grid: str, bits: int, symmetric: bool) -> Tensor | None:
    """Return the tables that groups choose from, float32 [T, 2^bits] on the CPU; None: they have learned their own."""
    made = make_grid(grid, bits, symmetric)
    if made.tables is None or not symmetric:
        return made.tables
    return made.tables[made.zeros[0]][None].contiguous()


def no_tables(layer: Layer) -> str | None:
    """Return why a layer cannot be run by its levels, or None if it can."""
    grid = make_grid(layer.grid, layer.bits, layer.symmetric)
    if grid.tables is None and not grid.learns:
        return f"{layer.grid} grid: looks levels up in tables, of which it has none"
    return None


def _refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    from llmq_kernels import native

    reason = not_cpu(device) or no_tables(layer)
    return reason or native.refuses(layer.bits, layer.in_features, layer.group_size, dtype, table=True)


def _pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    from llmq_kernels import native

    tables = tables_of(layer.grid, layer.bits, layer.symmetric)
    if tables is not None:
        native.check_tables(stream.zeros, tables)
    return [tensor.contiguous() for tensor in reference.pack(stream, layer, dtype)]


def _matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    from llmq_kernels import native

    tables = tables_of(layer.grid, layer.bits, layer.symmetric)
    if tables is None:
        weight = native.Weight(packed[0], None, None, packed[-1].flatten(0, -2))
    else:
        weight = native.Weight(packed[0], packed[1], None if layer.symmetric else packed[2], tables)
    return native.matmul(x, weight, bias, layer.bits, layer.group_size)


def _path(layer: Layer, tokens: int, dtype: torch.dtype) -> str:
    from llmq_kernels import native

    tables = tables_of(layer.grid, layer.bits, layer.symmetric)
    one = tables is not None and layer.symmetric
    return native.path(tokens, layer.in_features, layer.bits, layer.group_size, dtype, table=True, one=one)


def _triton_refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := no_tensor_cores(device, dtype):
        return reason
    from llmq_kernels import lut

    n, k = layer.out_features, layer.in_features
    return no_tables(layer) or lut.refuses(n, k, layer.bits, layer.group_size, dtype)


def _triton_pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    """Return words and tables; after them scales and picked tables, if there are any, or learned levels as read."""
    from llmq_kernels import lut

    codes, plain = codes_of(stream, layer), (layer.bits, layer.group_size, dtype)
    tables = tables_of(layer.grid, layer.bits, layer.symmetric)
    if tables is not None:
        found = lut.pack(codes, stream.scales.float(), tables.to(codes.device), stream.zeros, *plain)
        return [tensor for tensor in found if tensor is not None]
    levels = stream.levels
    assert levels is not None, "its grid learns them"
    found = lut.pack(codes, None, levels.float().flatten(0, -2), None, *plain)
    exact = torch.equal(levels.to(dtype).float(), levels.float())
    return [found.weight, found.table] if exact else [found.weight, found.table, levels]


def _operands(packed: list[Tensor], layer: Layer) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return what `_triton_pack` put together, as the kernel has it."""
    if tables_of(layer.grid, layer.bits, layer.symmetric) is None:
        return packed[0], packed[1], None, None
    return packed[0], packed[1], packed[2], None if layer.symmetric else packed[3]


def _triton_unpack(packed: list[Tensor], layer: Layer) -> QuantizedWeight:
    from llmq_kernels import lut

    n, k = layer.out_features, layer.in_features
    operands = lut.Packed(*_operands(packed, layer))
    codes, scales, table, picked = lut.unpack(operands, n, k, layer.bits, layer.group_size)
    if scales is not None:
        return weight_of(codes, scales, picked, layer)
    levels = packed[2] if len(packed) > 2 else table.view(n, -1, table.shape[1])
    return weight_of(codes, torch.ones(levels.shape[:2], device=codes.device), None, layer, levels)


def _triton_matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    from llmq_kernels import lut

    n, k = layer.out_features, layer.in_features
    return lut.matmul(x, _operands(packed, layer), bias, n, k, layer.bits, layer.group_size)


NATIVE_LUT = Kernel(_refuses, _pack, reference.unpack, _matmul, (0, 0, 0, 0), 1, _path, True)
TRITON_LUT = Kernel(_triton_refuses, _triton_pack, _triton_unpack, _triton_matmul)
