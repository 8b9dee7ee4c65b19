"""Codebooks of vectors: sums for one to four tokens, as in `few`, and rows of the weight, as in `many`. All arithmetic
is float32, and there is no assembly."""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from llmq_kernels.few import store_sums
from llmq_kernels.many import store_weight
from llmq_kernels.vector_entries import floats, joined, look_up, words_of


@triton.jit
def activations(b_x, D: tl.constexpr, X: tl.constexpr):
    """Return the 16-bit activations in words, two to an int32 if D is 2, else four to an int64, as float32."""
    b_lo = b_x.to(tl.int32)
    b_hi = b_lo
    if D > 2:
        b_hi = (b_x >> 32).to(tl.int32)
    if X == tl.float16:  # noqa: SIM300
        b_0, b_1 = b_lo.to(tl.int16).to(X, bitcast=True), (b_lo >> 16).to(tl.int16).to(X, bitcast=True)
        b_2, b_3 = b_hi.to(tl.int16).to(X, bitcast=True), (b_hi >> 16).to(tl.int16).to(X, bitcast=True)
    else:  # the upper half of a float32
        b_0, b_1 = (b_lo << 16).to(tl.float32, bitcast=True), (b_lo & -65536).to(tl.float32, bitcast=True)
        b_2, b_3 = (b_hi << 16).to(tl.float32, bitcast=True), (b_hi & -65536).to(tl.float32, bitcast=True)
    return b_0.to(tl.float32), b_1.to(tl.float32), b_2.to(tl.float32), b_3.to(tl.float32)


@triton.jit
def add_word(b_acc, b_w, p_x, mask, D: tl.constexpr, X: tl.constexpr, EVEN_K: tl.constexpr):
    """Return b_acc plus the products of one word of each entry, b_w as floats, with activations at p_x."""
    b_x = activations(tl.load(p_x) if EVEN_K else tl.load(p_x, mask=mask, other=0), D, X)
    b_acc += b_w[0] * b_x[0]
    b_acc += b_w[1] * b_x[1]
    if D > 2:
        b_acc += b_w[2] * b_x[2]
        b_acc += b_w[3] * b_x[3]
    return b_acc


@triton.jit
def add_entries(
    b_acc, b_w, b_v, b_s, p_x, mask, D: tl.constexpr, X: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr
):
    """Return b_acc plus the products of entries with one token, scaled by b_s unless there is one group per row.

    b_w and b_v: the first and, if D is 8, the second word of each entry, as floats.
    """
    b_p = b_acc if GROUP == 0 else tl.zeros(b_acc.shape, tl.float32)
    b_p = add_word(b_p, b_w, p_x, mask, D, X, EVEN_K)
    if D == 8:
        b_p = add_word(b_p, b_v, p_x + 1, mask, D, X, EVEN_K)
    return b_p if GROUP == 0 else b_acc + b_p * b_s


