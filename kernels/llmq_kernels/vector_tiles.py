"""Codebooks of vectors times a medium number of tokens: tiles on tensor cores, as in `tiling`."""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from llmq_kernels.lut_tiles import store_tile
from llmq_kernels.vector_entries import joined, look_up, numbers, words_of


@triton.jit
def vectors_kernel(
    x_ptr,
    w_ptr,
    t_ptr,
    s_ptr,
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
    D: tl.constexpr,
    ENTRIES: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POST_SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Store a tile of x [M, K] @ w.T (+ b [N]) into o [splits, M, N]; grid (N tiles, M tiles, splits).

    w uint8 [Np, Kp / D], t int32 [D / 4, ENTRIES], s [Gp, Np], as `vector_product.pack` made them; b may be None. A
    chunk is CODES codes, D columns each. GROUP is 0 for one group per row, else a multiple of a chunk.
    """
    CHUNK: tl.constexpr = D * CODES
    i_n, i_m, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.arange(0, CHUNK)
    i_first = i_k * chunks_per_split
    i_last = tl.minimum(i_first + chunks_per_split, chunks)

    p_w = w_ptr + o_n.to(tl.int64)[:, None] * stride_wn + (i_first * CODES + tl.arange(0, CODES))[None, :]
    p_x = x_ptr + o_m.to(tl.int64)[None, :] * stride_xm + (i_first * CHUNK + o_c)[:, None]
    mask_m = (o_m < M)[None, :]

    b_t0 = words_of(t_ptr, 0, ENTRIES)
    b_t1 = b_t0
    if D == 8:
        b_t1 = words_of(t_ptr, 1, ENTRIES)
    b_s = tl.load(s_ptr + o_n).to(tl.float32)[:, None]

    b_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i_c in range(i_first, i_last):
        if GROUP > 0:
            o_g = i_c * CHUNK // GROUP * stride_sg + o_n  # below 2**31 up to 2**36 weights
            b_s = tl.load(s_ptr + o_g).to(tl.float32)[:, None]
        b_q = tl.load(p_w).to(tl.int32)
        mask = mask_m
        if not EVEN_K:
            mask = mask_m & ((i_c * CHUNK + o_c)[:, None] < K)
        b_x = tl.load(p_x, mask=mask, other=0.0).to(COMPUTE)

        b_v = numbers(look_up(b_t0, b_q), COMPUTE, ASM)
        b_u = b_v
        if D == 8:
            b_u = numbers(look_up(b_t1, b_q), COMPUTE, ASM)
        b_w = joined(b_v[0], b_v[1], b_v[2], b_v[3], b_u[0], b_u[1], b_u[2], b_u[3], D)

        if POST_SCALE:
            # rows of one group too: on sm_90 a wgmma that goes on with the last sum waits for it, step by step
            b_acc += tl.dot(b_w, b_x, input_precision="ieee") * b_s
        elif GROUP == 0:
            b_acc = tl.dot(b_w, b_x, b_acc, input_precision="ieee")
        else:
            b_acc = tl.dot(b_w * b_s.to(COMPUTE), b_x, b_acc, input_precision="ieee")
        p_w += CODES
        p_x += CHUNK

    if GROUP == 0 and not POST_SCALE:
        b_acc *= b_s
    store_tile(o_ptr, b_ptr, b_acc, o_n, o_m, i_k, M, N)
