"""The row that runs everything but vectors, everywhere: dequantize, and multiply densely."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmq.formats import bits as bitstream
from llmq.formats.streams import Stream
from llmq.grids import make_grid
from llmq.grids.vq import VECTORS
from llmq.kernel import Kernel, Layer
from llmq.rows.unpacking import weight_of
from llmq.types import QuantizedWeight


def _refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    return f"takes codes of single weights, not those of the {layer.grid} grid" if layer.grid in VECTORS else None


def _matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    weight = unpack(packed, layer).dequantize().to(x.dtype)
    return linear(x, weight, None if bias is None else bias.to(x.dtype))


def pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    """Return codes as a stream along the inputs, the scales zeros that are not all the same, and learned levels."""
    return [tensor for tensor in stream if tensor is not None]


def unpack(packed: list[Tensor], layer: Layer) -> QuantizedWeight:
    """Return the weight that `pack` packed."""
    codes = bitstream.unpack(packed[0], layer.bits, layer.in_features)
    learned = packed[-1] if make_grid(layer.grid, layer.bits, layer.symmetric).learns else None
    return weight_of(codes, packed[1], None if layer.symmetric else packed[2], layer, learned)


REFERENCE = Kernel(_refuses, pack, unpack, _matmul, (0, 0, 0, 0), as_read=True)
