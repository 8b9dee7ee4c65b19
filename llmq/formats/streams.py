"""Packed layers as streams: what kernels arrange for themselves, made without unpacking codes where files allow it.

Most layouts hold the codes of an output as one stream of bits along the inputs, or its transpose. To take that stream
as it is costs a small part of the time that unpacking to bytes and packing again does. `from_stored` refuses (None)
whatever is not plainly so, and `of` makes the same stream from an unpacked weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.formats import awq, float_scales, gptq, llmq_layout, order
from llmq.formats import bits as bitstream
from llmq.formats.stored import SCALE_DTYPES, group_columns
from llmq.grids import make_grid
from llmq.grids.vq import MAX_ENTRY, VectorWeight
from llmq.types import QuantizedWeight, QuantSpec


class Stream(NamedTuple):
    """A weight of N outputs and K inputs in G groups of neighbouring columns."""

    words: Tensor  # int32 [N, K·bits/32, rounded up], codes as `llmq.formats.bits` packs them; of vectors P·code bits
    scales: Tensor  # [N, G], of a float dtype that holds them exactly
    zeros: Tensor | None  # uint8 [N, G], at 8 bits int16; None: all are the one that the grid has
    levels: Tensor | None = None  # float16 [N, G, 2^bits] of a grid that learns them; all scales are 1
    # or, of a grid of vectors, the codebook, int8 [2^code bits, d]


def of(weight: QuantizedWeight, bits: int, *, symmetric: bool) -> Stream:
    """Return the stream of a weight whose zeros, if `symmetric`, are all the same."""
    if isinstance(weight, VectorWeight):
        words = bitstream.pack(weight.codes, bits * weight.codebook.shape[1])
        return Stream(words, exact(weight.scales), None, weight.codebook.to(torch.int8))
    zeros = None if symmetric else weight.zeros.to(_zero_dtype(bits))
    levels = None if weight.levels is None else weight.levels.half()
    return Stream(bitstream.pack(weight.codes, bits), exact(weight.scales), zeros, levels)


def exact(scales: Tensor) -> Tensor:
    """Return float32 `scales` in the first of float16, bfloat16 and float32 that holds all of them as they are."""
    small = (scales.to(dtype) for dtype in (torch.float16, torch.bfloat16))
    return next((s for s in small if torch.equal(s.float(), scales)), scales)


def from_stored(tensors: Mapping[str, Tensor], spec: QuantSpec, in_features: int) -> Stream | None:
    """Return the stream in the stored `tensors` of a layer, whose header was recognized as that of `spec`.

    Several layers with the same header may be given at once: all that goes in and out has one more dimension, in front.

    None: columns are out of order, zeros are not what the label says, or the layout is none of those known here. Then
    the format's `unpack` and `columns` have the answer, or the error.
    """
    if spec.format in _LIKE:
        spec = replace(spec, format=_LIKE[spec.format])
    read = _LAYOUTS.get(spec.format)
    return None if read is None else read(tensors, spec, in_features)


def _gptq(tensors: Mapping[str, Tensor], spec: QuantSpec, k: int) -> Stream | None:
    words, zeros, g_idx = tensors["qweight"], tensors["qzeros"], tensors.get("g_idx")
    if g_idx is not None:
        in_order = order.group_index(k, group_columns(spec, k), None, g_idx.device)
        if not bool((g_idx == in_order).all()):
            return None
    if spec.symmetric:
        if not _is_middle(zeros, spec):
            return None
        found = None
    else:
        n = words.shape[-1]
        found = bitstream.unpack(zeros, spec.bits, n).mT.to(_zero_dtype(spec.bits)).contiguous()
        found += gptq.stored_minus(spec)
    return Stream(words.mT.contiguous(), tensors["scales"].mT.contiguous(), found)


def _is_middle(zeros: Tensor, spec: QuantSpec) -> bool:
    """Whether the stored `zeros` of a gptq layer are all those of its symmetric grid."""
    if bitstream.WORD % spec.bits:
        return gptq.mislabelled(zeros.flatten(0, -2), spec) is None
    field = 2 ** (spec.bits - 1) - gptq.stored_minus(spec)
    word = sum(field << shift for shift in range(0, bitstream.WORD, spec.bits))
    return bool((zeros == (word - 2**32 if word >= 2**31 else word)).all())


def _awq(tensors: Mapping[str, Tensor], spec: QuantSpec, k: int) -> Stream | None:
    words, zeros = tensors["qweight"], tensors["qzeros"]
    several, eights = words.shape[:-2], words.shape[-1]
    if k % 8 or (spec.symmetric and not awq.is_symmetric(zeros)):
        return None
    # Byte b of a word has outputs o and o + 2 in its halves, o being 0, 4, 1, 5: bits (b >> 1) + 4 (b & 1). Two
    # neighbouring inputs of one output make a byte of the stream.
    even, odd = words.contiguous().view(torch.uint8).view(-1, k // 2, 2, eights, 2, 2).unbind(2)
    stream = torch.empty(len(even), eights, 2, 2, 2, k // 2, dtype=torch.uint8, device=words.device)
    stream[:, :, :, 0] = ((even & 15) | (odd << 4)).permute(0, 2, 4, 3, 1)
    stream[:, :, :, 1] = ((even >> 4) | (odd & 0xF0)).permute(0, 2, 4, 3, 1)
    found = None
    if not spec.symmetric:
        found = awq.unpack_outputs(zeros.flatten(0, -2), 8 * eights).view(*zeros.shape[:-1], -1).mT.contiguous()
    codes = stream.view(*several, 8 * eights, k // 2).view(torch.int32)
    return Stream(codes, tensors["scales"].mT.contiguous(), found)


def _compressed(tensors: Mapping[str, Tensor], spec: QuantSpec, k: int) -> Stream | None:
    words, zeros = tensors["weight_packed"], None
    if "weight_g_idx" in tensors:
        return None
    if not spec.symmetric:
        n = words.shape[-2]
        padded = spec.format != "compressed-tensors"
        codes = bitstream.unpack(tensors["weight_zero_point"].mT, spec.bits, n, padded=padded)
        zeros = codes.mT.to(_zero_dtype(spec.bits)).contiguous()
    return Stream(words.contiguous(), tensors["weight_scale"].contiguous(), zeros)


def _compressed_padded(tensors: Mapping[str, Tensor], spec: QuantSpec, k: int) -> Stream | None:
    return None if bitstream.WORD % spec.bits else _compressed(tensors, spec, k)


def _own(tensors: Mapping[str, Tensor], spec: QuantSpec, k: int) -> Stream | None:
    zeros = tensors.get("zeros")
    if "permutation" in tensors:
        return None
    words = llmq_layout.words(tensors["codes"])
    if make_grid(spec.grid, spec.bits, spec.symmetric).learns:
        levels = llmq_layout.learned_levels(tensors).half()
        return Stream(words, torch.ones_like(levels[..., 0]), None, levels)
    lowest, highest = llmq_layout.zero_range(spec)
    if zeros is not None and bool(((zeros < lowest) | (zeros > highest)).any()):
        return None
    tables = make_grid(spec.grid, spec.bits, spec.symmetric).tables
    if tables is not None and not bool((tensors["levels"].cpu() == tables).all()):
        return None
    found = None if zeros is None else zeros.contiguous()
    if "codebook" in tensors:
        if bool((tensors["codebook"] < -MAX_ENTRY).any()):
            return None
        return Stream(words, tensors["scales"].contiguous(), None, tensors["codebook"].contiguous())
    scales = float_scales.unpack(tensors, spec)
    return Stream(words, scales if spec.scale_dtype in SCALE_DTYPES else exact(scales), found)


def _zero_dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits < 8 else torch.int16  # version 1 of the gptq format has zeros up to 2^bits


_LIKE = {"auto-round": "gptq", "auto-round-v2": "gptq_v2"}  # other labels on the same layout
_LAYOUTS: dict[str, Callable[[Mapping[str, Tensor], QuantSpec, int], Stream | None]] = {
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "compressed-tensors-padded": _compressed_padded,
    "llmq": _own,
}
