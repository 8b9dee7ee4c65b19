"""Codes of 2 to 8 bits into 32-bit words, and back, on a GPU: what `llmq.formats.bits` does in PyTorch, in one launch.

As a stream, 32 codes take as many whole words as a code has bits, and everything within those words is known at once:
the word and the shift of each code. So no position is multiplied beyond 32 bits, however long a row is. Packing has one
lane per word, which gathers its codes; unpacking one lane per code, which takes it from one word or from two.

Letters: R rows, C codes of each, W words of each.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.launch import COMPILE_OPTIONS, interpreted, on

WORD: tl.constexpr = tl.constexpr(32)
TILE = 1024  # words, or codes, of a program
UNPACKED = 4 * TILE
NUM_WARPS = 4


@triton.jit
def pack_kernel(
    c_ptr,
    o_ptr,
    R,
    C,
    W,
    stride_cr,
    stride_cc,
    BITS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Store words o [R, W] int32 of the codes c [R, C] uint8; grid (R tiles, W tiles)."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    if PADDED:
        o_first = o_w * (WORD // BITS)
        o_shift = o_w * 0
    else:
        # The first code that has a bit in the word, and how far below the word it begins.
        o_in = o_w % BITS * WORD
        o_first = o_w // BITS * WORD + o_in // BITS
        o_shift = -(o_in % BITS)
    p_c = c_ptr + o_r[:, None] * stride_cr
    mask_r = (o_r < R)[:, None]
    b_word = tl.zeros((BLOCK_R, BLOCK_W), tl.int32)
    for i in tl.static_range(WORD // BITS if PADDED else (WORD - 2) // BITS + 2):
        o_c = o_first + i
        o_left = o_shift + i * BITS
        mask = mask_r & ((o_c < C) & (o_left < WORD))[None, :]
        b_c = tl.load(p_c + o_c.to(tl.int64)[None, :] * stride_cc, mask=mask, other=0).to(tl.int32)
        if i == 0:
            b_c = b_c >> tl.maximum(-o_left, 0)[None, :]
        b_word |= b_c << tl.minimum(tl.maximum(o_left, 0), WORD - 1)[None, :]
    p_o = o_ptr + o_r[:, None] * W + o_w[None, :]
    tl.store(p_o, b_word, mask=mask_r & (o_w < W)[None, :])


@triton.jit
def unpack_kernel(
    w_ptr,
    o_ptr,
    R,
    C,
    stride_wr,
    stride_ww,
    BITS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store codes o [R, C] uint8 of the words w [R, W] int32; grid (R tiles, C tiles)."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if PADDED:
        o_word = o_c // (WORD // BITS)
        o_shift = o_c % (WORD // BITS) * BITS
    else:
        o_in = o_c % WORD * BITS
        o_word = o_c // WORD * BITS + o_in // WORD
        o_shift = o_in % WORD
    mask = (o_r < R)[:, None] & (o_c < C)[None, :]
    p_w = w_ptr + o_r[:, None] * stride_wr + o_word.to(tl.int64)[None, :] * stride_ww
    b_code = tl.load(p_w, mask=mask, other=0).to(tl.uint32, bitcast=True) >> o_shift.to(tl.uint32)[None, :]
    if not PADDED and WORD % BITS != 0:
        mask_two = mask & (o_shift > WORD - BITS)[None, :]
        b_next = tl.load(p_w + stride_ww, mask=mask_two, other=0).to(tl.uint32, bitcast=True)
        b_code |= b_next << (-o_shift & (WORD - 1)).to(tl.uint32)[None, :]
    b_code &= (1 << BITS) - 1
    tl.store(o_ptr + o_r[:, None] * C + o_c[None, :], b_code.to(tl.uint8), mask=mask)


def tile(length: int, size: int) -> tuple[int, int]:
    """Return the rows and columns of a tile of `size` entries, for rows of `length`."""
    columns = min(triton.next_power_of_2(length), size)
    return size // columns, columns


def pack(codes: Tensor, bits: int, words: int, *, padded: bool) -> Tensor:
    """Return int32 words [..., `words`] of the uint8 `codes` [..., C], whose number is not looked at.

    Raises:
        ValueError: a dtype, a number of bits or a device does not fit.
    """
    _check(codes, torch.uint8, bits)
    count, rows = codes.shape[-1], prod(codes.shape[:-1])
    flat = codes.reshape(rows, count)
    out = torch.empty((rows, words), dtype=torch.int32, device=codes.device)
    if out.numel():
        block_r, block_w = tile(words, TILE)
        with on(codes.device):
            pack_kernel[(-(-rows // block_r), -(-words // block_w))](
                c_ptr=flat,
                o_ptr=out,
                R=rows,
                C=count,
                W=words,
                stride_cr=flat.stride(0),
                stride_cc=flat.stride(1),
                BITS=bits,
                PADDED=padded,
                BLOCK_R=block_r,
                BLOCK_W=block_w,
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
    return out.reshape(*codes.shape[:-1], words)


def unpack(words: Tensor, bits: int, count: int, *, padded: bool) -> Tensor:
    """Return the `count` uint8 codes [..., C] of int32 `words` [..., W], which must hold as many.

    Raises:
        ValueError: a dtype, a number of bits or a device does not fit.
    """
    _check(words, torch.int32, bits)
    rows = prod(words.shape[:-1])
    flat = words.reshape(rows, words.shape[-1])
    out = torch.empty((rows, count), dtype=torch.uint8, device=words.device)
    if out.numel():
        block_r, block_c = tile(count, UNPACKED)
        with on(words.device):
            unpack_kernel[(-(-rows // block_r), -(-count // block_c))](
                w_ptr=flat,
                o_ptr=out,
                R=rows,
                C=count,
                stride_wr=flat.stride(0),
                stride_ww=flat.stride(1),
                BITS=bits,
                PADDED=padded,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
                num_warps=NUM_WARPS,
                **COMPILE_OPTIONS,
            )
    return out.reshape(*words.shape[:-1], count)


def _check(tensor: Tensor, dtype: torch.dtype, bits: int) -> None:
    """Raise ValueError unless the kernels may assume the dtype, the bits and the device."""
    if tensor.dtype != dtype or not tensor.ndim:
        raise ValueError(f"{tensor.dtype} {list(tensor.shape)}: needs {dtype} [..., length]")
    if not 1 <= bits <= 8:
        raise ValueError(f"{bits} bits: needs 1 to 8")
    if tensor.device.type == "cpu" and not interpreted(pack_kernel):
        raise ValueError("on cpu; Triton kernels need a GPU, or TRITON_INTERPRET=1 set before they are imported")
