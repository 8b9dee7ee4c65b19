"""Codes that are places in tables of levels, times a medium number of tokens: tiles on tensor cores, as in `tiling`."""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from llmq_kernels.lut_levels import first_level, group_of, planes, planes_asm, scale_of, table_bytes


@triton.jit
def store_tile(o_ptr, b_ptr, b_acc, o_n, o_m, i_k, M, N):
    """Store b_acc [BLOCK_N, BLOCK_M], plus the bias if there is one, in o [splits, M, N], transposed."""
    if b_ptr is not None:
        b_acc += tl.load(b_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
    p_o = o_ptr + (i_k.to(tl.int64) * M + o_m.to(tl.int64)[None, :]) * N + o_n[:, None]
    tl.store(p_o, b_acc.to(o_ptr.dtype.element_ty), mask=(o_m < M)[None, :] & (o_n < N)[:, None])


@triton.jit
def lut4_kernel(
    x_ptr,
    w_ptr,
    t_ptr,
    s_ptr,
    g_ptr,
    b_ptr,
    o_ptr,
    M,
    N,
    K,
    chunks,
    chunks_per_split,
    stride_xm,
    stride_wn,
    stride_sg,
    OWN: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POST_SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Store a tile of x [M, K] @ w.T (+ b [N]) into o [splits, M, N]; grid (N tiles, M tiles, splits).

    w int16 [Np, Kp / 4], t [T, 16], s and g [Gp, Np], as `lut.pack` made them; s, g and b may be None. GROUP is 0 for
    one group per row; else CHUNK divides GROUP, or each half of a chunk lies in one group, or each quarter.
    """
    PLANE: tl.constexpr = CHUNK // 4
    TWO_GROUPS: tl.constexpr = GROUP % CHUNK != 0
    FOUR_GROUPS: tl.constexpr = GROUP % (2 * PLANE) != 0
    VARIES: tl.constexpr = OWN or g_ptr is not None
    i_n, i_m, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, PLANE)
    i_first = i_k * chunks_per_split
    i_last = tl.minimum(i_first + chunks_per_split, chunks)

    p_w = w_ptr + o_n.to(tl.int64)[:, None] * stride_wn + (i_first * PLANE + o_d)[None, :]
    p_x = x_ptr + o_m.to(tl.int64)[None, :] * stride_xm + (i_first * CHUNK + o_d)[:, None]
    mask_m = (o_m < M)[None, :]

    o_t = first_level(g_ptr, o_n, OWN, 16)
    b_s0 = scale_of(s_ptr, o_n, BLOCK_N)
    b_s1, b_s2, b_s3 = b_s0, b_s0, b_s0

    if ASM:
        b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7 = table_bytes(t_ptr, o_t)

    b_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i_c in range(i_first, i_last):
        if GROUP > 0:
            o_g = group_of(i_c, stride_sg, o_n, 0, GROUP, CHUNK)
            o_t = first_level(g_ptr, o_g, OWN, 16)
            b_s0 = scale_of(s_ptr, o_g, BLOCK_N)
            b_s1, b_s2, b_s3 = b_s0, b_s0, b_s0
            if TWO_GROUPS:
                b_s2 = scale_of(s_ptr, group_of(i_c, stride_sg, o_n, 2, GROUP, CHUNK), BLOCK_N)
                b_s3 = b_s2
            if FOUR_GROUPS:
                b_s1 = scale_of(s_ptr, group_of(i_c, stride_sg, o_n, 1, GROUP, CHUNK), BLOCK_N)
                b_s3 = scale_of(s_ptr, group_of(i_c, stride_sg, o_n, 3, GROUP, CHUNK), BLOCK_N)
        b_q = tl.load(p_w)
        mask_0 = mask_m
        mask_1 = mask_m
        mask_2 = mask_m
        mask_3 = mask_m
        if not EVEN_K:
            o_k = (i_c * CHUNK + o_d)[:, None]
            mask_0 = mask_m & (o_k < K)
            mask_1 = mask_m & (o_k + PLANE < K)
            mask_2 = mask_m & (o_k + 2 * PLANE < K)
            mask_3 = mask_m & (o_k + 3 * PLANE < K)
        b_x0 = tl.load(p_x, mask=mask_0, other=0.0).to(COMPUTE)
        b_x1 = tl.load(p_x + PLANE, mask=mask_1, other=0.0).to(COMPUTE)
        b_x2 = tl.load(p_x + 2 * PLANE, mask=mask_2, other=0.0).to(COMPUTE)
        b_x3 = tl.load(p_x + 3 * PLANE, mask=mask_3, other=0.0).to(COMPUTE)

        if ASM:
            if GROUP > 0 and VARIES:
                b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7 = table_bytes(t_ptr, o_t)
            b_w0, b_w1, b_w2, b_w3 = planes_asm(b_q, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7, COMPUTE)
        else:
            b_w0, b_w1, b_w2, b_w3 = planes(t_ptr, o_t, b_q, COMPUTE, ASM)
        if TWO_GROUPS and VARIES:
            o_t = first_level(g_ptr, group_of(i_c, stride_sg, o_n, 2, GROUP, CHUNK), OWN, 16)
            _, _, b_w2, b_w3 = planes(t_ptr, o_t, b_q, COMPUTE, ASM)
        if FOUR_GROUPS and VARIES:
            o_t = first_level(g_ptr, group_of(i_c, stride_sg, o_n, 1, GROUP, CHUNK), OWN, 16)
            _, b_w1, _, _ = planes(t_ptr, o_t, b_q, COMPUTE, ASM)
            o_t = first_level(g_ptr, group_of(i_c, stride_sg, o_n, 3, GROUP, CHUNK), OWN, 16)
            _, _, _, b_w3 = planes(t_ptr, o_t, b_q, COMPUTE, ASM)

        if GROUP == 0 or s_ptr is None:
            b_acc = tl.dot(b_w0, b_x0, b_acc, input_precision="ieee")
            b_acc = tl.dot(b_w1, b_x1, b_acc, input_precision="ieee")
            b_acc = tl.dot(b_w2, b_x2, b_acc, input_precision="ieee")
            b_acc = tl.dot(b_w3, b_x3, b_acc, input_precision="ieee")
        elif POST_SCALE:
            b_p = tl.dot(b_w0, b_x0, input_precision="ieee")
            if FOUR_GROUPS:
                b_acc += b_p * b_s0
                b_p = tl.dot(b_w1, b_x1, input_precision="ieee")
            else:
                b_p = tl.dot(b_w1, b_x1, b_p, input_precision="ieee")
            if TWO_GROUPS:
                b_acc += b_p * b_s1
                b_p = tl.dot(b_w2, b_x2, input_precision="ieee")
            else:
                b_p = tl.dot(b_w2, b_x2, b_p, input_precision="ieee")
            if FOUR_GROUPS:
                b_acc += b_p * b_s2
                b_p = tl.dot(b_w3, b_x3, input_precision="ieee")
            else:
                b_p = tl.dot(b_w3, b_x3, b_p, input_precision="ieee")
            b_acc += b_p * b_s3
        else:
            b_acc = tl.dot(b_w0 * b_s0.to(COMPUTE), b_x0, b_acc, input_precision="ieee")
            b_acc = tl.dot(b_w1 * b_s1.to(COMPUTE), b_x1, b_acc, input_precision="ieee")
            b_acc = tl.dot(b_w2 * b_s2.to(COMPUTE), b_x2, b_acc, input_precision="ieee")
            b_acc = tl.dot(b_w3 * b_s3.to(COMPUTE), b_x3, b_acc, input_precision="ieee")
        p_w += PLANE
        p_x += CHUNK

    if GROUP == 0 and s_ptr is not None:
        b_acc *= b_s0
    store_tile(o_ptr, b_ptr, b_acc, o_n, o_m, i_k, M, N)


@triton.jit
def lut8_kernel(
    x_ptr,
    w_ptr,
    t_ptr,
    s_ptr,
    g_ptr,
    b_ptr,
    o_ptr,
    M,
    N,
    K,
    chunks,
    chunks_per_split,
    stride_xm,
    stride_wn,
    stride_sg,
    OWN: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POST_SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Store a tile of x [M, K] @ w.T (+ b [N]) into o [splits, M, N]; grid (N tiles, M tiles, splits).

    w uint8 [Np, Kp], t [T, 256], s and g [Gp, Np], as `lut.pack` made them; s, g and b may be None. GROUP is 0 for one
    group per row, else a multiple of CHUNK. ASM changes nothing here.
    """
    i_n, i_m, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, CHUNK)
    i_first = i_k * chunks_per_split
    i_last = tl.minimum(i_first + chunks_per_split, chunks)

    p_w = w_ptr + o_n.to(tl.int64)[:, None] * stride_wn + (i_first * CHUNK + o_c)[None, :]
    p_x = x_ptr + o_m.to(tl.int64)[None, :] * stride_xm + (i_first * CHUNK + o_c)[:, None]
    mask_m = (o_m < M)[None, :]

    o_t = first_level(g_ptr, o_n, OWN, 256)
    b_s = scale_of(s_ptr, o_n, BLOCK_N)

    b_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i_c in range(i_first, i_last):
        if GROUP > 0:
            o_g = i_c * CHUNK // GROUP * stride_sg + o_n  # below 2**31 up to 2**36 weights
            o_t = first_level(g_ptr, o_g, OWN, 256)
            b_s = scale_of(s_ptr, o_g, BLOCK_N)
        b_w = tl.load(t_ptr + (o_t + tl.load(p_w).to(tl.int32))).to(COMPUTE)
        mask = mask_m
        if not EVEN_K:
            mask = mask_m & ((i_c * CHUNK + o_c)[:, None] < K)
        b_x = tl.load(p_x, mask=mask, other=0.0).to(COMPUTE)

        if GROUP == 0 or s_ptr is None:
            b_acc = tl.dot(b_w, b_x, b_acc, input_precision="ieee")
        elif POST_SCALE:
            b_acc += tl.dot(b_w, b_x, input_precision="ieee") * b_s
        else:
            b_acc = tl.dot(b_w * b_s.to(COMPUTE), b_x, b_acc, input_precision="ieee")
        p_w += CHUNK
        p_x += CHUNK

    if GROUP == 0 and s_ptr is not None:
        b_acc *= b_s
    store_tile(o_ptr, b_ptr, b_acc, o_n, o_m, i_k, M, N)
