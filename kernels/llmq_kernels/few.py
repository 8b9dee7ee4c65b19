"""A packed weight times one to four tokens: sums instead of tensor cores, which would be idle but for a sixteenth.

A program takes BLOCK_N rows of the weight and walks along K. A float32 sum per token, row and column of the chunk is
kept in registers, and the columns are added once, at the end. Weights are float32 throughout, and exact: nothing is
rounded but the sums and the result. What a GPU runs is what the interpreter runs, there is no assembly.

A 4-bit weight costs four to six instructions for one token and two for each further token, where a tile of 16 tokens
costs three in all (docs/kernels.md): which is better depends on how many instructions a GPU runs per byte that it
reads, so `tables` decides.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels import launch, splits
from llmq_kernels.layout import TWO_23_BITS, Weight
from llmq_kernels.nibbles import centred_nibble
from llmq_kernels.octets import centred_octet
from llmq_kernels.tables import Few

MAX_M = 4  # tokens that the kernels have sums for

# Threads on an SM that together have enough bytes under way: 16 programs of two warps.
WARPS_PER_PROCESSOR = 32


@triton.jit
def load_x(p_x, o_k, K, EVEN_K: tl.constexpr):
    """Return the activations at p_x, those of columns o_k, as float32."""
    b_x = tl.load(p_x) if EVEN_K else tl.load(p_x, mask=o_k < K, other=0.0)
    return b_x.to(tl.float32)


@triton.jit
def add_planes(
    b_acc,
    b_w0,
    b_w1,
    b_w2,
    b_w3,
    b_slo,
    b_shi,
    p_x,
    o_k,
    K,
    PLANE: tl.constexpr,
    GROUP: tl.constexpr,
    TWO_GROUPS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Return b_acc plus the products of a chunk with one token, scaled unless there is one group per row."""
    b_x0 = load_x(p_x, o_k, K, EVEN_K)
    b_x1 = load_x(p_x + PLANE, o_k + PLANE, K, EVEN_K)
    b_x2 = load_x(p_x + 2 * PLANE, o_k + 2 * PLANE, K, EVEN_K)
    b_x3 = load_x(p_x + 3 * PLANE, o_k + 3 * PLANE, K, EVEN_K)
    if GROUP == 0:
        b_acc += b_w0 * b_x0
        b_acc += b_w1 * b_x1
        b_acc += b_w2 * b_x2
        b_acc += b_w3 * b_x3
    else:
        b_p = b_w0 * b_x0
        b_p += b_w1 * b_x1
        if TWO_GROUPS:
            b_acc += b_p * b_slo
            b_p = b_w2 * b_x2
        else:
            b_p += b_w2 * b_x2
        b_p += b_w3 * b_x3
        b_acc += b_p * b_shi
    return b_acc


