"""Bit streams and packed layouts, read and written one bit or one integer at a time (FORMATS 1)."""

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


def pack_word_by_word(codes: list[int], bits: int) -> list[int]:
    """Return signed 32-bit words of ``32 // bits`` whole codes each, the first of them in the lowest bits."""
    each = 32 // bits
    return [
        signed(sum(code * 2 ** (bits * i) for i, code in enumerate(codes[start : start + each])))
        for start in range(0, len(codes), each)
    ]


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


def read_awq(tensors: dict[str, Tensor]) -> tuple[list[list[int]], list[list[int]]]:
    """Return (codes [O][I], zeros [O][G]) of a stored layer: nibble j holds column ``base + [0,2,4,6,1,3,5,7][j]``."""

    def by_output(words: Tensor) -> list[list[int]]:
        columns = [[0] * words.shape[0] for _ in range(8 * words.shape[1])]
        for i, row in enumerate(words.tolist()):
            for base, word in enumerate(row):
                for j, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    columns[8 * base + output][i] = (word % 2**32) // 16**j % 16
        return columns

    return by_output(tensors["qweight"]), by_output(tensors["qzeros"])


def read_compressed(
    tensors: dict[str, Tensor], bits: int, group_size: int, padded: bool
) -> tuple[list[list[int]], list[list[int]] | None, list[list[float]]]:
    """Return (signed codes [O][I], signed zeros [O][G] or None, weights [O][I]) of a stored layer.

    ``W[o][i] = (q[o][i] - zero[o][i // group_size]) * scale[o][i // group_size]``; 2^(bits-1) is added to what is
    packed.
    """

    def signed_codes(words: list[int], count: int) -> list[int]:
        if padded:
            each = 32 // bits
            stored = [(word % 2**32) // 2 ** (bits * i) % 2**bits for word in words for i in range(each)]
        else:
            stream = sum((word % 2**32) << 32 * i for i, word in enumerate(words))
            stored = [stream >> bits * j & (2**bits - 1) for j in range(count)]
        return [code - 2 ** (bits - 1) for code in stored[:count]]

    outputs, inputs = tensors["weight_shape"].tolist()
    scales = tensors["weight_scale"].double().tolist()
    codes = [signed_codes(row, inputs) for row in tensors["weight_packed"].tolist()]
    zeros = None
    if "weight_zero_point" in tensors:
        by_group = [signed_codes(column, outputs) for column in tensors["weight_zero_point"].T.tolist()]
        zeros = [list(per_output) for per_output in zip(*by_group, strict=True)]
    weights = [
        [
            (code - (0 if zeros is None else zeros[o][i // group_size])) * scales[o][i // group_size]
            for i, code in enumerate(row)
        ]
        for o, row in enumerate(codes)
    ]
    return codes, zeros, weights
