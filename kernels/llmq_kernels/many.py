"""A packed weight times many tokens: dequantized to a scratch, then PyTorch's own product.

From some hundred tokens on a product is limited by arithmetic, where cuBLAS is hard to beat, and dequantizing costs
the less the more tokens share it. The scratch holds at most `SLAB` weights: a larger matrix is taken some rows at a
time. It is allocated anew by each call, from PyTorch's caching allocator, and freed at its end, so that all layers of a
model take turns in the same memory: the allocator hands a block on only within a stream, in the order of the stream,
and in a CUDA graph it comes from the graph's own pool. A buffer of our own would have to do all that again.

What torch.backends.cuda.matmul says about reduced precision holds for this product as for any other.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from llmq_kernels import launch
from llmq_kernels.layout import TILE_N, TWO_23_BITS, Layout, Weight
from llmq_kernels.nibbles import centred_nibble
from llmq_kernels.octets import centred_octet

SLAB = 2**26  # weights in the scratch: 128 MiB in 16 bits

BLOCK_N = 32  # rows per program, one chunk of columns at a time
CHUNKS = 4  # per program
NUM_WARPS = 4


@triton.jit
def store_weight(o_ptr, b_w, b_s, o_n, o_k, N, K, EVEN_K: tl.constexpr):
    """Store code - zero times scale, rounded once, as rows o_n and columns o_k of o [N, K]."""
    mask = (o_n < N)[:, None]
    if not EVEN_K:
        mask = mask & (o_k < K)
    p_o = o_ptr + o_n.to(tl.int64)[:, None] * K + o_k
    tl.store(p_o, (b_w * b_s).to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_w4_kernel(
    w_ptr,
    s_ptr,
    z_ptr,
    o_ptr,
    N,
    K,
    first,
    chunks,
    stride_wn,
    stride_sg,
    two_23_bits,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    ZERO_BIAS: tl.constexpr,
):
    """Store rows first, first + 1, … of the weight in o [N, K]; grid (N tiles, runs of CHUNKS chunks).

    w, s, z and GROUP as for `few.few_w4_kernel`.
    """
    PLANE: tl.constexpr = CHUNK // 4
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, PLANE)[None, :]
    o_row = first + o_n
    p_w = w_ptr + o_row.to(tl.int64)[:, None] * stride_wn
    i_first = tl.program_id(1) * CHUNKS
    for i_c in range(i_first, tl.minimum(i_first + CHUNKS, chunks)):
        o_lo = o_row
        o_hi = o_row
        if GROUP > 0:
            o_lo = i_c * CHUNK // GROUP * stride_sg + o_row  # below 2**31 up to 2**36 weights
            o_hi = (i_c * CHUNK + CHUNK // 2) // GROUP * stride_sg + o_row
        b_slo = tl.load(s_ptr + o_lo).to(tl.float32)[:, None]
        b_shi = tl.load(s_ptr + o_hi).to(tl.float32)[:, None]
        b_zlo = tl.full((BLOCK_N, 1), 8.0, tl.float32)
        b_zhi = b_zlo
        if z_ptr is not None:
            b_zlo = tl.load(z_ptr + o_lo).to(tl.float32)[:, None] - ZERO_BIAS
            b_zhi = tl.load(z_ptr + o_hi).to(tl.float32)[:, None] - ZERO_BIAS
        b_q = tl.load(p_w + (i_c * PLANE + o_d)).to(tl.int32)
        o_k = i_c * CHUNK + o_d
        store_weight(o_ptr, centred_nibble(b_q, b_zlo, two_23_bits, 0), b_slo, o_n, o_k, N, K, EVEN_K)
        store_weight(o_ptr, centred_nibble(b_q, b_zlo, two_23_bits, 1), b_slo, o_n, o_k + PLANE, N, K, EVEN_K)
        store_weight(o_ptr, centred_nibble(b_q, b_zhi, two_23_bits, 2), b_shi, o_n, o_k + 2 * PLANE, N, K, EVEN_K)
        store_weight(o_ptr, centred_nibble(b_q, b_zhi, two_23_bits, 3), b_shi, o_n, o_k + 3 * PLANE, N, K, EVEN_K)


@triton.jit
def dequantize_w8_kernel(
    w_ptr,
    s_ptr,
    z_ptr,
    o_ptr,
    N,
    K,
    first,
    chunks,
    stride_wn,
    stride_sg,
    two_23_bits,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    ZERO_BIAS: tl.constexpr,
):
    """Store rows first, first + 1, … of the weight in o [N, K]; grid (N tiles, runs of CHUNKS chunks).

    w, s, z and GROUP as for `few.few_w8_kernel`.
    """
    PLANE: tl.constexpr = CHUNK // 2
    TWO_GROUPS: tl.constexpr = GROUP % CHUNK != 0
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, PLANE)[None, :]
    o_row = first + o_n
    p_w = w_ptr + o_row.to(tl.int64)[:, None] * stride_wn
    i_first = tl.program_id(1) * CHUNKS
    for i_c in range(i_first, tl.minimum(i_first + CHUNKS, chunks)):
        b_q = tl.load(p_w + (i_c * PLANE + o_d)).to(tl.int32)
        for i in tl.static_range(2):
            if i == 0 or TWO_GROUPS:
                o_g = o_row
                if GROUP > 0:
                    o_g = (i_c * CHUNK + i * PLANE) // GROUP * stride_sg + o_row  # below 2**31 up to 2**36 weights
                b_s = tl.load(s_ptr + o_g).to(tl.float32)[:, None]
                b_z = tl.full((BLOCK_N, 1), 128.0, tl.float32)
                if z_ptr is not None:
                    b_z = tl.load(z_ptr + o_g).to(tl.float32)[:, None] - ZERO_BIAS
            b_w = centred_octet(b_q, b_z, two_23_bits, i)
            store_weight(o_ptr, b_w, b_s, o_n, i_c * CHUNK + i * PLANE + o_d, N, K, EVEN_K)


def constants(layout: Layout, k: int, group_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the compile-time arguments of the kernel: for the launcher and for the report on machine code."""
    sizes = {"BLOCK_N": BLOCK_N, "CHUNKS": CHUNKS, "ZERO_BIAS": layout.zero_bias[dtype]}
    return {**sizes, **layout.constants(k, group_size)}


