"""The rows of grids of vectors, whose codes are looked up in the layer's codebook: our kernels in C and Triton's, and
PyTorch, some outputs at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from llmq.formats import bits as bitstream
from llmq.formats.streams import Stream
from llmq.grids.vq import VECTORS, VectorGrid, VectorWeight, vector_grid
from llmq.kernel import Kernel, Layer
from llmq.rows import reference
from llmq.rows.devices import no_tensor_cores, not_cpu

_WIDE = {4: torch.int32, 8: torch.int64, 16: torch.complex128}  # dtypes by their bytes
_SLAB = 2**20  # weights that are looked up at a time: on a CPU they stay in a core's cache until they are multiplied


def no_vectors(layer: Layer) -> str | None:
    """Return why a layer has no codebook, or None if it has one."""
    return None if layer.grid in VECTORS else f"looks up vectors, which the {layer.grid} grid has not"


def _refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    return no_vectors(layer)


def unpack(packed: list[Tensor], layer: Layer) -> VectorWeight:
    """Return the weight whose stream, codes, scales and codebook, `reference.pack` packed."""
    words, scales, book = packed
    return _weight_of(_codes(words, layer), scales, book, layer)


def _codes(words: Tensor, layer: Layer) -> Tensor:
    """Return the codes uint8 [N, P] of a stream."""
    grid = grid_of(layer)
    return bitstream.unpack(words, grid.code_bits, grid.codes_in(layer.in_features))


def _weight_of(codes: Tensor, scales: Tensor, book: Tensor, layer: Layer) -> VectorWeight:
    exact, k = scales.float(), layer.in_features
    zeros = torch.zeros_like(exact)
    return VectorWeight(codes, exact, zeros, grid_of(layer), layer.group_size, codebook=book.float(), in_features=k)


def _matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    words, scales, book = packed
    n, k = layer.out_features, layer.in_features
    step = n if x.device.type != "cpu" else max(1, _SLAB // k)
    entries, scales = book.to(x.dtype), scales.to(x.dtype)  # entries are exact: 7 bits and a sign
    # one scale per output can wait for the product; float16 would overflow
    late = scales.shape[1] == 1 and x.dtype != torch.float16
    found = x.new_empty(len(x), n)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        weight = looked_up(words[rows], entries, layer)
        found[:, rows] = linear(x, weight if late else weight.mul_(_spread(scales[rows], layer)))
    if late:
        found *= scales[:, 0]
    return found if bias is None else found.add_(bias)


def looked_up(words: Tensor, entries: Tensor, layer: Layer) -> Tensor:
    """Return what the codes of some outputs stand for, before it is scaled: [R, K], in the dtype of `entries`.

    Args:
        words: codes, int32 [R, ⌈P·b/32⌉].
        entries: the codebook [k, d], contiguous.
        layer: the layer that they are of.
    """
    codes, k = _codes(words, layer).int(), layer.in_features
    wide = _WIDE.get(entries.shape[1] * entries.itemsize)
    if wide is None:
        weight = embedding(codes, entries).flatten(1)
    else:  # an entry as one number: moving it takes a third of the time
        weight = entries.view(wide).flatten().index_select(0, codes.flatten()).view(entries.dtype).view(len(codes), -1)
    return weight if weight.shape[1] == k else weight[:, :k]


def _spread(scales: Tensor, layer: Layer) -> Tensor:
    """Return `scales` [R, G] as what multiplies weights [R, K]."""
    if scales.shape[1] == 1:
        return scales
    return scales.repeat_interleave(layer.group_size, dim=1)[:, : layer.in_features]


def grid_of(layer: Layer) -> VectorGrid:
    """Return the grid of a layer."""
    return vector_grid(layer.grid, layer.bits)


def _native_refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := not_cpu(device) or no_vectors(layer):
        return reason
    from llmq_kernels.native import vectors

    grid = grid_of(layer)
    return vectors.refuses(grid.columns, grid.code_bits, layer.in_features, layer.group_size, dtype)


def _native_pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    return [tensor.contiguous() for tensor in reference.pack(stream, layer, dtype)]


def _native_matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    from llmq_kernels.native import vectors

    if vectors.is_slow(len(x), x.dtype):
        return _matmul(x, packed, bias, layer)
    words, scales, book = packed
    return vectors.matmul(x, words, scales, book, bias, layer.group_size)


def _native_path(layer: Layer, tokens: int, dtype: torch.dtype) -> str:
    from llmq_kernels.native import vectors

    return "rows to PyTorch" if vectors.is_slow(tokens, dtype) else vectors.path(dtype)


def _kind(layer: Layer) -> tuple[int, int, int, int, int]:
    """Return what `llmq_kernels.vector_product` wants to know of a layer: the fields of its `Kind`."""
    grid = grid_of(layer)
    return layer.out_features, layer.in_features, grid.columns, grid.code_bits, layer.group_size


def _triton_refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := no_tensor_cores(device, dtype) or no_vectors(layer):
        return reason
    from llmq_kernels import vector_product

    return vector_product.refuses(vector_product.Kind(*_kind(layer)), dtype)


def _triton_pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    from llmq_kernels import vector_product

    words, scales, book = reference.pack(stream, layer, dtype)
    return list(vector_product.pack(_codes(words, layer), book, scales, vector_product.Kind(*_kind(layer))))


def _triton_unpack(packed: list[Tensor], layer: Layer) -> VectorWeight:
    from llmq_kernels import vector_product

    codes, book, scales = vector_product.unpack(vector_product.Packed(*packed), vector_product.Kind(*_kind(layer)))
    return _weight_of(codes, scales, book, layer)


def _triton_matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    from llmq_kernels import vector_product

    return vector_product.matmul(x, packed, bias, vector_product.Kind(*_kind(layer)))


VECTOR_LOOKUP = Kernel(_refuses, reference.pack, unpack, _matmul, as_read=True)
NATIVE_VECTORS = Kernel(_native_refuses, _native_pack, unpack, _native_matmul, path=_native_path, as_read=True)
TRITON_VECTORS = Kernel(_triton_refuses, _triton_pack, _triton_unpack, _triton_matmul, as_read=True)