@triton.jit
def store_sums(p_o, b_acc, b_s, b_ptr, o_n, N, GROUP: tl.constexpr):
    """Store the sums of b_acc over its columns, scaled if there is one group per row, plus the bias if there is one."""
    b_y = tl.sum(b_acc, axis=1)
    if GROUP == 0:
        b_y *= b_s
    if b_ptr is not None:
        b_y += tl.load(b_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    tl.store(p_o, b_y.to(p_o.dtype.element_ty), mask=o_n < N)


@triton.jit
def few_w4_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    b_ptr,
    o_ptr,
    N,
    K,
    chunks,
    chunks_per_split,
    stride_xm,
    stride_wn,
    stride_sg,
    two_23_bits,
    M: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ZERO_BIAS: tl.constexpr,
):
    """Store BLOCK_N columns of x [M, K] @ w.T (+ b [N]) into o [splits, M, N]; grid (N tiles, splits).

    w int16 [Np, Kp / 4], s and z [Gp, Np], as `w4a16.pack` made them; z and b may be None. GROUP is 0 for one group
    per row; else CHUNK divides GROUP, or each half of a chunk lies in one group.
    """
    PLANE: tl.constexpr = CHUNK // 4
    TWO_GROUPS: tl.constexpr = GROUP % CHUNK != 0
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, PLANE)[None, :]
    i_first = i_k * chunks_per_split
    i_last = tl.minimum(i_first + chunks_per_split, chunks)

    # Pointers walk: a token times its stride may be beyond 2**31.
    p_w = w_ptr + o_n.to(tl.int64)[:, None] * stride_wn + (i_first * PLANE + o_d)
    p_x0 = x_ptr + (i_first * CHUNK + o_d)
    p_x1 = p_x0 + stride_xm
    p_x2 = p_x1 + stride_xm
    p_x3 = p_x2 + stride_xm

    # One group per row: its scale and zero are loaded here, once. Without zeros: the middle code.
    b_s = tl.load(s_ptr + o_n).to(tl.float32)
    b_slo = b_s[:, None]
    b_zlo = tl.full((BLOCK_N, 1), 8.0, tl.float32)
    if z_ptr is not None:
        b_zlo = tl.load(z_ptr + o_n).to(tl.float32)[:, None] - ZERO_BIAS
    b_shi = b_slo
    b_zhi = b_zlo

    b_acc0 = tl.zeros((BLOCK_N, PLANE), tl.float32)
    b_acc1 = b_acc0
    b_acc2 = b_acc0
    b_acc3 = b_acc0
    for i_c in range(i_first, i_last):
        if GROUP > 0:
            o_g = i_c * CHUNK // GROUP * stride_sg + o_n  # below 2**31 up to 2**36 weights
            b_slo = tl.load(s_ptr + o_g).to(tl.float32)[:, None]
            b_shi = b_slo
            if z_ptr is not None:
                b_zlo = tl.load(z_ptr + o_g).to(tl.float32)[:, None] - ZERO_BIAS
                b_zhi = b_zlo
            if TWO_GROUPS:
                o_g = (i_c * CHUNK + CHUNK // 2) // GROUP * stride_sg + o_n
                b_shi = tl.load(s_ptr + o_g).to(tl.float32)[:, None]
                if z_ptr is not None:
                    b_zhi = tl.load(z_ptr + o_g).to(tl.float32)[:, None] - ZERO_BIAS
        b_q = tl.load(p_w).to(tl.int32)
        b_w0 = centred_nibble(b_q, b_zlo, two_23_bits, 0)
        b_w1 = centred_nibble(b_q, b_zlo, two_23_bits, 1)
        b_w2 = centred_nibble(b_q, b_zhi, two_23_bits, 2)
        b_w3 = centred_nibble(b_q, b_zhi, two_23_bits, 3)
        o_k = i_c * CHUNK + o_d
        b_acc0 = add_planes(
            b_acc0, b_w0, b_w1, b_w2, b_w3, b_slo, b_shi, p_x0, o_k, K, PLANE, GROUP, TWO_GROUPS, EVEN_K
        )
        if M > 1:
            b_acc1 = add_planes(
                b_acc1, b_w0, b_w1, b_w2, b_w3, b_slo, b_shi, p_x1, o_k, K, PLANE, GROUP, TWO_GROUPS, EVEN_K
            )
        if M > 2:
            b_acc2 = add_planes(
                b_acc2, b_w0, b_w1, b_w2, b_w3, b_slo, b_shi, p_x2, o_k, K, PLANE, GROUP, TWO_GROUPS, EVEN_K
            )
        if M > 3:
            b_acc3 = add_planes(
                b_acc3, b_w0, b_w1, b_w2, b_w3, b_slo, b_shi, p_x3, o_k, K, PLANE, GROUP, TWO_GROUPS, EVEN_K
            )
        p_w += PLANE
        p_x0 += CHUNK
        p_x1 += CHUNK
        p_x2 += CHUNK
        p_x3 += CHUNK

    p_o = o_ptr + i_k.to(tl.int64) * M * N + o_n
    store_sums(p_o, b_acc0, b_s, b_ptr, o_n, N, GROUP)
    if M > 1:
        store_sums(p_o + N, b_acc1, b_s, b_ptr, o_n, N, GROUP)
    if M > 2:
        store_sums(p_o + 2 * N, b_acc2, b_s, b_ptr, o_n, N, GROUP)
    if M > 3:
        store_sums(p_o + 3 * N, b_acc3, b_s, b_ptr, o_n, N, GROUP)


@triton.jit
def few_w8_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    b_ptr,
    o_ptr,
    N,
    K,
    chunks,
    chunks_per_split,
    stride_xm,
    stride_wn,
    stride_sg,
    two_23_bits,
    M: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ZERO_BIAS: tl.constexpr,
):
    """Store BLOCK_N columns of x [M, K] @ w.T (+ b [N]) into o [splits, M, N]; grid (N tiles, splits).

    w int16 [Np, Kp / 2], s and z [Gp, Np], as `w8a16.pack` made them; z and b may be None. GROUP is 0 for one group per
    row; else CHUNK divides GROUP, or each half of a chunk lies in one group.
    """
    PLANE: tl.constexpr = CHUNK // 2
    TWO_GROUPS: tl.constexpr = GROUP % CHUNK != 0
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, PLANE)[None, :]
    i_first = i_k * chunks_per_split
    i_last = tl.minimum(i_first + chunks_per_split, chunks)

    # Pointers walk, as in few_w4_kernel.
    p_w = w_ptr + o_n.to(tl.int64)[:, None] * stride_wn + (i_first * PLANE + o_d)
    p_x0 = x_ptr + (i_first * CHUNK + o_d)
    p_x1 = p_x0 + stride_xm
    p_x2 = p_x1 + stride_xm
    p_x3 = p_x2 + stride_xm

    b_s = tl.load(s_ptr + o_n).to(tl.float32)
    b_scale = b_s[:, None]
    b_z = tl.full((BLOCK_N, 1), 128.0, tl.float32)
    if z_ptr is not None:
        b_z = tl.load(z_ptr + o_n).to(tl.float32)[:, None] - ZERO_BIAS

    b_acc0 = tl.zeros((BLOCK_N, PLANE), tl.float32)
    b_acc1 = b_acc0
    b_acc2 = b_acc0
    b_acc3 = b_acc0
    for i_c in range(i_first, i_last):
        b_q = tl.load(p_w).to(tl.int32)
        for i in tl.static_range(2):
            if GROUP > 0 and (i == 0 or TWO_GROUPS):
                o_g = (i_c * CHUNK + i * PLANE) // GROUP * stride_sg + o_n  # below 2**31 up to 2**36 weights
                b_scale = tl.load(s_ptr + o_g).to(tl.float32)[:, None]
                if z_ptr is not None:
                    b_z = tl.load(z_ptr + o_g).to(tl.float32)[:, None] - ZERO_BIAS
            b_w = centred_octet(b_q, b_z, two_23_bits, i)
            if GROUP > 0:
                b_w *= b_scale  # exact: 9 and 11 bits
            o_k = i_c * CHUNK + i * PLANE + o_d
            b_acc0 += b_w * load_x(p_x0 + i * PLANE, o_k, K, EVEN_K)
            if M > 1:
                b_acc1 += b_w * load_x(p_x1 + i * PLANE, o_k, K, EVEN_K)
            if M > 2:
                b_acc2 += b_w * load_x(p_x2 + i * PLANE, o_k, K, EVEN_K)
            if M > 3:
                b_acc3 += b_w * load_x(p_x3 + i * PLANE, o_k, K, EVEN_K)
        p_w += PLANE
        p_x0 += CHUNK
        p_x1 += CHUNK
        p_x2 += CHUNK
        p_x3 += CHUNK

    p_o = o_ptr + i_k.to(tl.int64) * M * N + o_n
    store_sums(p_o, b_acc0, b_s, b_ptr, o_n, N, GROUP)
    if M > 1:
        store_sums(p_o + N, b_acc1, b_s, b_ptr, o_n, N, GROUP)
    if M > 2:
        store_sums(p_o + 2 * N, b_acc2, b_s, b_ptr, o_n, N, GROUP)
    if M > 3:
        store_sums(p_o + 3 * N, b_acc3, b_s, b_ptr, o_n, N, GROUP)