@triton.jit
def few_vectors_kernel(
    x_ptr,
    w_ptr,
    t_ptr,
    s_ptr,
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
    D: tl.constexpr,
    ENTRIES: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    X: tl.constexpr,
):
    """Store BLOCK_N columns of x [M, K] @ w.T (+ b [N]) into o [splits, M, N]; grid (N tiles, splits).

    x in words of two activations of type X if D is 2, else of four, stride_xm of them to the next token, zeros behind
    column K up to a whole entry. w uint8 [Np, Kp / D], t int32 [D / 4, ENTRIES], s [Gp, Np], as `vector_product.pack`
    made them; b may be None. A chunk is CODES codes, D columns each. GROUP is 0 for one group per row, else a multiple
    of a chunk.
    """
    CHUNK: tl.constexpr = D * CODES
    WORDS: tl.constexpr = CHUNK // min(D, 4)  # of activations, in a chunk
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, CODES)[None, :]
    i_first = i_k * chunks_per_split
    i_last = tl.minimum(i_first + chunks_per_split, chunks)

    # Pointers walk, as in `few`.
    p_w = w_ptr + o_n.to(tl.int64)[:, None] * stride_wn + (i_first * CODES + o_c)
    p_x0 = x_ptr + (i_first * WORDS + o_c * (WORDS // CODES))
    p_x1 = p_x0 + stride_xm
    p_x2 = p_x1 + stride_xm
    p_x3 = p_x2 + stride_xm

    b_t0 = words_of(t_ptr, 0, ENTRIES)
    b_t1 = b_t0
    if D == 8:
        b_t1 = words_of(t_ptr, 1, ENTRIES)
    b_s = tl.load(s_ptr + o_n).to(tl.float32)
    b_scale = b_s[:, None]

    b_acc0 = tl.zeros((BLOCK_N, CODES), tl.float32)
    b_acc1 = b_acc0
    b_acc2 = b_acc0
    b_acc3 = b_acc0
    for i_c in range(i_first, i_last):
        b_q = tl.load(p_w).to(tl.int32)
        if GROUP > 0:
            o_g = i_c * CHUNK // GROUP * stride_sg + o_n  # below 2**31 up to 2**36 weights
            b_scale = tl.load(s_ptr + o_g).to(tl.float32)[:, None]
        b_w = floats(look_up(b_t0, b_q), two_23_bits)
        b_v = b_w
        if D == 8:
            b_v = floats(look_up(b_t1, b_q), two_23_bits)
        mask = i_c * CHUNK + o_c * D < K
        b_acc0 = add_entries(b_acc0, b_w, b_v, b_scale, p_x0, mask, D, X, GROUP, EVEN_K)
        if M > 1:
            b_acc1 = add_entries(b_acc1, b_w, b_v, b_scale, p_x1, mask, D, X, GROUP, EVEN_K)
        if M > 2:
            b_acc2 = add_entries(b_acc2, b_w, b_v, b_scale, p_x2, mask, D, X, GROUP, EVEN_K)
        if M > 3:
            b_acc3 = add_entries(b_acc3, b_w, b_v, b_scale, p_x3, mask, D, X, GROUP, EVEN_K)
        p_w += CODES
        p_x0 += WORDS
        p_x1 += WORDS
        p_x2 += WORDS
        p_x3 += WORDS

    p_o = o_ptr + i_k.to(tl.int64) * M * N + o_n
    store_sums(p_o, b_acc0, b_s, b_ptr, o_n, N, GROUP)
    if M > 1:
        store_sums(p_o + N, b_acc1, b_s, b_ptr, o_n, N, GROUP)
    if M > 2:
        store_sums(p_o + 2 * N, b_acc2, b_s, b_ptr, o_n, N, GROUP)
    if M > 3:
        store_sums(p_o + 3 * N, b_acc3, b_s, b_ptr, o_n, N, GROUP)


@triton.jit
def dequantize_vectors_kernel(
    w_ptr,
    t_ptr,
    s_ptr,
    o_ptr,
    N,
    K,
    first,
    chunks,
    stride_wn,
    stride_sg,
    two_23_bits,
    D: tl.constexpr,
    ENTRIES: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Store rows first, first + 1, … of the weight in o [N, K]; grid (N tiles, runs of CHUNKS chunks).

    w, t, s and GROUP as for `few_vectors_kernel`.
    """
    CHUNK: tl.constexpr = D * CODES
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_row = first + o_n
    p_w = w_ptr + o_row.to(tl.int64)[:, None] * stride_wn + tl.arange(0, CODES)[None, :]
    b_t0 = words_of(t_ptr, 0, ENTRIES)
    b_t1 = b_t0
    if D == 8:
        b_t1 = words_of(t_ptr, 1, ENTRIES)
    i_first = tl.program_id(1) * CHUNKS
    for i_c in range(i_first, tl.minimum(i_first + CHUNKS, chunks)):
        o_g = o_row
        if GROUP > 0:
            o_g = i_c * CHUNK // GROUP * stride_sg + o_row  # below 2**31 up to 2**36 weights
        b_s = tl.load(s_ptr + o_g).to(tl.float32)[:, None]
        b_q = tl.load(p_w + i_c * CODES).to(tl.int32)
        b_w = floats(look_up(b_t0, b_q), two_23_bits)
        b_v = b_w
        if D == 8:
            b_v = floats(look_up(b_t1, b_q), two_23_bits)
        b_d = joined(b_w[0], b_w[1], b_w[2], b_w[3], b_v[0], b_v[1], b_v[2], b_v[3], D)
        store_weight(o_ptr, b_d, b_s, o_n, i_c * CHUNK + tl.arange(0, CHUNK)[None, :], N, K, EVEN_K)
