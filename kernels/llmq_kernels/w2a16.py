"""2-bit weights times 16-bit activations (W2A16), in Triton: half the bytes of 4 bits.

**Layout.** As `w4a16`, with eight planes instead of four: each row is cut into chunks of 128 columns, each chunk into
eight planes of 16 neighbouring columns, the least that tl.dot takes, and word r of a chunk holds its codes r, 16 + r,
32 + r … from low bits to high. A chunk may be of one group, of two or of four.

How codes become floats says `crumbs`; where the scale goes is as in `w4a16`.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels import layout, product
from llmq_kernels.crumbs import addend, centred_crumb, unpack_asm, unpack_twin
from llmq_kernels.few import load_x, store_sums
from llmq_kernels.layout import Layout, Packed, Weight
from llmq_kernels.many import store_weight
from llmq_kernels.nibbles import NIBBLE_BIAS


@triton.jit
def load_group(s_ptr, z_ptr, o_g, MIDDLE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return scales and zeros [BLOCK_N, 1] at o_g, MIDDLE for zeros where there are none."""
    b_s = tl.load(s_ptr + o_g)[:, None]
    b_z = tl.full((BLOCK_N, 1), MIDDLE, s_ptr.dtype.element_ty)
    if z_ptr is not None:
        b_z = tl.load(z_ptr + o_g)[:, None]
    return b_s, b_z


