"""Codes that are places in tables of levels: sums for one to four tokens, as in `few`, and rows of the weight, as in
`many`. Levels are loads, all arithmetic is float32, and there is no assembly."""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from llmq_kernels.few import add_planes, load_x, store_sums
from llmq_kernels.lut_levels import first_level, group_of, level, scale_of
from llmq_kernels.many import store_weight


@triton.jit
def few_lut4_kernel(
    x_ptr,
    w_ptr,
    t_ptr,
    s_ptr,
    g_ptr,
    b_ptr,
    o_ptr,
    N,
    K,
    chunks,
    chunks_per_split,
    stride_xm,
    stride_wn,
    stride_sg,
    M: tl.constexpr,
    OWN: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store BLOCK_N columns of x [M, K] @ w.T (+ b [N]) into o [splits, M, N]; grid (N tiles, splits).

    w int16 [Np, Kp / 4], t [T, 16], s and g [Gp, Np], as `lut.pack` made them; s, g and b may be None. GROUP is 0 for
    one group per row; else CHUNK divides GROUP, or each half of a chunk lies in one group, or each quarter: then
    weights are scaled, in float32, instead of sums.
    """
    PLANE: tl.constexpr = CHUNK // 4
    TWO_GROUPS: tl.constexpr = GROUP % CHUNK != 0
    FOUR_GROUPS: tl.constexpr = GROUP % (2 * PLANE) != 0
    SUMS: tl.constexpr = 0 if FOUR_GROUPS else GROUP  # of add_planes: 0 leaves products as they are
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

    o_t0 = first_level(g_ptr, o_n, OWN, 16)
    o_t1, o_t2, o_t3 = o_t0, o_t0, o_t0
    b_slo = scale_of(s_ptr, o_n, BLOCK_N)
    b_shi = b_slo
    b_s = tl.reshape(b_slo, (BLOCK_N,))

    b_acc0 = tl.zeros((BLOCK_N, PLANE), tl.float32)
    b_acc1 = b_acc0
    b_acc2 = b_acc0
    b_acc3 = b_acc0
    for i_c in range(i_first, i_last):
        if GROUP > 0:
            o_g = group_of(i_c, stride_sg, o_n, 0, GROUP, CHUNK)
            o_t0 = first_level(g_ptr, o_g, OWN, 16)
            o_t1, o_t2, o_t3 = o_t0, o_t0, o_t0
            b_slo = scale_of(s_ptr, o_g, BLOCK_N)
            b_shi = b_slo
            if TWO_GROUPS:
                o_g = group_of(i_c, stride_sg, o_n, 2, GROUP, CHUNK)
                o_t2 = first_level(g_ptr, o_g, OWN, 16)
                o_t3 = o_t2
                b_shi = scale_of(s_ptr, o_g, BLOCK_N)
            if FOUR_GROUPS:
                o_t1 = first_level(g_ptr, group_of(i_c, stride_sg, o_n, 1, GROUP, CHUNK), OWN, 16)
                o_t3 = first_level(g_ptr, group_of(i_c, stride_sg, o_n, 3, GROUP, CHUNK), OWN, 16)
        b_q = tl.load(p_w).to(tl.int32)
        b_w0 = level(t_ptr, o_t0, b_q, 0)
        b_w1 = level(t_ptr, o_t1, b_q, 1)
        b_w2 = level(t_ptr, o_t2, b_q, 2)
        b_w3 = level(t_ptr, o_t3, b_q, 3)
        if FOUR_GROUPS:
            b_w0 *= b_slo
            b_w1 *= scale_of(s_ptr, group_of(i_c, stride_sg, o_n, 1, GROUP, CHUNK), BLOCK_N)
            b_w2 *= b_shi
            b_w3 *= scale_of(s_ptr, group_of(i_c, stride_sg, o_n, 3, GROUP, CHUNK), BLOCK_N)
        o_k = i_c * CHUNK + o_d
        b_acc0 = add_planes(b_acc0, b_w0, b_w1, b_w2, b_w3, b_slo, b_shi, p_x0, o_k, K, PLANE, SUMS, TWO_GROUPS, EVEN_K)
        if M > 1:
            b_acc1 = add_planes(
                b_acc1, b_w0, b_w1, b_w2, b_w3, b_slo, b_shi, p_x1, o_k, K, PLANE, SUMS, TWO_GROUPS, EVEN_K
            )
        if M > 2:
            b_acc2 = add_planes(
                b_acc2, b_w0, b_w1, b_w2, b_w3, b_slo, b_shi, p_x2, o_k, K, PLANE, SUMS, TWO_GROUPS, EVEN_K
            )
        if M > 3:
            b_acc3 = add_planes(
                b_acc3, b_w0, b_w1, b_w2, b_w3, b_slo, b_shi, p_x3, o_k, K, PLANE, SUMS, TWO_GROUPS, EVEN_K
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
def few_lut8_kernel(
    x_ptr,
    w_ptr,
    t_ptr,
    s_ptr,
    g_ptr,
    b_ptr,
    o_ptr,
    N,
    K,
    chunks,
    chunks_per_split,
    stride_xm,
    stride_wn,
    stride_sg,
    M: tl.constexpr,
    OWN: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store BLOCK_N columns of x [M, K] @ w.T (+ b [N]) into o [splits, M, N]; grid (N tiles, splits).

    w uint8 [Np, Kp], t [T, 256], s and g [Gp, Np], as `lut.pack` made them; s, g and b may be None. GROUP is 0 for one
    group per row, else a multiple of CHUNK.
    """
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, CHUNK)[None, :]
    i_first = i_k * chunks_per_split
    i_last = tl.minimum(i_first + chunks_per_split, chunks)

    # Pointers walk, as in few_lut4_kernel.
    p_w = w_ptr + o_n.to(tl.int64)[:, None] * stride_wn + (i_first * CHUNK + o_c)
    p_x0 = x_ptr + (i_first * CHUNK + o_c)
    p_x1 = p_x0 + stride_xm
    p_x2 = p_x1 + stride_xm
    p_x3 = p_x2 + stride_xm

    o_t = first_level(g_ptr, o_n, OWN, 256)
    b_scale = scale_of(s_ptr, o_n, BLOCK_N)
    b_s = tl.reshape(b_scale, (BLOCK_N,))

    b_acc0 = tl.zeros((BLOCK_N, CHUNK), tl.float32)
    b_acc1 = b_acc0
    b_acc2 = b_acc0
    b_acc3 = b_acc0
    for i_c in range(i_first, i_last):
        if GROUP > 0:
            o_g = i_c * CHUNK // GROUP * stride_sg + o_n  # below 2**31 up to 2**36 weights
            o_t = first_level(g_ptr, o_g, OWN, 256)
            b_scale = scale_of(s_ptr, o_g, BLOCK_N)
        b_w = tl.load(t_ptr + (o_t + tl.load(p_w).to(tl.int32))).to(tl.float32)
        if GROUP > 0:
            b_w *= b_scale
        o_k = i_c * CHUNK + o_c
        b_acc0 += b_w * load_x(p_x0, o_k, K, EVEN_K)
        if M > 1:
            b_acc1 += b_w * load_x(p_x1, o_k, K, EVEN_K)
        if M > 2:
            b_acc2 += b_w * load_x(p_x2, o_k, K, EVEN_K)
        if M > 3:
            b_acc3 += b_w * load_x(p_x3, o_k, K, EVEN_K)
        p_w += CHUNK
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
def dequantize_lut4_kernel(
    w_ptr,
    t_ptr,
    s_ptr,
    g_ptr,
    o_ptr,
    N,
    K,
    first,
    chunks,
    stride_wn,
    stride_sg,
    OWN: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Store rows first, first + 1, … of the weight in o [N, K]; grid (N tiles, runs of CHUNKS chunks).

    w, t, s, g and GROUP as for `few_lut4_kernel`.
    """
    PLANE: tl.constexpr = CHUNK // 4
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, PLANE)[None, :]
    o_row = first + o_n
    p_w = w_ptr + o_row.to(tl.int64)[:, None] * stride_wn
    i_first = tl.program_id(1) * CHUNKS
    for i_c in range(i_first, tl.minimum(i_first + CHUNKS, chunks)):
        o_0 = o_row
        o_1 = o_row
        o_2 = o_row
        o_3 = o_row
        if GROUP > 0:
            o_0 = group_of(i_c, stride_sg, o_row, 0, GROUP, CHUNK)
            o_1 = group_of(i_c, stride_sg, o_row, 1, GROUP, CHUNK)
            o_2 = group_of(i_c, stride_sg, o_row, 2, GROUP, CHUNK)
            o_3 = group_of(i_c, stride_sg, o_row, 3, GROUP, CHUNK)
        b_q = tl.load(p_w + (i_c * PLANE + o_d)).to(tl.int32)
        b_w0 = level(t_ptr, first_level(g_ptr, o_0, OWN, 16), b_q, 0)
        b_w1 = level(t_ptr, first_level(g_ptr, o_1, OWN, 16), b_q, 1)
        b_w2 = level(t_ptr, first_level(g_ptr, o_2, OWN, 16), b_q, 2)
        b_w3 = level(t_ptr, first_level(g_ptr, o_3, OWN, 16), b_q, 3)
        o_k = i_c * CHUNK + o_d
        store_weight(o_ptr, b_w0, scale_of(s_ptr, o_0, BLOCK_N), o_n, o_k, N, K, EVEN_K)
        store_weight(o_ptr, b_w1, scale_of(s_ptr, o_1, BLOCK_N), o_n, o_k + PLANE, N, K, EVEN_K)
        store_weight(o_ptr, b_w2, scale_of(s_ptr, o_2, BLOCK_N), o_n, o_k + 2 * PLANE, N, K, EVEN_K)
        store_weight(o_ptr, b_w3, scale_of(s_ptr, o_3, BLOCK_N), o_n, o_k + 3 * PLANE, N, K, EVEN_K)


@triton.jit
def dequantize_lut8_kernel(
    w_ptr,
    t_ptr,
    s_ptr,
    g_ptr,
    o_ptr,
    N,
    K,
    first,
    chunks,
    stride_wn,
    stride_sg,
    OWN: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Store rows first, first + 1, … of the weight in o [N, K]; grid (N tiles, runs of CHUNKS chunks).

    w, t, s, g and GROUP as for `few_lut8_kernel`.
    """
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, CHUNK)[None, :]
    o_row = first + o_n
    p_w = w_ptr + o_row.to(tl.int64)[:, None] * stride_wn
    i_first = tl.program_id(1) * CHUNKS
    for i_c in range(i_first, tl.minimum(i_first + CHUNKS, chunks)):
        o_g = o_row
        if GROUP > 0:
            o_g = i_c * CHUNK // GROUP * stride_sg + o_row  # below 2**31 up to 2**36 weights
        o_k = i_c * CHUNK + o_c
        o_t = first_level(g_ptr, o_g, OWN, 256)
        b_w = tl.load(t_ptr + (o_t + tl.load(p_w + o_k).to(tl.int32))).to(tl.float32)
        store_weight(o_ptr, b_w, scale_of(s_ptr, o_g, BLOCK_N), o_n, o_k, N, K, EVEN_K)