def constants(weight: Weight, row: Few, m: int) -> dict[str, Any]:
    """Return the compile-time arguments of the kernel: for the launcher and for the report on machine code."""
    layout = weight.layout
    return {
        "M": m,
        "BLOCK_N": row.block_n,
        "ZERO_BIAS": layout.zero_bias[weight.operands.scales.dtype],
        **layout.constants(weight.k, weight.group_size),
    }


def matmul(x: Tensor, weight: Weight, bias: Tensor | None, row: Few, count: int | None = None) -> Tensor:
    """Return ``x @ w.T + bias`` [M, N] for x [M, K] of one to four rows, each contiguous, and bias [N] or None.

    `count` sets over how many programs K is split; by default enough to fill the GPU.
    """
    m, n = x.shape[0], weight.n
    compiled = constants(weight, row, m)
    chunks, tiles = -(-weight.k // compiled["CHUNK"]), -(-n // row.block_n)
    if count is None:
        programs = WARPS_PER_PROCESSOR // row.num_warps
        count = splits.split_count(tiles, chunks, launch.processors(x.device), programs)
    per_split, count = splits.divide(chunks, count)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    target = splits.target(out, count)
    operands = weight.operands
    with launch.on(x.device):
        weight.layout.few[(tiles, count)](
            x_ptr=x,
            w_ptr=operands.weight,
            s_ptr=operands.scales,
            z_ptr=operands.zeros,
            b_ptr=bias if count == 1 else None,
            o_ptr=target,
            N=n,
            K=weight.k,
            chunks=chunks,
            chunks_per_split=per_split,
            stride_xm=x.stride(0),
            stride_wn=operands.weight.stride(0),
            stride_sg=operands.scales.stride(0),
            two_23_bits=TWO_23_BITS,
            num_warps=row.num_warps,
            **launch.COMPILE_OPTIONS,
            **compiled,
        )
        if count > 1:
            splits.add(target, bias, out)
    return out
