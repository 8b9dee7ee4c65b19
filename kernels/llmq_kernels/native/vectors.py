"""Products with weights on a codebook of vectors, on a CPU: ``w[n, p·d + i] = book[code[n, p], i] * scale``.

Codes are looked up by permutations of bytes (AVX512_VBMI) or, without, one by one, and multiplied as numbers that
bfloat16 holds exactly; scales are applied to sums in float32.

Letters: N outputs, K inputs, G groups per row, M tokens, d columns per code, b bits of a code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from ctypes import CDLL
from functools import cache

import torch
from torch import Tensor

from llmq_kernels.native import build

# columns per code to bits of a code
_KINDS = {2: (2, 4, 6, 8), 4: (4, 8), 8: (8,)}
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_SCALES = (torch.float32, torch.float16, torch.bfloat16)
_QUARTER = 16  # codes that share a scale
_GRAIN = 1 << 17  # weights that are worth a thread, as in `llmq_kernels.native`
_TILES = 12  # tokens from which on plain C is behind PyTorch, and anything behind matrix units (AMX)


class _Product(ctypes.Structure):
    """The arguments of a product, as vectors.c has them."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("book", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("group", ctypes.c_int64),
    )


def refuses(columns: int, code_bits: int, k: int, group_size: int, dtype: torch.dtype) -> str | None:
    """Return why `matmul` cannot multiply with a weight of K = `k` inputs of this kind, or None if it can."""
    if code_bits not in _KINDS.get(columns, ()):
        return f"codes of {code_bits} bits for {columns} columns: there is no kernel for them"
    if dtype not in _SCALES:
        return f"{dtype} activations: multiplies float32, bfloat16 and float16"
    if group_size % (_QUARTER * columns) and group_size < k:
        return f"group_size {group_size}: needs a multiple of {_QUARTER * columns}"
    found = _library()
    return str(found) if isinstance(found, build.BuildError) else None


def is_slow(m: int, dtype: torch.dtype) -> bool:
    """Return whether PyTorch multiplies M = `m` tokens with looked-up rows faster on this processor than `matmul`."""
    if m <= _TILES:
        return False
    if dtype == torch.bfloat16:
        return not _has("pairs") or torch.cpu._is_amx_tile_supported()
    return not _has("wide")


def path(dtype: torch.dtype) -> str:
    """Return what `matmul` does with tokens of `dtype`, in a few words."""
    numbers = "bfloat16 pairs" if dtype == torch.bfloat16 and _has("pairs") else "float32"
    return f"rows in cache, {numbers}" if _has("wide") else f"rows in cache, plain C, {numbers}"


def matmul(x: Tensor, words: Tensor, scales: Tensor, book: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """Return ``x @ w.T + bias`` [M, N] in the dtype of `x`, summed in float32.

    Args:
        x: [M, K] float32, bfloat16 or float16, of any strides; float16 is computed in float32.
        words: codes as a stream along the inputs, int32 [N, ⌈⌈K/d⌉·b/32⌉].
        scales: float32, float16 or bfloat16 [N, G].
        book: int8 [2^b, d].
        bias: [N], any real dtype, or None.
        group_size: columns per group, a multiple of 16·d or at least K. A last group may be short.

    Raises:
        ValueError: a tensor does not fit.
        build.BuildError: there are no native kernels.
    """
    found = _library()
    if isinstance(found, build.BuildError):
        raise found
    code_bits = _check(x, words, scales, book, bias, group_size)
    (m, k), n = x.shape, len(words)
    dtype = x.dtype if x.dtype in _TYPES and (x.dtype == torch.float32 or _has("pairs")) else torch.float32
    rows = x.to(dtype)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = torch.empty(m, n, dtype=dtype)
    if not m:
        return y.to(x.dtype)
    bias, scales = None if bias is None else bias.detach().float().contiguous(), scales.float()
    product = _Product(
        words.data_ptr(),
        4 * words.shape[1],
        book.data_ptr(),
        scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        rows.data_ptr(),
        y.data_ptr(),
        _TYPES[dtype],
        rows.stride(0),
        n,
        k,
        m,
        code_bits,
        book.shape[1],
        group_size,
    )
    threads = max(1, min(torch.get_num_threads(), n * k * (4 + m) // (4 * _GRAIN)))
    if found.llmq_vectors(product, build.parallel(), threads):
        raise MemoryError("no memory for a second copy of the activations")
    return y if y.dtype == x.dtype else y.to(x.dtype)


@cache
def _library() -> CDLL | build.BuildError:
    return build.attempt("codebooks of vectors", lambda: load())


def load(extra: tuple[str, ...] = ()) -> CDLL:
    """Return the kernels, compiled if this machine has not yet, with `extra` options after our own.

    Raises:
        BuildError: they cannot be compiled, stored or loaded.
    """
    return build.make("vectors", extra, _declared)


def _declared(kernels: CDLL) -> CDLL:
    kernels.llmq_vectors.argtypes = [ctypes.POINTER(_Product), ctypes.c_void_p, ctypes.c_int64]
    return kernels


def _has(what: str) -> bool:
    """Return whether the processor has what the library calls `llmq_vector_<what>`."""
    found = _library()
    return not isinstance(found, build.BuildError) and bool(ctypes.c_int.in_dll(found, f"llmq_vector_{what}").value)


def _check(x: Tensor, words: Tensor, scales: Tensor, book: Tensor, bias: Tensor | None, group_size: int) -> int:
    """Return the bits of a code; ValueError unless C may assume all shapes, dtypes, strides and devices."""
    if x.ndim != 2 or x.device.type != "cpu" or x.dtype not in _SCALES or not x.shape[1]:
        raise ValueError(f"x {x.dtype} {list(x.shape)} on {x.device}: needs [M, K] of numbers on cpu")
    columns = book.shape[-1]
    code_bits = (book.shape[0] - 1).bit_length()
    if code_bits not in _KINDS.get(columns, ()):
        raise ValueError(f"book {list(book.shape)}: needs 2^b entries of 2, 4 or 8 columns, b up to 8")
    (n, k), codes = (len(words), x.shape[1]), -(-x.shape[1] // columns)
    if group_size < 1 or (group_size % (_QUARTER * columns) and group_size < k):
        raise ValueError(f"groups of {group_size}: needs a multiple of {_QUARTER * columns}, or one for all")
    _check_tensor("words", words, (n, -(-codes * code_bits // 32)), (torch.int32,))
    _check_tensor("scales", scales, (n, -(-k // group_size)), _SCALES)
    _check_tensor("book", book, (2**code_bits, columns), (torch.int8,))
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias {list(bias.shape)}: needs [{n}]")
    return code_bits


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, int], dtypes: Collection[torch.dtype]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} {tensor.dtype} {list(tensor.shape)} on {tensor.device}: needs {list(shape)} of "
            f"{' or '.join(map(str, dtypes))}, contiguous, on cpu"
        )
