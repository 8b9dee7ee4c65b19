"""Codes, scales and zeros as onnxruntime's operator MatMulNBits (com.microsoft, version 1) has them.

A row of K weights is cut into blocks of 16 to 256, each with a scale and a zero: ``w = (code - zero) · scale``. A group
of ours is one block, or several with the same scale. docs/onnx.md has the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmq.errors import SpecError
from llmq.formats import bits as bitstream
from llmq.types import QuantizedWeight

BITS = (2, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)  # that its CPU kernels have; release 1.26 computed zeros with larger ones
SCALE_BYTES = 4


class Blocks(NamedTuple):
    """The constant inputs of one node; B = ⌈K / block⌉ blocks per row."""

    codes: Tensor  # uint8 [N, B, block · bits / 8], lowest bits first; behind column K - 1 all bits are 0
    scales: Tensor  # float32 [N, B]
    zero_points: Tensor | None  # uint8 [N, ⌈B · bits / 8⌉], packed likewise; None: all are 2^(bits-1)


def refuses(bits: int, group_columns: int, k: int) -> str | None:
    """Return why the operator holds no weight of `bits` bits in groups of `group_columns` of K inputs, or None."""
    if bits not in BITS:
        return f"MatMulNBits of onnxruntime has codes of 2, 4 and 8 bits, these have {bits}"
    if not _possible(group_columns, k):
        return f"its blocks hold multiples of 16 columns, the groups of this layer {group_columns}"
    return None


def block_size(bits: int, group_columns: int, k: int) -> int:
    """Return the block that takes least room, for a weight that is not refused."""

    def row_bytes(block: int) -> int:
        return -(-k // block) * (block * bits // 8 + SCALE_BYTES)

    return min(_possible(group_columns, k), key=row_bytes)


def shapes(n: int, k: int, bits: int, block: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of codes, scales and zero points."""
    count = -(-k // block)
    return (n, count, block * bits // 8), (n, count), (n, -(-count * bits // 8))


def pack(weight: QuantizedWeight, block: int, *, symmetric: bool) -> Blocks:
    """Return the inputs of a node.

    Args:
        weight: [N, K], of a grid that is not refused.
        block: columns per block.
        symmetric: whether all zeros are 2^(bits-1), and need not be written.

    Raises:
        SpecError: a zero is 2^bits or more, as in some files of others.
    """
    bits, (n, k) = weight.grid.bits, weight.codes.shape
    codes = bitstream.pack(pad(weight.codes, (0, -k % block)), bits).view(torch.uint8)
    scales, zeros = per_block(weight, block)
    if (highest := int(zeros.max())) >= 2**bits:
        raise SpecError(f"has a zero of {highest}, above all codes of {bits} bits, which MatMulNBits cannot hold")
    shape, _, packed = shapes(n, k, bits, block)
    zero_points = bitstream.pack(zeros.to(torch.uint8), bits).view(torch.uint8)[:, : packed[1]].contiguous()
    return Blocks(codes.reshape(shape), scales, None if symmetric else zero_points)


def per_block(weight: QuantizedWeight, block: int) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero of each block, float32 [N, B]."""
    starts = torch.arange(0, weight.codes.shape[1], block)
    groups = starts // weight.group_size
    return weight.scales[:, groups].contiguous(), weight.zeros[:, groups].contiguous()


def unpack(blocks: Blocks, k: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, uint8 [N, K], and scales and zeros of the blocks, float32 [N, B]."""
    n, count, _ = blocks.codes.shape
    codes = bitstream.unpack(_words(blocks.codes.reshape(n, -1)), bits, count * (blocks.codes.shape[2] * 8 // bits))
    if blocks.zero_points is None:
        zeros = torch.full((n, count), 2.0 ** (bits - 1))
    else:
        padded = pad(blocks.zero_points, (0, -blocks.zero_points.shape[1] % 4))
        zeros = bitstream.unpack(_words(padded), bits, padded.shape[1] * 8 // bits)[:, :count].float()
    return codes[:, :k], blocks.scales, zeros


def _possible(group_columns: int, k: int) -> list[int]:
    """Return the blocks that groups of so many columns are made of; one group per row is made of any."""
    return [block for block in BLOCKS if group_columns >= k or group_columns % block == 0]


def _words(stored: Tensor) -> Tensor:
    return stored.contiguous().view(torch.int32)
