"""What all rows share: the codes of a stream, and a weight from what a kernel package unpacked."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.formats import bits as bitstream
from llmq.formats.streams import Stream
from llmq.grids import make_grid
from llmq.kernel import Layer
from llmq.types import QuantizedWeight


def weight_of(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, layer: Layer, levels: Tensor | None = None
) -> QuantizedWeight:
    """Return a weight from what a kernel package unpacked; no zeros means that all are the one that the grid has."""
    grid = make_grid(layer.grid, layer.bits, layer.symmetric)
    if zeros is None:
        zeros = torch.full_like(scales, grid.zeros[0])
    learned = None if levels is None else levels.float()
    return QuantizedWeight(codes, scales.float(), zeros.float(), grid, layer.group_size, learned)


def codes_of(stream: Stream, layer: Layer) -> Tensor:
    """Return the codes of a stream, uint8 [N, K]."""
    return bitstream.unpack(stream.words, layer.bits, layer.in_features)
