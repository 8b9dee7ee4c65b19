"""Bit streams and the GPTQ layout, read and written one bit or one integer at a time (FORMATS 1 and 1.1)."""

from __future__ import annotations

import struct

from torch import Tensor


def pack_bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """Return signed 32-bit words: bit i of code j is bit ``bits·j + i`` of the stream."""
    words = [0] * -(-len(codes) * bits // 32)
    for j, code in enumerate(codes):
        for i in range(bits):
            if code >> i & 1:
                words[(bits * j + i) // 32] |= 1 << (bits * j + i) % 32
    return [signed(word) for word in words]


def unpack_stream(words: list[int], bits: int) -> list[int]:
    """Return the codes of a stream, read as one long integer."""
    stream = sum((word % 2**32) << 32 * i for i, word in enumerate(words))
    return [stream >> bits * j & (2**bits - 1) for j in range(32 * len(words) // bits)]


def unpack_three_bits_in_segments(words: list[int]) -> list[int]:
    """Return 32 three-bit codes by the historic rule: ten, one that is split, ten, one that is split, ten."""
    a, b, c = (word % 2**32 for word in words)
    first = [a >> 3 * i & 7 for i in range(10)] + [a >> 30 | (b & 1) << 2]
    second = [b >> 1 + 3 * i & 7 for i in range(10)] + [b >> 31 | (c & 3) << 1]
    return first + second + [c >> 2 + 3 * i & 7 for i in range(10)]


def signed(word: int) -> int:
    """Return an unsigned 32-bit word as the int32 with the same bits."""
    return struct.unpack("<i", struct.pack("<I", word))[0]


def read_gptq(
    tensors: dict[str, Tensor], bits: int, version: int
) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """Return (codes [O][I], zeros [O][G], weights [O][I]) of a stored layer.

    ``W[o][i] = scales[g][o] * (q[i][o] - zero[g][o])`` with ``g = g_idx[i]``; version 1 stores zero - 1.
    """
    g_idx = tensors["g_idx"].tolist()
    scales = tensors["scales"].double().tolist()
    codes = [unpack_stream(column, bits) for column in tensors["qweight"].T.tolist()]
    plus = {1: 1, 2: 0}[version]
    by_group = [[field + plus for field in unpack_stream(row, bits)] for row in tensors["qzeros"].tolist()]
    zeros = [list(per_output) for per_output in zip(*by_group, strict=True)]
    weights = [
        [scales[g][o] * (code - zeros[o][g]) for code, g in zip(row, g_idx, strict=True)] for o, row in enumerate(codes)
    ]
    return codes, zeros, weights
