"""8-bit weights times 16-bit activations (W8A16), in Triton.

**Layout.** uint8 [Np, Kp], K contiguous: the codes as they are, padded. Zeros are the zeros, in the dtype
of the scales: whole numbers up to 256 are exact in bf16 (8 significant bits) and in fp16.

**Byte to float without a conversion instruction.** 0x6400 | code is the fp16 number 1024 + code; for bf16,
whose 7 mantissa bits do not hold a byte, 0x4B000000 | code is the float32 number 2**23 + code. Subtracting
the zero with the same number added leaves code - zero, exactly; it is one of -256..255, so that rounding a
float32 to bf16 loses nothing. A plain cast compiles to one int-to-float instruction per weight on sm_80, at
a quarter of the rate or less, and for fp16 on sm_90 too. Inline assembly, which halves the work on nibbles,
has nothing to add: bytes are not packed two to a register that floats could share.

Where the scale goes, and what a chunk is: as in `w4a16`, with the chunk always inside one group.
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
from llmq_kernels.layout import ACTIVATIONS, Layout, Packed, Weight


@triton.jit
def centred(b_q, b_z, COMPUTE: tl.constexpr):
    """Return code - zero, as COMPUTE, of the uint8 codes b_q and the zeros b_z; exact."""
    if COMPUTE == tl.float16:  # noqa: SIM300
        b_w = (b_q.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (b_z + 1024)
    else:
        b_big = (b_q.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
        b_w = (b_big - (b_z.to(tl.float32) + 8388608)).to(COMPUTE)
    return b_w


@triton.jit
def w8a16_kernel(
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

    w uint8 [Np, Kp], s and z [Gp, Np], as `pack` made them; z and b may be None. GROUP is 0 for one group
    per row, else a multiple of CHUNK. ASM changes nothing here: the argument list is that of every kernel
    of `tiling`.
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

    # One group per row: its scale and zero are loaded here, once. Without zeros: the middle code.
    b_s = tl.load(s_ptr + o_n)[:, None]
    b_z = tl.full((BLOCK_N, 1), 128, s_ptr.dtype.element_ty)
    if z_ptr is not None:
        b_z = tl.load(z_ptr + o_n)[:, None]

    b_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i_c in range(i_first, i_last):
        if GROUP > 0:
            o_g = i_c * CHUNK // GROUP * stride_sg + o_n  # below 2**31 up to 2**36 weights
            b_s = tl.load(s_ptr + o_g)[:, None]
            if z_ptr is not None:
                b_z = tl.load(z_ptr + o_g)[:, None]
        b_w = centred(tl.load(p_w), b_z, COMPUTE)
        mask = mask_m
        if not EVEN_K:
            mask = mask_m & ((i_c * CHUNK + o_c)[:, None] < K)
        b_x = tl.load(p_x, mask=mask, other=0.0).to(COMPUTE)

        if GROUP == 0:
            b_acc = tl.dot(b_w, b_x, b_acc, input_precision="ieee")
        elif POST_SCALE:
            b_acc += tl.dot(b_w, b_x, input_precision="ieee") * b_s.to(tl.float32)
        else:
            b_acc = tl.dot(b_w * b_s.to(COMPUTE), b_x, b_acc, input_precision="ieee")
        p_w += CHUNK
        p_x += CHUNK

    if GROUP == 0:
        b_acc *= b_s.to(tl.float32)
    if b_ptr is not None:
        b_acc += tl.load(b_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
    p_o = o_ptr + (i_k.to(tl.int64) * M + o_m.to(tl.int64)[None, :]) * N + o_n[:, None]
    tl.store(p_o, b_acc.to(o_ptr.dtype.element_ty), mask=mask_m & (o_n < N)[:, None])


LAYOUT = Layout(
    name="w8a16",
    tiled=w8a16_kernel,
    few=few.few_w8_kernel,
    dequantize=many.dequantize_w8_kernel,
    bits=8,
    word=torch.uint8,
    columns_per_word=1,
    zero_bias=dict.fromkeys(ACTIVATIONS, 0),
)


def refuses(n: int, k: int, bits: int, group_size: int, dtype: torch.dtype) -> str | None:
    """Return why this kernel cannot multiply with an [n, k] weight of this kind, or None if it can.

    The group size must divide k, and be a multiple of 32 unless it is k. float32 activations are multiplied
    without tensor cores: right, and slow.
    """
    return layout.refuses(LAYOUT, n, k, bits, group_size, dtype)


def pack(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, dtype: torch.dtype) -> Packed:
    """Return the operands of `matmul` for activations of `dtype`.

    codes uint8 [N, K]; scales [N, G], of either sign, rounded to `dtype`; zeros [N, G] whole numbers in
    0..256, or None where all are 128. The result holds uint8 [Np, Kp], and [Gp, Np] in `dtype` once or
    twice. ValueError says which argument does not fit.
    """
    layout.check_quantized(LAYOUT, codes, scales, zeros, group_size, dtype)
    k = codes.shape[1]
    return Packed(
        layout.pad_codes(LAYOUT, codes, group_size).contiguous(),
        layout.pack_groups(LAYOUT, scales, k, group_size, dtype),
        None if zeros is None else layout.pack_groups(LAYOUT, zeros, k, group_size, dtype),
    )


def unpack(packed: Sequence[Tensor | None], n: int, k: int, group_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes uint8 [N, K], scales float32 [N, G] as they are stored, and zeros float32 [N, G] or None.

    The inverse of `pack`: codes and zeros are those that were packed.
    """
    operands = Packed(*packed)  # type: ignore[arg-type]  # only the zeros may be None
    codes = operands.weight[:n, :k].contiguous()
    scales = layout.unpack_groups(operands.scales, n, k, group_size)
    if operands.zeros is None:
        return codes, scales, None
    return codes, scales, layout.unpack_groups(operands.zeros, n, k, group_size)


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
