"""The column loop of GPTQ inside one block, as a single Triton launch.

A block is up to 128 columns of a weight whose rows are independent, so a program takes all columns of 32 rows and
walks through them alone: no program waits for another. Storage is K-major, a column of the weight in one line of
memory. The errors of the block so far are kept in registers, [columns, rows], and column j of R sums them up. That
reads R by columns, which is how Cholesky factorizations store it, and costs two instructions per entry and column;
keeping the sums instead would take a third, to pick one out. Eagerly the same loop is some ten launches per column.

All in float32, without tensor cores. Division rounds correctly, as PyTorch's does (Triton's ``/`` does not), and ties
go to the even code; so codes equal those of the same loop in PyTorch except where the order of a sum decides a tie.

Letters: B columns of the block, N rows of the weight, G groups per row.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.launch import COMPILE_OPTIONS, interpreted

MAX_COLUMNS = 128

# From 2**23 on, float32 numbers are whole: adding 1.5 * 2**23 and taking it away again rounds to the nearest whole
# number, to the even one in ties. Numbers beyond 2**22 leave that range; their codes are at an end of the grid anyway.
# (Triton's own round-to-even is an external function, which the interpreter does not have.)
ROUNDER: tl.constexpr = tl.constexpr(1.5 * 2**23)


@dataclass(frozen=True)
class Config:
    """Tile sizes for one range of B."""

    block_b: int  # the most columns that it is for
    block_n: int
    num_warps: int


# A warp reads 32 neighbouring rows, one line of 128 bytes, and each lane keeps 32 errors. More rows per program would
# fill the GPU worse: at N = 4096 these already are just 128 programs. Nothing spills (scripts/sass_report.py).
CONFIGS = (
    Config(block_b=32, block_n=32, num_warps=1),
    Config(block_b=64, block_n=32, num_warps=2),
    Config(block_b=MAX_COLUMNS, block_n=32, num_warps=4),
)


@triton.jit
def gptq_block_kernel(
    w_ptr,
    y_ptr,
    r_ptr,
    s_ptr,
    z_ptr,
    g_ptr,
    c_ptr,
    e_ptr,
    B,
    N,
    stride_w,
    stride_y,
    stride_ri,
    stride_rj,
    stride_s,
    stride_z,
    stride_c,
    stride_e,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store codes c [B, N] and errors e [B, N] of BLOCK_N rows; grid (N tiles,).

    w, y [B, N], r [B, B], s, z [G, N], g [B], as for `gptq_block`; B <= BLOCK_B.
    """
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_i = tl.arange(0, BLOCK_B)
    mask_n = o_n < N
    # Pointers walk: a column times its stride may be beyond 2**31.
    p_w = w_ptr + o_n
    p_y = y_ptr + o_n
    p_r = r_ptr + o_i.to(tl.int64) * stride_ri
    p_d = r_ptr
    p_c = c_ptr + o_n
    p_e = e_ptr + o_n

    b_errors = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for j in range(B):
        b_w = tl.load(p_w, mask=mask_n, other=0.0)
        b_y = tl.load(p_y, mask=mask_n, other=0.0)
        b_r = tl.load(p_r, mask=o_i < j, other=0.0)
        b_inverse = tl.div_rn(1.0, tl.load(p_d))
        i_g = tl.load(g_ptr + j).to(tl.int64)
        b_s = tl.load(s_ptr + i_g * stride_s + o_n, mask=mask_n, other=1.0)
        b_z = tl.load(z_ptr + i_g * stride_z + o_n, mask=mask_n, other=0.0)

        b_y += tl.sum(b_r[:, None] * b_errors, axis=0)
        b_steps = tl.div_rn(b_w + b_y * b_inverse, b_s)
        b_steps = (b_steps + ROUNDER) - ROUNDER
        b_code = tl.minimum(tl.maximum(b_steps + b_z, LOWEST), HIGHEST)
        b_e = b_w - (b_code - b_z) * b_s
        tl.store(p_c, b_code.to(tl.uint8), mask=mask_n)
        tl.store(p_e, b_e, mask=mask_n)

        b_errors = tl.where((o_i == j)[:, None], b_e[None, :], b_errors)
        p_w += stride_w
        p_y += stride_y
        p_r += stride_rj
        p_d += stride_ri + stride_rj
        p_c += stride_c
        p_e += stride_e


