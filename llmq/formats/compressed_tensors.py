"""The layout "pack-quantized" of compressed-tensors, as llm-compressor writes it.

Per layer of N outputs and K inputs with G groups per row:

    weight_packed      int32 [N, W]              codes of one output packed along the inputs
    weight_scale       float16 or others [N, G]  of the model's dtype
    weight_shape       int64 [2]                 N and K; nothing else tells K where it does not fill whole words
    weight_zero_point  int32 [Z, G]              zeros packed along the outputs; of asymmetric layers only
    weight_g_idx       int32 [K]                 group of each input; in old files with actorder "group" only

The library counts codes and zeros from -2^(bits-1) and packs them with that much added: what is stored are our codes.

Two arrangements of the bits share that name. Since version 0.18 they are one stream, W = ⌈K·bits/32⌉; before, a word
held 32 // bits codes. For 2, 4 and 8 bits that is the same. For 3, 5, 6 and 7 W tells which it is, certainly so where K
is a multiple of 32; else both may have as many words, and the version in config.json decides (FORMATS 1.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llmq.errors import CheckpointError
from llmq.formats import bits as bitstream
from llmq.formats import order
from llmq.formats.bits import word_count
from llmq.formats.compressed_config import BITS, PADDED, STREAM, config, specs
from llmq.formats.stored import (
    INDEX_DTYPES,
    SCALE_DTYPES,
    Header,
    Read,
    Stored,
    TensorLayout,
    check_header,
    check_spec,
    described,
    group_columns,
    header_of,
    matrix,
    needs_uniform,
    stored_scales,
    stored_zeros,
)
from llmq.grids.uniform import UniformGrid
from llmq.types import QuantizedWeight, QuantSpec

__all__ = [
    "columns",
    "config",
    "embeddings",
    "index",
    "layout",
    "marker",
    "optional",
    "pack",
    "parts",
    "recognize",
    "refuses",
    "specs",
    "unpack",
]

marker = "weight_packed"
parts: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
optional: tuple[str, ...] = ("weight_zero_point", "weight_g_idx")
index: str | None = "weight_g_idx"
embeddings = False


def refuses(spec: QuantSpec, out_features: int, in_features: int) -> str | None:
    """Return why a layer of this size cannot be stored, or None if it can."""
    if spec.grid != "uniform":
        return needs_uniform(spec)
    if spec.bits not in BITS:
        return f"the compressed-tensors format holds 2 to 8 bits, not {spec.bits}"
    if in_features % spec.group_columns(in_features):
        return f"group_size {spec.group_size} does not divide in_features {in_features}"
    return None


def layout(spec: QuantSpec, out_features: int, in_features: int) -> TensorLayout:
    """Return shape and dtype of each tensor that `pack` makes of columns in order, by its local name."""
    padded = spec.format == PADDED
    groups = spec.groups(in_features)
    found: TensorLayout = {
        "weight_packed": ((out_features, word_count(in_features, spec.bits, padded=padded)), torch.int32),
        "weight_scale": ((out_features, groups), spec.scale_dtype),
        "weight_shape": ((2,), torch.int64),
    }
    if not spec.symmetric:
        found["weight_zero_point"] = ((word_count(out_features, spec.bits, padded=padded), groups), torch.int32)
    return found


def recognize(spec: QuantSpec, header: Header, read: Read) -> Stored:
    """Return the layer that a file with the tensors in `header` holds; `weight_shape` is read.

    Raises:
        CheckpointError: a tensor is missing, or its shape or dtype does not fit the others and `spec`.
    """
    n, words = matrix(header, "weight_packed")
    shape = header.get("weight_shape")
    if shape is None or shape[0] != (2,) or shape[1] not in INDEX_DTYPES:
        seen = "missing" if shape is None else f"{shape[1]} {list(shape[0])}"
        raise CheckpointError(f"weight_shape is {seen}; expected torch.int64 [2]")
    outputs, k = (int(size) for size in read("weight_shape"))
    check_spec(spec, BITS)
    counts = {name: word_count(k, spec.bits, padded=name == PADDED) for name in (spec.format, STREAM, PADDED)}
    if outputs != n or words not in counts.values():
        raise CheckpointError(
            f"weight_packed is {[n, words]}; {described(spec, outputs, k)} as weight_shape says, has "
            f"{[outputs, counts[STREAM]]}, before version 0.18 {[outputs, counts[PADDED]]}"
        )
    spec = replace(spec, format=next(name for name, count in counts.items() if count == words))
    wanted = layout(spec, n, k) | {"weight_g_idx": ((k,), torch.int32)}
    dtypes = {"weight_scale": SCALE_DTYPES, "weight_shape": INDEX_DTYPES, "weight_g_idx": INDEX_DTYPES}
    expected = {name: (size, dtypes.get(name, (dtype,))) for name, (size, dtype) in wanted.items()}
    found = check_header(header, expected, ("weight_g_idx",), described(spec, n, k))
    if spec.symmetric and "weight_zero_point" in header:
        raise CheckpointError("weight_zero_point is there, but config.json says symmetric; set symmetric to false")
    return Stored(replace(spec, scale_dtype=found["weight_scale"][1]), n, k, found)


def pack(weight: QuantizedWeight, spec: QuantSpec, columns: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors of one layer by their local names.

    With `columns` (int64 [K], see `columns`) the codes go back to where a file with an index of groups had them.

    Raises:
        SpecError: a zero is not a code, a symmetric layer has others than the middle one, or a scale is not exact in
            the dtype of the file.
    """
    padded = spec.format == PADDED
    zeros = stored_zeros(weight, spec)
    codes = order.back(weight.codes, columns)
    n, k = codes.shape
    found = {
        "weight_packed": bitstream.pack(codes, spec.bits, padded=padded),
        "weight_scale": stored_scales(weight, spec),
        "weight_shape": torch.tensor([n, k], device=codes.device),
    }
    if not spec.symmetric:
        found["weight_zero_point"] = bitstream.pack(zeros.T, spec.bits, padded=padded).T.contiguous()
    if columns is not None:
        found["weight_g_idx"] = order.group_index(k, weight.group_size, columns, codes.device)
    return found


def unpack(tensors: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
    """Return the weight that the stored `tensors` hold; its columns are sorted by group, see `columns`.

    Raises:
        CheckpointError: the tensors do not fit each other or `spec`, or groups are of unequal size.
    """
    stored = recognize(spec, header_of(tensors), tensors.__getitem__)
    spec, n, k = stored.spec, stored.out_features, stored.in_features
    padded = spec.format == PADDED
    codes = bitstream.unpack(tensors["weight_packed"], spec.bits, k, padded=padded)
    sorted_columns = columns(tensors, spec)
    if sorted_columns is not None:
        codes = codes[:, sorted_columns]
    scales = tensors["weight_scale"].float().contiguous()
    if spec.symmetric:
        zeros = torch.full_like(scales, 2 ** (spec.bits - 1))
    else:
        words = tensors["weight_zero_point"].T
        zeros = bitstream.unpack(words, spec.bits, n, padded=padded).T.float().contiguous()
    return QuantizedWeight(codes, scales, zeros, UniformGrid(spec.bits, spec.symmetric), group_columns(spec, k))


def columns(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor | None:
    """Return int64 [K], which input each column of the unpacked weight belongs to, or None where there is no index.

    Raises:
        CheckpointError: the groups are not of equal size.
    """
    g_idx = tensors.get("weight_g_idx")
    if g_idx is None or bool((g_idx == -1).any()):  # as the library makes it; filled if there is an order
        return None
    return order.by_group(g_idx, spec, "weight_g_idx")
