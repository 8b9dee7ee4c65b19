"""The block types of GGUF that hold our codes exactly: bit by bit, both ways.

A row of K weights is K / columns blocks of fixed size, each with its own scale; nothing in a block refers to another.
Two families, in llmq's letters (``w = (code - zero) * scale``; every scale of a block is a float16):

    signed   w = (q - half) d         Q3_K  Q4_0  Q5_0  Q6_K  Q8_0     q - half = code - zero
    offset   w = q d - zero d         Q2_K  Q4_K: zero as it is;  Q4_1: -zero d as one float16     q = code

The types that end in K have blocks of 256, and integer multiples of d for 16 or 32 of them. Our scales have eight
significant bits and those multiples six or fewer, so several of our scales are as good as never multiples of one d:
such a type is used where a group of ours fills whole blocks, with all multiples 1.

Codes lie in lanes of a byte: of a run of bytes, byte l holds in its lowest bits the weight l, above it the weight
l + run, l + 2 run and so on. Source of all layouts: ggml-common.h and the dequantize functions of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.errors import CheckpointError, SpecError
from llmq.grids.uniform import UniformGrid
from llmq.types import QuantizedWeight

_PIECE = 2**22  # weights that are worked on at a time

Packer = Callable[[Tensor, Tensor, Tensor], Tensor]  # q uint8 [B, columns], d, zero float32 [B, 1] -> uint8 [B, nbytes]
Unpacker = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # q [B, columns], scales and zero * scale [B, parts]


class Block(NamedTuple):
    """One block type."""

    number: int  # that stands for it in files
    columns: int  # weights
    nbytes: int
    bits: int
    offset: bool  # of the second family
    pack: Packer
    unpack: Unpacker


def refuses(name: str, weight: QuantizedWeight) -> str | None:
    """Return why blocks of type `name` cannot hold `weight` exactly, or None if they can."""
    block, k, size = BLOCKS[name], weight.codes.shape[1], weight.group_size
    if not isinstance(weight.grid, UniformGrid):
        return f"its levels are equally spaced, those of {type(weight.grid).__name__} are not"
    if k % block.columns:
        return f"a block has {block.columns} weights, which do not divide in_features {k}"
    if size < k and size % block.columns:
        return f"a block of {block.columns} weights has one scale of 8 significant bits, groups have {size} weights"
    if not _is_half(weight.scales):
        return "it stores scales in float16, and not all are exact there"
    if not block.offset:
        half = 2 ** (block.bits - 1)
        low, high = _span(weight)
        return (
            None if -half <= low and high < half else f"code - zero is {low} to {high}, it holds {-half} to {half - 1}"
        )
    top, code, zeros = 2**block.bits - 1, int(weight.codes.max()), weight.zeros
    if max(code, zeros.max()) > top or zeros.min() < 0:
        low, high = int(zeros.min()), int(zeros.max())
        return f"codes are up to {code} and zeros {low} to {high}, it holds 0 to {top}"
    if name == "Q4_1" and not _is_half(weight.scales * zeros):
        return "it stores zero * scale in float16, and not all are exact there"
    return None


def pack(name: str, weight: QuantizedWeight) -> Iterator[Tensor]:
    """Yield the rows of `weight` as blocks of type `name`: uint8 [rows, K / columns * nbytes], some rows at a time.

    Raises:
        SpecError: the type cannot hold them exactly.
    """
    reason = refuses(name, weight)
    if reason is not None:
        raise SpecError(f"GGUF type {name} cannot hold the codes: {reason}")
    block = BLOCKS[name]
    half = 2 ** (block.bits - 1)
    for part in pieces(weight):
        n, k = part.codes.shape
        first = torch.arange(0, k, block.columns, device=part.codes.device)  # column of each block
        d, zeros = (t[:, first // weight.group_size].reshape(-1, 1) for t in (part.scales, part.zeros))
        q = part.codes.reshape(-1, block.columns)
        if not block.offset:
            q = (q.short() - zeros.short() + half).to(torch.uint8)
        yield block.pack(q, d, zeros).reshape(n, -1)


def unpack(name: str, raw: Tensor) -> QuantizedWeight:
    """Return the weight that rows of blocks of type `name` hold, uint8 [N, K / columns * nbytes].

    Its groups are as large as the blocks' parts that have a scale of their own.

    Raises:
        CheckpointError: a scale is not finite, or the least value of a group is no whole number of steps below 0.
    """
    block, n = BLOCKS[name], len(raw)
    q, scales, least = block.unpack(raw.reshape(-1, block.nbytes))
    if not (scales.isfinite().all() and least.isfinite().all()):
        raise CheckpointError("holds a scale that is not finite; the file is damaged")
    zeros = torch.full_like(scales, 2.0 ** (block.bits - 1))
    if block.offset:
        zeros = torch.where(scales == 0, 0, least / scales).round()
        if not torch.equal(zeros * scales, least) or zeros.min() < 0 or zeros.max() >= 2**block.bits:
            raise CheckpointError(
                f"holds {name} blocks whose least value is not 0 to {2**block.bits - 1} steps below 0"
            )
    parts = scales.shape[1]
    codes = q.reshape(n, -1)
    grid = UniformGrid(block.bits, symmetric=not block.offset)
    return QuantizedWeight(codes, scales.reshape(n, -1), zeros.reshape(n, -1), grid, block.columns // parts)


def _span(weight: QuantizedWeight) -> tuple[int, int]:
    """Return the least and the largest ``code - zero``."""
    low, high = [], []
    for part in pieces(weight):
        for index, codes in enumerate(part.codes.split(weight.group_size, dim=1)):
            least, most = torch.aminmax(codes.short() - part.zeros[:, index : index + 1].short())
            low.append(int(least))
            high.append(int(most))
    return min(low), max(high)


def pieces(weight: QuantizedWeight) -> Iterator[QuantizedWeight]:
    """Yield some rows of `weight` at a time."""
    rows = max(1, _PIECE // weight.codes.shape[1])
    for codes, scales, zeros in zip(*(t.split(rows) for t in (weight.codes, weight.scales, weight.zeros)), strict=True):
        yield replace(weight, codes=codes, scales=scales, zeros=zeros)


def _is_half(numbers: Tensor) -> bool:
    """Return whether float16 holds all `numbers`, and all are finite."""
    return bool(numbers.isfinite().all()) and torch.equal(numbers.half().float(), numbers)


def _weave(q: Tensor, lanes: int, run: int, width: int) -> Tensor:
    """Return uint8 [B, columns / lanes], `lanes` numbers of `width` bits in every byte, of uint8 `q` [B, columns]."""
    parts = q.reshape(len(q), -1, lanes, run)
    woven = parts[:, :, 0].clone()
    for lane in range(1, lanes):
        woven |= parts[:, :, lane] << (lane * width)
    return woven.reshape(len(q), -1)


def _unweave(raw: Tensor, lanes: int, run: int, width: int) -> Tensor:
    """Return what `_weave` took."""
    shifts = torch.arange(0, lanes * width, width, dtype=torch.uint8, device=raw.device)[:, None]
    parts: Tensor = (raw.reshape(len(raw), -1, 1, run) >> shifts) & ((1 << width) - 1)
    return parts.reshape(len(raw), -1)


def _half(numbers: Tensor) -> Tensor:
    """Return the bytes of float32 `numbers` [B, 1] as float16, uint8 [B, 2]."""
    return numbers.half().view(torch.uint8)


def _float(raw: Tensor) -> Tensor:
    """Return float32 [B, 1] of the bytes of float16 numbers."""
    return raw.contiguous().view(torch.float16).float()


def _constant(like: Tensor, *values: int) -> Tensor:
    """Return the same bytes for every block of `like` [B, …]."""
    return torch.tensor(values, dtype=torch.uint8, device=like.device).expand(len(like), -1)


def _none(d: Tensor) -> Tensor:
    """Return the zero * scale of a type that has none."""
    return torch.zeros_like(d)


def _pack_q4_0(q: Tensor, d: Tensor, zero: Tensor) -> Tensor:
    """d, 16 bytes of two codes."""
    return torch.cat((_half(d), _weave(q, 2, 16, 4)), dim=1)


def _unpack_q4_0(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = _float(raw[:, :2])
    return _unweave(raw[:, 2:], 2, 16, 4), d, _none(d)


def _pack_q4_1(q: Tensor, d: Tensor, zero: Tensor) -> Tensor:
    """d, least value, 16 bytes of two codes."""
    return torch.cat((_half(d), _half(-zero * d), _weave(q, 2, 16, 4)), dim=1)


def _unpack_q4_1(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _unweave(raw[:, 4:], 2, 16, 4), _float(raw[:, :2]), -_float(raw[:, 2:4])


def _pack_q5_0(q: Tensor, d: Tensor, zero: Tensor) -> Tensor:
    """d, 4 bytes of highest bits, 16 bytes of two codes' other four."""
    return torch.cat((_half(d), _weave(q >> 4, 8, 1, 1), _weave(q & 15, 2, 16, 4)), dim=1)