def config(columns: int) -> Config:
    """Return the tile sizes for a block of `columns` columns."""
    return next(c for c in CONFIGS if columns <= c.block_b)


def gptq_block(
    w: Tensor,
    y: Tensor,
    r: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    *,
    lowest: int,
    highest: int,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """Round the columns of a block one after another; see `naive.gptq_block`, which says what is computed.

    Tensors may be slices of larger ones as long as their last dimension is contiguous; that of `r` need not be, and
    reading it is fastest where its columns are. `codes` and `errors` are written in place, nothing is allocated and
    nothing waits for the GPU. That is why `groups` is not looked at: an index beyond G reads foreign memory.

    Args:
        w: weights float32 [B, N], B <= 128.
        y: what the columns before the block carry into it, float32 [B, N].
        r: the block's part of the upper factor R, float32 [B, B]; nothing below its diagonal matters.
        scales: float32 [G, N], of either sign, never 0.
        zeros: float32 [G, N], whole numbers up to 2**20.
        groups: the row of `scales` and `zeros` for each column, int64 [B].
        lowest: the first code in use, not negative.
        highest: the last code, at most 255.
        codes: result, uint8 [B, N].
        errors: result, w minus its level, float32 [B, N]; must not share memory with the inputs.

    Raises:
        ValueError: an argument does not fit; the message says which.
    """
    _check(w, y, r, scales, zeros, groups, codes, errors)
    if not 0 <= lowest < highest <= 255:
        raise ValueError(f"codes {lowest} to {highest}: need 0 <= lowest < highest <= 255")
    columns, n = w.shape
    tile = config(columns)
    # Triton launches on the current device, not on that of its arguments.
    with torch.cuda.device(w.device) if w.is_cuda else nullcontext():
        gptq_block_kernel[(-(-n // tile.block_n),)](
            w_ptr=w,
            y_ptr=y,
            r_ptr=r,
            s_ptr=scales,
            z_ptr=zeros,
            g_ptr=groups,
            c_ptr=codes,
            e_ptr=errors,
            B=columns,
            N=n,
            stride_w=w.stride(0),
            stride_y=y.stride(0),
            stride_ri=r.stride(0),
            stride_rj=r.stride(1),
            stride_s=scales.stride(0),
            stride_z=zeros.stride(0),
            stride_c=codes.stride(0),
            stride_e=errors.stride(0),
            LOWEST=float(lowest),
            HIGHEST=float(highest),
            BLOCK_B=tile.block_b,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )


def _check(
    w: Tensor,
    y: Tensor,
    r: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """Raise ValueError unless the kernel may assume its shapes, dtypes, strides and devices."""
    if w.ndim != 2 or not 1 <= w.shape[0] <= MAX_COLUMNS:
        raise ValueError(f"w {list(w.shape)}: needs [B, N] with B from 1 to {MAX_COLUMNS}")
    b, n = w.shape
    g = max(scales.shape[0], 1) if scales.ndim else 1
    needs = (
        ("w", w, (b, n), torch.float32),
        ("y", y, (b, n), torch.float32),
        ("r", r, (b, b), torch.float32),
        ("scales", scales, (g, n), torch.float32),
        ("zeros", zeros, (g, n), torch.float32),
        ("groups", groups, (b,), torch.int64),
        ("codes", codes, (b, n), torch.uint8),
        ("errors", errors, (b, n), torch.float32),
    )
    for name, tensor, shape, dtype in needs:
        # The stride of a dimension of one entry means nothing.
        loose = tensor is not r and tensor.ndim > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1
        if tensor.shape != shape or tensor.dtype != dtype or loose:
            strides = f" with strides {list(tensor.stride())}, the last not 1" if loose else ""
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}{strides}; needs {dtype} {list(shape)}")
        if tensor.device != w.device:
            raise ValueError(f"{name}: on {tensor.device}, but w is on {w.device}")
    if w.device.type == "cpu" and not interpreted(gptq_block_kernel):
        raise ValueError("w: on cpu; Triton kernels need a GPU, or TRITON_INTERPRET=1 set before they are imported")
