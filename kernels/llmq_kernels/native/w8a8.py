"""8-bit weights times activations that become 8-bit integers on the way (W8A8), on a CPU: sums are exact.

With the processor's dot products of bytes (AVX512_VNNI) or, without, what the compiler makes of plain C. What is
computed is what `llmq_kernels.w8a8` computes on a GPU, bit for bit up to the last rounding.

Letters: N outputs, K inputs, M tokens.
"""

from __future__ import annotations

import ctypes
from ctypes import CDLL
from functools import cache

import torch
from torch import Tensor

from llmq_kernels.native import build

MAX_K = (2**31 - 1) // 127**2  # 133144: beyond, sums of products of 127 * 127 leave int32
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_GRAIN = 1 << 17  # weights that are worth a thread, as in `llmq_kernels.native`


class _Product(ctypes.Structure):
    """The arguments of a product, as w8a8.c has them."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


def refuses(k: int, dtype: torch.dtype) -> str | None:
    """Return why `matmul` cannot multiply with a weight of K = `k` inputs and such activations, or None if it can."""
    if k > MAX_K:
        return f"K = {k}: sums of more than {MAX_K} products leave int32"
    if dtype not in (*_TYPES, torch.float16):
        return f"{dtype} activations: multiplies float32, bfloat16 and float16"
    found = _library()
    return str(found) if isinstance(found, build.BuildError) else None


def pack(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the words int32 [N, ceil(K / 4)], bytes of code + 128, and the scales float32 [N] of `matmul`.

    The words are the stream of 8-bit codes with 128 for zero, as checkpoints have it. codes int8 [N, K] in -127..127;
    scales [N], finite. ValueError says which argument does not fit.
    """
    if codes.ndim != 2 or codes.dtype != torch.int8 or not codes.numel():
        raise ValueError(f"codes: {codes.dtype} {list(codes.shape)}; needs int8 [N, K]")
    n, k = codes.shape
    if int(codes.min()) < -127:
        raise ValueError(f"codes: smallest is {int(codes.min())}; needs -127..127")
    if scales.shape != (n,) or not bool(torch.isfinite(scales.float()).all()):
        raise ValueError(f"scales {list(scales.shape)}: needs [{n}], all finite in float32")
    raised = torch.nn.functional.pad(codes.view(torch.uint8) ^ 128, (0, -k % 4))
    return raised.contiguous().view(torch.int32), scales.float().contiguous()


def unpack(words: Tensor, scales: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return codes int8 [N, K] and scales float32 [N]: the inverse of `pack`."""
    return (words.view(torch.uint8)[:, :k] ^ 128).view(torch.int8), scales.clone()


def matmul(x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, *, scale: Tensor | None = None) -> Tensor:
    """Return what `naive.int8_linear` does, [M, N] in the dtype of `x`, with sums that are exact.

    A token with a NaN or an infinity becomes NaN throughout, and no other. Tokens below 2**-100 count as zero.

    Args:
        x: [M, K] float32, bfloat16 or float16, of any strides.
        words: int32 [N, ceil(K / 4)], from `pack`, as are the scales float32 [N].
        scales: see `words`.
        bias: [N], any real dtype, or None.
        scale: for all tokens, one entry, positive; values beyond 127 of it are cut off. None: each token has its own.

    Raises:
        ValueError: a tensor does not fit.
        build.BuildError: there are no native kernels.
    """
    found = _library()
    if isinstance(found, build.BuildError):
        raise found
    _check(x, words, scales, bias, scale)
    (m, k), n = x.shape, len(words)
    dtype = x.dtype if x.dtype in _TYPES else torch.float32
    rows = x.to(dtype)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = torch.empty(m, n, dtype=dtype)
    if not m:
        return y.to(x.dtype)
    bias = None if bias is None else bias.detach().float().contiguous()
    product = _Product(
        words.data_ptr(),
        4 * words.shape[1],
        scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        rows.data_ptr(),
        y.data_ptr(),
        _TYPES[dtype],
        rows.stride(0),
        n,
        k,
        m,
        0.0 if scale is None else float(scale),
    )
    threads = max(1, min(torch.get_num_threads(), n * k * (4 + m) // (8 * _GRAIN)))
    if found.llmq_int8(product, build.parallel(), threads):
        raise MemoryError("no memory for the codes of the activations")
    return y if y.dtype == x.dtype else y.to(x.dtype)


@cache
def _library() -> CDLL | build.BuildError:
    return build.attempt("8-bit activations", lambda: load())


def load(extra: tuple[str, ...] = ()) -> CDLL:
    """Return the kernels, compiled if this machine has not yet, with `extra` options after our own.

    Raises:
        BuildError: they cannot be compiled, stored or loaded.
    """
    # fused, x * inverse + 1.5 * 2**23 would round once and not twice
    return build.make("w8a8", ("-ffp-contract=off", *extra), _declared)


def _declared(kernels: CDLL) -> CDLL:
    kernels.llmq_int8.argtypes = [ctypes.POINTER(_Product), ctypes.c_void_p, ctypes.c_int64]
    return kernels


def _check(x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
    """Raise ValueError unless C may assume all shapes, dtypes, strides and devices."""
    if x.ndim != 2 or x.device.type != "cpu" or refuses(x.shape[1], x.dtype) is not None or not x.shape[1]:
        raise ValueError(f"x {x.dtype} {list(x.shape)} on {x.device}: needs [M, K] of numbers on cpu, K up to {MAX_K}")
    n, width = scales.numel(), -(-x.shape[1] // 4)
    for name, tensor, shape, dtype in (
        ("words", words, (n, width), torch.int32),
        ("scales", scales, (n,), torch.float32),
    ):
        fits = tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        if not fits or tensor.device.type != "cpu":
            seen = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} {seen}: needs {dtype} {list(shape)}, contiguous, on cpu")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias {list(bias.shape)}: needs [{n}]")
    if scale is not None and (scale.numel() != 1 or not 0 < float(scale) < float("inf")):
        raise ValueError(f"scale {scale.tolist()}: needs one finite number above 0")