def _unpack_q5_0(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = _float(raw[:, :2])
    return _unweave(raw[:, 6:], 2, 16, 4) | _unweave(raw[:, 2:6], 8, 1, 1) << 4, d, _none(d)


def _pack_q8_0(q: Tensor, d: Tensor, zero: Tensor) -> Tensor:
    """d, 32 signed bytes."""
    return torch.cat((_half(d), q ^ 128), dim=1)  # as int8: q - 128


def _unpack_q8_0(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = _float(raw[:, :2])
    return raw[:, 2:] ^ 128, d, _none(d)


def _pack_q2_k(q: Tensor, d: Tensor, zero: Tensor) -> Tensor:
    """16 bytes with the multiple of d and, above, that of the second d for 16 weights each; codes; d, second d."""
    return torch.cat((1 | _bytes(zero, 16) << 4, _weave(q, 4, 32, 2), _half(d), _half(d)), dim=1)


def _unpack_q2_k(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    multiples, d, second = raw[:, :16], _float(raw[:, 80:82]), _float(raw[:, 82:84])
    return _unweave(raw[:, 16:80], 4, 32, 2), d * (multiples & 15), second * (multiples >> 4)


def _pack_q3_k(q: Tensor, d: Tensor, zero: Tensor) -> Tensor:
    """32 bytes of highest bits, 64 of the two others; 16 multiples + 32 of 6 bits in 12 bytes; d."""
    ones = _constant(q, *[0x11] * 8, *[0xAA] * 4)  # 33 = 0b100001: the low four bits two by two, then the others
    return torch.cat((_weave(q >> 2, 8, 32, 1), _weave(q & 3, 4, 32, 2), ones, _half(d)), dim=1)


def _unpack_q3_k(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = _unweave(raw[:, 32:96], 4, 32, 2) | _unweave(raw[:, :32], 8, 32, 1) << 2
    multiples = _unweave(raw[:, 96:104], 2, 8, 4) | _unweave(raw[:, 104:108], 4, 4, 2) << 4
    scales = _float(raw[:, 108:110]) * (multiples.float() - 32)
    return q, scales, _none(scales)


def _pack_q4_k(q: Tensor, d: Tensor, zero: Tensor) -> Tensor:
    """d, second d; 8 multiples of 6 bits of each in 12 bytes; codes."""
    zeros = _bytes(zero, 4)
    multiples = torch.cat((_constant(q, 1, 1, 1, 1), zeros, 1 | zeros << 4), dim=1)
    return torch.cat((_half(d), _half(d), multiples, _weave(q, 2, 32, 4)), dim=1)


def _unpack_q4_k(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, second, rest = (
        raw[:, 4:8],
        raw[:, 8:12],
        raw[:, 12:16],
    )  # the upper two bits of the last four lie in the first
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), dim=1)
    zeros = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), dim=1)
    return _unweave(raw[:, 16:], 2, 32, 4), _float(raw[:, :2]) * scales, _float(raw[:, 2:4]) * zeros


def _pack_q6_k(q: Tensor, d: Tensor, zero: Tensor) -> Tensor:
    """128 bytes of two codes' low four bits, 64 of four codes' upper two; 16 signed multiples; d."""
    low, high = _weave(q & 15, 2, 64, 4), _weave(q >> 4, 4, 32, 2)
    return torch.cat((low, high, _constant(q, *[1] * 16), _half(d)), dim=1)


def _unpack_q6_k(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = _unweave(raw[:, :128], 2, 64, 4) | _unweave(raw[:, 128:192], 4, 32, 2) << 4
    scales = _float(raw[:, 208:210]) * raw[:, 192:208].contiguous().view(torch.int8)
    return q, scales, _none(scales)


def _bytes(numbers: Tensor, count: int) -> Tensor:
    """Return whole `numbers` [B, 1] as uint8, `count` times."""
    return numbers.to(torch.uint8).expand(-1, count)


# the smallest first, and of equals the one that every build of llama.cpp has kernels for
BLOCKS = {
    "Q2_K": Block(10, 256, 84, 2, True, _pack_q2_k, _unpack_q2_k),
    "Q3_K": Block(11, 256, 110, 3, False, _pack_q3_k, _unpack_q3_k),
    "Q4_0": Block(2, 32, 18, 4, False, _pack_q4_0, _unpack_q4_0),
    "Q4_K": Block(12, 256, 144, 4, True, _pack_q4_k, _unpack_q4_k),
    "Q4_1": Block(3, 32, 20, 4, True, _pack_q4_1, _unpack_q4_1),
    "Q5_0": Block(6, 32, 22, 5, False, _pack_q5_0, _unpack_q5_0),
    "Q6_K": Block(14, 256, 210, 6, False, _pack_q6_k, _unpack_q6_k),
    "Q8_0": Block(8, 32, 34, 8, False, _pack_q8_0, _unpack_q8_0),
}