def dequantize(weight: Weight, first: int, rows: int) -> Tensor:
    """Return rows `first` to `first + rows` of the weight, [rows, K] in the dtype of its scales.

    Exact but for one rounding, to that dtype.
    """
    operands = weight.operands
    dtype, device = operands.scales.dtype, operands.scales.device
    out = torch.empty((rows, weight.k), dtype=dtype, device=device)
    compiled = constants(weight.layout, weight.k, weight.group_size, dtype)
    chunks = -(-weight.k // compiled["CHUNK"])
    with launch.on(device):
        weight.layout.dequantize[(-(-rows // BLOCK_N), -(-chunks // CHUNKS))](
            w_ptr=operands.weight,
            s_ptr=operands.scales,
            z_ptr=operands.zeros,
            o_ptr=out,
            N=rows,
            K=weight.k,
            first=first,
            chunks=chunks,
            stride_wn=operands.weight.stride(0),
            stride_sg=operands.scales.stride(0),
            two_23_bits=TWO_23_BITS,
            num_warps=NUM_WARPS,
            **launch.COMPILE_OPTIONS,
            **compiled,
        )
    return out


def matmul(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return ``x @ w.T + bias`` [M, N] for x [M, K], rows contiguous, and bias [N], rounded to x's dtype, or None."""
    n = weight.n
    bias = None if bias is None else bias.to(x.dtype)
    step = max(TILE_N, SLAB // weight.k // TILE_N * TILE_N)
    if n <= step:
        return linear(x, dequantize(weight, 0, n), bias)
    out = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
    for first in range(0, n, step):
        rows = min(step, n - first)
        _multiply(x, weight, bias, first, out[:, first : first + rows])
    return out


def _multiply(x: Tensor, weight: Weight, bias: Tensor | None, first: int, out: Tensor) -> None:
    """Store the columns of ``x @ w.T + bias`` from `first` on in `out`; the scratch is free again at the end."""
    rows = out.shape[1]
    slab = dequantize(weight, first, rows).T
    if bias is None:
        torch.mm(x, slab, out=out)
    else:
        torch.addmm(bias[first : first + rows], x, slab, out=out)