@triton.jit
def add_products_w2(
    b_acc,
    p_w,
    p_x,
    s_ptr,
    z_ptr,
    o_n,
    mask_m,
    i_first,
    i_last,
    K,
    stride_sg,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POST_SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Return b_acc [BLOCK_N, BLOCK_M] plus the products of chunks i_first to i_last, scaled.

    p_w and p_x point to the first chunk of the weight and of the activations; s and z [Gp, Np] and the constants as for
    `w2a16_kernel`; mask_m: which tokens there are.
    """
    PLANE: tl.constexpr = CHUNK // 8
    PER: tl.constexpr = 8 if GROUP % CHUNK == 0 else (4 if GROUP % (CHUNK // 2) == 0 else 2)  # planes of one group
    BIAS: tl.constexpr = (
        1024 if s_ptr.dtype.element_ty == tl.float16 else (128 if s_ptr.dtype.element_ty == tl.bfloat16 else 0)
    )
    o_d = tl.arange(0, PLANE)
    b_s0, b_z0 = load_group(s_ptr, z_ptr, o_n, BIAS + 2, BLOCK_N)
    for i_c in range(i_first, i_last):
        # Where chunks begin, their groups lie below 2**31 up to 2**36 weights.
        if GROUP > 0:
            b_s0, b_z0 = load_group(s_ptr, z_ptr, i_c * CHUNK // GROUP * stride_sg + o_n, BIAS + 2, BLOCK_N)
        b_s1, b_z1, b_s2, b_z2, b_s3, b_z3 = b_s0, b_z0, b_s0, b_z0, b_s0, b_z0
        if PER < 8:
            o_g = (i_c * CHUNK + CHUNK // 2) // GROUP * stride_sg + o_n
            b_s2, b_z2 = load_group(s_ptr, z_ptr, o_g, BIAS + 2, BLOCK_N)
            b_s3, b_z3 = b_s2, b_z2
        if PER < 4:
            o_g = (i_c * CHUNK + CHUNK // 4) // GROUP * stride_sg + o_n
            b_s1, b_z1 = load_group(s_ptr, z_ptr, o_g, BIAS + 2, BLOCK_N)
            o_g = (i_c * CHUNK + CHUNK // 4 * 3) // GROUP * stride_sg + o_n
            b_s3, b_z3 = load_group(s_ptr, z_ptr, o_g, BIAS + 2, BLOCK_N)
        b_q = tl.load(p_w)
        b_0, b_1 = addend(b_z0, 0, BIAS, COMPUTE), addend(b_z0, 1, BIAS, COMPUTE)
        b_2, b_3 = addend(b_z1, 2, BIAS, COMPUTE), addend(b_z1, 3, BIAS, COMPUTE)
        b_4, b_5 = addend(b_z2, 4, BIAS, COMPUTE), addend(b_z2, 5, BIAS, COMPUTE)
        b_6, b_7 = addend(b_z3, 6, BIAS, COMPUTE), addend(b_z3, 7, BIAS, COMPUTE)
        b_scales = (b_s0, b_s1, b_s2, b_s3)
        b_addends = (b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7)
        if ASM:
            b_planes = unpack_asm(b_q, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7, COMPUTE)
        for i in tl.static_range(8):
            mask = mask_m
            if not EVEN_K:
                mask = mask_m & ((i_c * CHUNK + i * PLANE + o_d)[:, None] < K)
            b_x = tl.load(p_x + i * PLANE, mask=mask, other=0.0).to(COMPUTE)
            b_w = b_planes[i] if ASM else unpack_twin(b_q, b_addends[i], i, COMPUTE)
            if GROUP == 0:
                b_acc = tl.dot(b_w, b_x, b_acc, input_precision="ieee")
            elif POST_SCALE:
                if i % PER == 0:
                    b_p = tl.dot(b_w, b_x, input_precision="ieee")
                else:
                    b_p = tl.dot(b_w, b_x, b_p, input_precision="ieee")
                if i % PER == PER - 1:
                    b_acc += b_p * b_scales[i // 2].to(tl.float32)
            else:
                b_acc = tl.dot(b_w * b_scales[i // 2].to(COMPUTE), b_x, b_acc, input_precision="ieee")
        p_w += PLANE
        p_x += CHUNK
    if GROUP == 0:
        b_acc *= b_s0.to(tl.float32)
    return b_acc


@triton.jit
def w2a16_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
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

    w int16 [Np, Kp / 8], s and z [Gp, Np], as `pack` made them; z and b may be None. GROUP is 0 for one group per row;
    else CHUNK divides GROUP, or each half or quarter of a chunk lies in one group.
    """
    PLANE: tl.constexpr = CHUNK // 8
    i_n, i_m, i_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, PLANE)
    i_first = i_k * chunks_per_split
    i_last = tl.minimum(i_first + chunks_per_split, chunks)

    p_w = w_ptr + o_n.to(tl.int64)[:, None] * stride_wn + (i_first * PLANE + o_d)[None, :]
    p_x = x_ptr + o_m.to(tl.int64)[None, :] * stride_xm + (i_first * CHUNK + o_d)[:, None]
    mask_m = (o_m < M)[None, :]

    b_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    b_acc = add_products_w2(
        b_acc, p_w, p_x, s_ptr, z_ptr, o_n, mask_m, i_first, i_last, K, stride_sg,
        GROUP, CHUNK, EVEN_K, BLOCK_N, POST_SCALE, COMPUTE, ASM,
    )  # fmt: skip
    if b_ptr is not None:
        b_acc += tl.load(b_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
    p_o = o_ptr + (i_k.to(tl.int64) * M + o_m.to(tl.int64)[None, :]) * N + o_n[:, None]
    tl.store(p_o, b_acc.to(o_ptr.dtype.element_ty), mask=mask_m & (o_n < N)[:, None])


@triton.jit
def few_w2_kernel(
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

    w, s, z, b and GROUP as for `w2a16_kernel`; the rest as for `few.few_w4_kernel`.
    """
    PLANE: tl.constexpr = CHUNK // 8
    PER: tl.constexpr = 8 if GROUP % CHUNK == 0 else (4 if GROUP % (CHUNK // 2) == 0 else 2)  # planes of one group
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

    b_row, b_z = load_group(s_ptr, z_ptr, o_n, 2 + ZERO_BIAS, BLOCK_N)
    b_s = b_row.to(tl.float32)
    b_z = b_z.to(tl.float32) - ZERO_BIAS
    b_acc0 = tl.zeros((BLOCK_N, PLANE), tl.float32)
    b_acc1 = b_acc0
    b_acc2 = b_acc0
    b_acc3 = b_acc0
    for i_c in range(i_first, i_last):
        b_q = tl.load(p_w).to(tl.int32)
        # The sums of a group: scaled when it ends, unless there is one group per row.
        b_p0, b_p1, b_p2, b_p3 = b_acc0, b_acc1, b_acc2, b_acc3
        for i in tl.static_range(8):
            if GROUP > 0 and i % PER == 0:
                o_g = (i_c * CHUNK + i * PLANE) // GROUP * stride_sg + o_n  # below 2**31 up to 2**36 weights
                b_s, b_z = load_group(s_ptr, z_ptr, o_g, 2 + ZERO_BIAS, BLOCK_N)
                b_s = b_s.to(tl.float32)
                b_z = b_z.to(tl.float32) - ZERO_BIAS
                b_p0 = tl.zeros((BLOCK_N, PLANE), tl.float32)
                b_p1, b_p2, b_p3 = b_p0, b_p0, b_p0
            b_w = centred_crumb(b_q, b_z, two_23_bits, i)
            o_k = i_c * CHUNK + i * PLANE + o_d
            b_p0 += b_w * load_x(p_x0 + i * PLANE, o_k, K, EVEN_K)
            if M > 1:
                b_p1 += b_w * load_x(p_x1 + i * PLANE, o_k, K, EVEN_K)
            if M > 2:
                b_p2 += b_w * load_x(p_x2 + i * PLANE, o_k, K, EVEN_K)
            if M > 3:
                b_p3 += b_w * load_x(p_x3 + i * PLANE, o_k, K, EVEN_K)
            if GROUP > 0 and i % PER == PER - 1:
                b_acc0 += b_p0 * b_s
                b_acc1 += b_p1 * b_s
                b_acc2 += b_p2 * b_s
                b_acc3 += b_p3 * b_s
        if GROUP == 0:
            b_acc0, b_acc1, b_acc2, b_acc3 = b_p0, b_p1, b_p2, b_p3
        p_w += PLANE
        p_x0 += CHUNK
        p_x1 += CHUNK
        p_x2 += CHUNK
        p_x3 += CHUNK

    b_scale = tl.load(s_ptr + o_n).to(tl.float32)
    p_o = o_ptr + i_k.to(tl.int64) * M * N + o_n
    store_sums(p_o, b_acc0, b_scale, b_ptr, o_n, N, GROUP)
    if M > 1:
        store_sums(p_o + N, b_acc1, b_scale, b_ptr, o_n, N, GROUP)
    if M > 2:
        store_sums(p_o + 2 * N, b_acc2, b_scale, b_ptr, o_n, N, GROUP)
    if M > 3:
        store_sums(p_o + 3 * N, b_acc3, b_scale, b_ptr, o_n, N, GROUP)


@triton.jit
def dequantize_w2_kernel(
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

    w, s, z and GROUP as for `w2a16_kernel`.
    """
    PLANE: tl.constexpr = CHUNK // 8
    PER: tl.constexpr = 8 if GROUP % CHUNK == 0 else (4 if GROUP % (CHUNK // 2) == 0 else 2)  # planes of one group
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, PLANE)[None, :]
    o_row = first + o_n
    p_w = w_ptr + o_row.to(tl.int64)[:, None] * stride_wn
    i_first = tl.program_id(1) * CHUNKS
    b_s, b_z = load_group(s_ptr, z_ptr, o_row, 2 + ZERO_BIAS, BLOCK_N)
    for i_c in range(i_first, tl.minimum(i_first + CHUNKS, chunks)):
        b_q = tl.load(p_w + (i_c * PLANE + o_d)).to(tl.int32)
        for i in tl.static_range(8):
            if GROUP > 0 and i % PER == 0:
                o_g = (i_c * CHUNK + i * PLANE) // GROUP * stride_sg + o_row  # below 2**31 up to 2**36 weights
                b_s, b_z = load_group(s_ptr, z_ptr, o_g, 2 + ZERO_BIAS, BLOCK_N)
            b_w = centred_crumb(b_q, b_z.to(tl.float32) - ZERO_BIAS, two_23_bits, i)
            o_k = i_c * CHUNK + i * PLANE + o_d
            store_weight(o_ptr, b_w, b_s.to(tl.float32), o_n, o_k, N, K, EVEN_K)


LAYOUT = Layout(
    name="w2a16",
    tiled=w2a16_kernel,
    few=few_w2_kernel,
    dequantize=dequantize_w2_kernel,
    bits=2,
    word=torch.int16,
    columns_per_word=8,
    zero_bias=NIBBLE_BIAS,
)


def refuses(n: int, k: int, bits: int, group_size: int, dtype: torch.dtype) -> str | None:
    """Return why this kernel cannot multiply with an [n, k] weight of this kind, or None: as `w4a16.refuses`."""
    return layout.refuses(LAYOUT, n, k, bits, group_size, dtype)


def pack(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, dtype: torch.dtype) -> Packed:
    """Return the operands of `matmul` for activations of `dtype`.

    codes uint8 [N, K] in 0..3; scales [N, G], of either sign, rounded to `dtype`; zeros [N, G] whole numbers in 0..4,
    or None where all are 2. The result holds int16 [Np, Kp / 8], and [Gp, Np] in `dtype` once or twice. ValueError says
    which argument does not fit.
    """
    layout.check_quantized(LAYOUT, codes, scales, zeros, group_size, dtype)
    k = codes.shape[1]
    padded = layout.pad_codes(LAYOUT, codes, group_size)
    rows, columns = padded.shape
    chunk = LAYOUT.chunk(k, group_size)
    planes = padded.view(rows, columns // chunk, 8, chunk // 8).unbind(2)
    # Four codes as bytes, then pairs of bytes as words: int16 itself has no room for a shift by 14.
    low, high = (p[0] | p[1] << 2 | p[2] << 4 | p[3] << 6 for p in (planes[:4], planes[4:]))
    weight = torch.stack((low, high), dim=-1).view(torch.int16).reshape(rows, columns // 8)
    biased = None
    if zeros is not None:
        biased = layout.pack_groups(LAYOUT, zeros + NIBBLE_BIAS[dtype], k, group_size, dtype)
    return Packed(weight, layout.pack_groups(LAYOUT, scales, k, group_size, dtype), biased)


def unpack(packed: Sequence[Tensor | None], n: int, k: int, group_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes uint8 [N, K], scales float32 [N, G] as they are stored, and zeros float32 [N, G] or None.

    The inverse of `pack`: codes and zeros are those that were packed.
    """
    operands = Packed(*packed)  # type: ignore[arg-type]  # only the zeros may be None
    chunk = LAYOUT.chunk(k, group_size)
    rows = operands.weight.shape[0]
    halves = operands.weight.view(torch.uint8).view(rows, -1, chunk // 8, 2)
    planes = torch.stack([half >> shift & 3 for half in halves.unbind(-1) for shift in (0, 2, 4, 6)], dim=2)
    codes = planes.reshape(rows, -1)[:n, :k].contiguous()
    scales = layout.unpack_groups(operands.scales, n, k, group_size)
    if operands.zeros is None:
        return codes, scales, None
    zeros = layout.unpack_groups(operands.zeros, n, k, group_size) - NIBBLE_BIAS[operands.zeros.dtype]
    return codes, scales, zeros


def matmul(
    x: Tensor,
    packed: Sequence[Tensor | None],
    bias: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    *,
    splits: int | None = None,
) -> Tensor:
    """Return ``x @ w.T + bias`` as [M, N] in the dtype of x; see `product.matmul`.

    x [M, K], any strides, in the dtype that `pack` was given; packed its result or the flat list of its tensors; bias
    [N] or None. ValueError says which argument does not fit.
    """
    operands = Packed(*packed)  # type: ignore[arg-type]  # only the zeros may be None
    return product.matmul(x, Weight(LAYOUT, operands, n, k, group_size), bias, splits=splits)
