"""4-bit weights times 16-bit activations (W4A16), in Triton.

**Layout: planes of K.** Each row is cut into chunks of 128 columns (64 when a group has no multiple of
128), and each chunk into four planes of neighbouring columns. A word of int16 holds one nibble of each
plane: with planes of d columns, word r of a chunk holds its codes r, d + r, 2 d + r and 3 d + r, from low
bits to high. Plane i is then one shift and one mask for the whole tile, and four planes are four tl.dot
with four slices of the activations. Storing eight neighbours in an int32, as GPTQ's files do, needs each
word eight times: Triton's pipeliner copies the repetitions to shared memory, more than an H100 has at tiles
of 128.

Nibbles become floats as `nibbles` says: exactly, and without an instruction that converts.

**Where the scale goes.** For few tokens it multiplies the float32 partial sum of its group: fewer
operations, and weights stay exact. From 64 tokens on that takes too many registers, and each weight is
scaled in 16 bits. With one group per row, the scale multiplies once, after the loop.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels import few, layout, many, product
from llmq_kernels.layout import Layout, Packed, Weight
from llmq_kernels.nibbles import NIBBLE_BIAS, unpack_asm, unpack_twin


@triton.jit
def add_products_w4(
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
    `w4a16_kernel`; mask_m: which tokens there are.
    """
    PLANE: tl.constexpr = CHUNK // 4
    TWO_GROUPS: tl.constexpr = GROUP % CHUNK != 0
    BIAS: tl.constexpr = (
        1024 if s_ptr.dtype.element_ty == tl.float16 else (128 if s_ptr.dtype.element_ty == tl.bfloat16 else 0)
    )
    o_d = tl.arange(0, PLANE)

    # One group per row: its scale and zero are loaded here, once. Without zeros: the middle code, biased.
    b_slo = tl.load(s_ptr + o_n)[:, None]
    b_zlo = tl.full((BLOCK_N, 1), BIAS + 8, s_ptr.dtype.element_ty)
    if z_ptr is not None:
        b_zlo = tl.load(z_ptr + o_n)[:, None]
    b_shi = b_slo
    b_zhi = b_zlo

    for i_c in range(i_first, i_last):
        if GROUP > 0:
            o_g = i_c * CHUNK // GROUP * stride_sg + o_n  # below 2**31 up to 2**36 weights
            b_slo = tl.load(s_ptr + o_g)[:, None]
            b_shi = b_slo
            if z_ptr is not None:
                b_zlo = tl.load(z_ptr + o_g)[:, None]
                b_zhi = b_zlo
            if TWO_GROUPS:
                o_g = (i_c * CHUNK + CHUNK // 2) // GROUP * stride_sg + o_n
                b_shi = tl.load(s_ptr + o_g)[:, None]
                if z_ptr is not None:
                    b_zhi = tl.load(z_ptr + o_g)[:, None]
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
            b_w0, b_w1, b_w2, b_w3 = unpack_asm(b_q, b_zlo, b_zhi, COMPUTE)
        else:
            b_w0, b_w1, b_w2, b_w3 = unpack_twin(b_q, b_zlo.to(COMPUTE), b_zhi.to(COMPUTE), BIAS, COMPUTE)

        if GROUP == 0:
            b_acc = tl.dot(b_w0, b_x0, b_acc, input_precision="ieee")
            b_acc = tl.dot(b_w1, b_x1, b_acc, input_precision="ieee")
            b_acc = tl.dot(b_w2, b_x2, b_acc, input_precision="ieee")
            b_acc = tl.dot(b_w3, b_x3, b_acc, input_precision="ieee")
        elif POST_SCALE:
            b_p = tl.dot(b_w0, b_x0, input_precision="ieee")
            b_p = tl.dot(b_w1, b_x1, b_p, input_precision="ieee")
            if TWO_GROUPS:
                b_acc += b_p * b_slo.to(tl.float32)
                b_p = tl.dot(b_w2, b_x2, input_precision="ieee")
            else:
                b_p = tl.dot(b_w2, b_x2, b_p, input_precision="ieee")
            b_p = tl.dot(b_w3, b_x3, b_p, input_precision="ieee")
            b_acc += b_p * b_shi.to(tl.float32)
        else:
            b_acc = tl.dot(b_w0 * b_slo.to(COMPUTE), b_x0, b_acc, input_precision="ieee")
            b_acc = tl.dot(b_w1 * b_slo.to(COMPUTE), b_x1, b_acc, input_precision="ieee")
            b_acc = tl.dot(b_w2 * b_shi.to(COMPUTE), b_x2, b_acc, input_precision="ieee")
            b_acc = tl.dot(b_w3 * b_shi.to(COMPUTE), b_x3, b_acc, input_precision="ieee")
        p_w += PLANE
        p_x += CHUNK

    if GROUP == 0:
        b_acc *= b_slo.to(tl.float32)
    return b_acc


@triton.jit
def w4a16_kernel(
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

    w int16 [Np, Kp / 4], s and z [Gp, Np], as `pack` made them; z and b may be None. GROUP is 0 for one group
    per row; else CHUNK divides GROUP, or each half of a chunk lies in one group.
    """
    PLANE: tl.constexpr = CHUNK // 4
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
    b_acc = add_products_w4(
        b_acc, p_w, p_x, s_ptr, z_ptr, o_n, mask_m, i_first, i_last, K, stride_sg,
        GROUP, CHUNK, EVEN_K, BLOCK_N, POST_SCALE, COMPUTE, ASM,
    )  # fmt: skip
    if b_ptr is not None:
        b_acc += tl.load(b_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
    p_o = o_ptr + (i_k.to(tl.int64) * M + o_m.to(tl.int64)[None, :]) * N + o_n[:, None]
    tl.store(p_o, b_acc.to(o_ptr.dtype.element_ty), mask=mask_m & (o_n < N)[:, None])


LAYOUT = Layout(
    name="w4a16",
    tiled=w4a16_kernel,
    few=few.few_w4_kernel,
    dequantize=many.dequantize_w4_kernel,
    bits=4,
    word=torch.int16,
    columns_per_word=4,
    zero_bias=NIBBLE_BIAS,
)


def refuses(n: int, k: int, bits: int, group_size: int, dtype: torch.dtype) -> str | None:
    """Return why this kernel cannot multiply with an [n, k] weight of this kind, or None if it can.

    The group size must divide k, and be a multiple of 32 unless it is k. float32 activations are multiplied
    without tensor cores: right, and slow.
    """
    return layout.refuses(LAYOUT, n, k, bits, group_size, dtype)


def pack(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, dtype: torch.dtype) -> Packed:
    """Return the operands of `matmul` for activations of `dtype`.

    codes uint8 [N, K] in 0..15; scales [N, G], of either sign, rounded to `dtype`; zeros [N, G] whole
    numbers in 0..16, or None where all are 8. The result holds int16 [Np, Kp / 4], and [Gp, Np] in `dtype`
    once or twice. ValueError says which argument does not fit.
    """
    layout.check_quantized(LAYOUT, codes, scales, zeros, group_size, dtype)
    k = codes.shape[1]
    padded = layout.pad_codes(LAYOUT, codes, group_size)
    rows, columns = padded.shape
    chunk = LAYOUT.chunk(k, group_size)
    planes = padded.view(rows, columns // chunk, 4, chunk // 4).unbind(2)
    # Pairs of nibbles as bytes, then pairs of bytes as words: int16 itself has no room for a shift by 12.
    low, high = planes[0] | planes[1] << 4, planes[2] | planes[3] << 4
    weight = torch.stack((low, high), dim=-1).view(torch.int16).reshape(rows, columns // 4)
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
    halves = operands.weight.view(torch.uint8).view(rows, -1, chunk // 4, 2)
    low, high = halves.unbind(-1)
    planes = torch.stack((low & 15, low >> 4, high & 15, high >> 4), dim=2)
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

    x [M, K], any strides, in the dtype that `pack` was given; packed its result or the flat list of its
    tensors; bias [N] or None. ValueError says which argument does not fit.
    """
    operands = Packed(*packed)  # type: ignore[arg-type]  # only the zeros may be None
    return product.matmul(x, Weight(LAYOUT, operands, n, k, group_size), bias, splits=splits)
