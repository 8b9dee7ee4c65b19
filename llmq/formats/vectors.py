"""Tensors of layers on codebooks of vectors, in the layout "llmq".

Per layer of N outputs and K inputs, d columns per code, P = ⌈K / d⌉ and codes of b bits:

    shape     int64 [2]              N and K
    codes     uint8 [N, ⌈P·b/8⌉]     codes of one output, a stream of bits; every row begins a byte
    codebook  int8 [2^b, d]          -127 to 127
    scales    float16 [N, G]         G = ⌈K / group_size⌉

``w[n, p·d + i] = codebook[codes[n, p], i] · scales[n, ⌊(p·d + i) / group_size⌋]``, and
what a row's last code says of columns from K on means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llmq.errors import CheckpointError, SpecError
from llmq.formats import bits as bitstream
from llmq.formats.stored import (
    SCALE_DTYPES,
    Header,
    Read,
    Stored,
    TensorLayout,
    check_header,
    described,
    group_columns,
    stored_scales,
)
from llmq.grids.vq import MAX_ENTRY, VECTORS, VectorGrid, VectorWeight, vector_grid
from llmq.types import QuantizedWeight, QuantSpec

_CODE = 8  # bits of a byte


def holds(spec: QuantSpec) -> bool:
    """Return whether a layer of this kind is on a codebook of vectors."""
    return spec.grid in VECTORS


def refuses(spec: QuantSpec, in_features: int) -> str | None:
    """Return why a layer of so many inputs cannot be stored, or None if it can."""
    grid, size = vector_grid(spec.grid, spec.bits), spec.group_columns(in_features)
    if size % grid.columns and size < in_features:
        return (
            f"group_size {size} cuts the vectors of {grid.columns} columns that {grid.name} has; use a multiple, or -1"
        )
    return None


def layout(spec: QuantSpec, out_features: int, in_features: int) -> TensorLayout:
    """Return shape and dtype of each tensor that `pack` makes, by its local name."""
    grid = vector_grid(spec.grid, spec.bits)
    return {
        "shape": ((2,), torch.int64),
        "codes": ((out_features, row_bytes(grid, in_features)), torch.uint8),
        "codebook": ((grid.entries, grid.columns), torch.int8),
        "scales": ((out_features, spec.groups(in_features)), spec.scale_dtype),
    }


def recognize(spec: QuantSpec, header: Header, read: Read) -> Stored:
    """Return the layer that a file with the tensors in `header` holds; `shape` is read.

    Raises:
        CheckpointError: a tensor is missing or too many, or its shape or dtype does not fit the others and `spec`.
    """
    if "shape" not in header:
        raise CheckpointError("shape is missing; the checkpoint is incomplete")
    if header["shape"] != ((2,), torch.int64):
        raise CheckpointError(f"shape is {header['shape'][1]} {list(header['shape'][0])}; expected torch.int64 [2]")
    n, k = (int(size) for size in read("shape"))
    if n < 1 or k < 1:
        raise CheckpointError(f"shape says {n} outputs and {k} inputs; the file is damaged")
    if reason := refuses(spec, k):
        raise CheckpointError(reason)
    wanted = layout(spec, n, k)
    expected = {name: (size, SCALE_DTYPES if name == "scales" else (dtype,)) for name, (size, dtype) in wanted.items()}
    found = check_header(header, expected, (), f"{described(spec, n, k)} on the {spec.grid} grid")
    if strange := sorted(set(header) - set(found)):
        raise CheckpointError(f"{strange[0]} is there, which the {spec.grid} grid has no use for")
    return Stored(replace(spec, scale_dtype=found["scales"][1]), n, k, found)


def pack(weight: QuantizedWeight, spec: QuantSpec, columns: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors of one layer by their local names.

    Raises:
        SpecError: the weight has no codebook, its columns are out of order, or a scale or an entry is not exact in the
            file.
    """
    grid = vector_grid(spec.grid, spec.bits)
    if not isinstance(weight, VectorWeight) or weight.grid != grid:
        raise SpecError(f"a weight on the {weight.grid.name} grid cannot be stored as {spec.grid}")
    if columns is not None:
        raise SpecError(f"columns are out of order, which the {spec.grid} grid has no place for")
    book = weight.codebook
    if not torch.equal(book.round().clamp(-MAX_ENTRY, MAX_ENTRY), book):
        raise SpecError(f"an entry of a codebook is no whole number from -{MAX_ENTRY} to {MAX_ENTRY}")
    stream = bitstream.pack(weight.codes, grid.code_bits).view(torch.uint8)
    return {
        "shape": torch.tensor([len(weight.codes), weight.in_features], device=stream.device),
        "codes": stream[:, : row_bytes(grid, weight.in_features)].contiguous(),
        "codebook": book.to(torch.int8),
        "scales": stored_scales(weight, spec),
    }


def unpack(tensors: Mapping[str, Tensor], stored: Stored, words: Tensor) -> VectorWeight:
    """Return the weight that stored `tensors` hold, whose header was recognized; `words` are its codes as int32.

    Raises:
        CheckpointError: an entry or a scale is none.
    """
    spec, k = stored.spec, stored.in_features
    grid, book = vector_grid(spec.grid, spec.bits), tensors["codebook"].float()
    if bool((book < -MAX_ENTRY).any()):
        raise CheckpointError(f"codebook has entries below -{MAX_ENTRY}; another program has written it")
    scales = tensors["scales"].float().contiguous()
    codes = bitstream.unpack(words, grid.code_bits, grid.codes_in(k))
    zeros = torch.zeros_like(scales)
    return VectorWeight(codes, scales, zeros, grid, group_columns(spec, k), codebook=book, in_features=k)


def row_bytes(grid: VectorGrid, in_features: int) -> int:
    """Return the bytes of the codes of one output."""
    return -(-grid.codes_in(in_features) * grid.code_bits // _CODE)
