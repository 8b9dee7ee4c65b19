"""What a row of the table of kernels is, and how a kernel sees a packed layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats.streams import Stream
from llmq.types import QuantizedWeight


class Layer(NamedTuple):
    """A packed layer, as far as a kernel cares."""

    bits: int
    group_size: int  # columns per group, the number of inputs where there is one group
    symmetric: bool  # whether every zero is the same
    out_features: int
    in_features: int
    grid: str = "uniform"  # a name in llmq.grids.GRIDS


class Grouped(NamedTuple):
    """How a kernel multiplies with the matrices of many experts at once; a row is a token at one of its experts."""

    # x [R / S, K], packed tensors of E * P matrices each with one more dimension in front, those of an expert together,
    # bias [E * P, N] or None, routes, P -> [R, P * N]
    matmul: Callable[[Tensor, list[Tensor], Tensor | None, list[Tensor], Layer, int], Tensor]
    # picked experts int64 [R] and E -> the routes that `matmul` takes after them; the shapes depend on nothing else
    route: Callable[[Tensor, int], list[Tensor]] | None = None


class Kernel(NamedTuple):
    """One row of `llmq.rows.KERNELS`; the docstring of each function's result says what it needs to."""

    refuses: Callable[[Layer, torch.device, torch.dtype], str | None]  # why it cannot run the layer, or None
    pack: Callable[[Stream, Layer, torch.dtype], list[Tensor]]  # its arrangement of the weight
    unpack: Callable[[list[Tensor], Layer], QuantizedWeight]  # and back
    matmul: Callable[[Tensor, list[Tensor], Tensor | None, Layer], Tensor]  # x [M, K] -> [M, N]
    # which dimension of each packed tensor is that of the outputs, so that layers one above the other can be packed at
    # once and divided; None: they cannot
    outputs: tuple[int, ...] | None = None
    rows: int = 1  # outputs of each of these layers have to be a multiple of this
    path: Callable[[Layer, int, torch.dtype], str] | None = None  # what it does with M tokens, if that depends on M
    as_read: bool = False  # the arrangement has all of the stream, scales unrounded, and is one for all dtypes
    grouped: Grouped | None = None  # how it runs banks of experts; None: matrix by matrix
