"""Packed weights of many experts times tokens that each go to a few of them, in one launch, in Triton.

Experts lie one behind the other, each as `w2a16`, `w4a16` or `w8a16` packs it, and an expert may have several matrices
of one size that read the same input (gate and up): their outputs are side by side. A *row* is one token at one of its
experts.

**Which tile is whose** is found by each program from `firsts`, where the rows of each expert begin once rows are sorted
by expert. The tiles of expert e are numbered from ``firsts[e] // BLOCK_M + e``. Whatever the counts are, that leaves as
many numbers as it needs before those of the next begin; so the grid is known without them, and nothing waits for the
GPU. Tiles without rows return at once. Where rows are no more than experts nothing is sorted: each is a tile of its
own.

Rows that pick no expert (a number from E up) get zeros.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels import launch, splits, tables, tiling
from llmq_kernels.layout import Layout, Packed, Weight, check_operands
from llmq_kernels.routing import Routes
from llmq_kernels.tables import Tile
from llmq_kernels.w2a16 import add_products_w2
from llmq_kernels.w4a16 import add_products_w4
from llmq_kernels.w8a16 import add_products_w8


@triton.jit
def rows_of_tile(r_ptr, f_ptr, i_t, rows, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, ALONE: tl.constexpr):
    """Return the expert of tile i_t, the numbers of its rows [BLOCK_M], and how many of them there are.

    r [rows]: if ALONE the expert of each row, else the numbers of the rows, sorted by expert; f [EXPERTS + 1]: where in
    it the rows of each begin, and last those without an expert, which have the number EXPERTS.
    """
    o_m = tl.arange(0, BLOCK_M)
    if ALONE:
        i_e = tl.load(r_ptr + i_t).to(tl.int32)
        b_row = tl.zeros((BLOCK_M,), tl.int32) + i_t
        count = 1
    else:
        ENTRIES: tl.constexpr = triton.next_power_of_2(EXPERTS + 1)
        o_e = tl.arange(0, ENTRIES)
        b_first = tl.load(f_ptr + o_e, mask=o_e <= EXPERTS, other=0).to(tl.int32)
        b_begun = (o_e <= EXPERTS) & (b_first // BLOCK_M + o_e <= i_t)
        i_e = tl.sum(b_begun.to(tl.int32)) - 1
        i_first = tl.load(f_ptr + i_e).to(tl.int32)
        i_first += (i_t - i_first // BLOCK_M - i_e) * BLOCK_M
        count = tl.load(f_ptr + i_e + 1, mask=i_e < EXPERTS, other=rows).to(tl.int32) - i_first
        b_row = tl.load(r_ptr + i_first + o_m, mask=o_m < count, other=0).to(tl.int32)
    return i_e, b_row, count


@triton.jit
def grouped_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    b_ptr,
    o_ptr,
    r_ptr,
    f_ptr,
    rows,
    N,
    K,
    chunks,
    chunks_per_split,
    stride_xm,
    stride_we,
    stride_wn,
    stride_se,
    stride_sg,
    BITS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    ALONE: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    POST_SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Store a tile of the products of x [rows / SLOTS, K] with the matrices of its rows' expert in o.

    Grid (N tiles, tiles of rows, splits * PARTS); o [splits, rows, PARTS, N]. w [E, PARTS, Np, …], s and z
    [E, PARTS, Gp, Np], each matrix as `pack` of the layout for BITS made it; b [E, PARTS, N]; z and b may be None; r
    and f as for `rows_of_tile`; the rest as for the kernel of the layout.
    """
    WORDS: tl.constexpr = CHUNK * BITS // 16
    i_part, i_k = tl.program_id(2) % PARTS, tl.program_id(2) // PARTS
    i_e, b_row, count = rows_of_tile(r_ptr, f_ptr, tl.program_id(1), rows, EXPERTS, BLOCK_M, ALONE)
    if count <= 0:
        return
    mask_m = (tl.arange(0, BLOCK_M) < count)[None, :]
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_first = i_k * chunks_per_split
    i_last = tl.minimum(i_first + chunks_per_split, chunks)
    biased = tl.where(i_k == 0, N, 0)
    if i_e >= EXPERTS:  # rows without an expert: zeros, of no chunks of the first
        i_e = 0
        i_last = i_first
        biased = 0
    i_matrix = (i_e * PARTS + i_part).to(tl.int64)
    p_w = w_ptr + i_matrix * stride_we + o_n.to(tl.int64)[:, None] * stride_wn
    p_w += (i_first * WORDS + tl.arange(0, WORDS))[None, :]
    p_x = x_ptr + (b_row // SLOTS).to(tl.int64)[None, :] * stride_xm
    p_x += (i_first * CHUNK + tl.arange(0, WORDS))[:, None]
    p_s = s_ptr + i_matrix * stride_se
    p_z = z_ptr
    if z_ptr is not None:
        p_z = z_ptr + i_matrix * stride_se
    b_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if BITS == 2:
        b_acc = add_products_w2(
            b_acc, p_w, p_x, p_s, p_z, o_n, mask_m, i_first, i_last, K, stride_sg,
            GROUP, CHUNK, EVEN_K, BLOCK_N, POST_SCALE, COMPUTE, ASM,
        )  # fmt: skip
    elif BITS == 4:
        b_acc = add_products_w4(
            b_acc, p_w, p_x, p_s, p_z, o_n, mask_m, i_first, i_last, K, stride_sg,
            GROUP, CHUNK, EVEN_K, BLOCK_N, POST_SCALE, COMPUTE, ASM,
        )  # fmt: skip
    else:
        b_acc = add_products_w8(
            b_acc, p_w, p_x, p_s, p_z, o_n, mask_m, i_first, i_last, K, stride_sg,
            GROUP, CHUNK, EVEN_K, BLOCK_N, POST_SCALE, COMPUTE, ASM,
        )  # fmt: skip
    if b_ptr is not None:
        b_acc += tl.load(b_ptr + i_matrix * N + o_n, mask=o_n < biased, other=0.0).to(tl.float32)[:, None]
    p_o = o_ptr + ((i_k.to(tl.int64) * rows + b_row.to(tl.int64)) * PARTS + i_part)[None, :] * N + o_n[:, None]
    tl.store(p_o, b_acc.to(o_ptr.dtype.element_ty), mask=mask_m & (o_n < N)[:, None])


@dataclass(frozen=True)
class Experts:
    """The packed matrices [n, k] of all experts, `parts` of each, that read the same input."""

    layout: Layout  # of `w2a16`, `w4a16` or `w8a16`
    operands: Packed  # [E * parts, …], each as `pack` made it
    parts: int
    n: int
    k: int
    group_size: int

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.operands.weight) // self.parts


def experts_of(layout: Layout, packed: Sequence[Tensor], parts: int, n: int, k: int, group_size: int) -> Experts:
    """Return the experts whose `packed` tensors, two or three, have one matrix behind the other."""
    return Experts(layout, Packed(*packed), parts, n, k, group_size)


def constants(experts: Experts, row: Tile, dtype: torch.dtype, slots: int, alone: bool) -> dict[str, Any]:
    """Return the compile-time arguments of the kernel: for the launcher and for the report on machine code."""
    return {
        "BITS": experts.layout.bits,
        "EXPERTS": experts.count,
        "PARTS": experts.parts,
        "SLOTS": slots,
        "ALONE": alone,
        **tiling.constants(experts.layout, row, dtype, experts.k, experts.group_size),
    }


def matmul(x: Tensor, experts: Experts, bias: Tensor | None, routes: Routes, *, count: int | None = None) -> Tensor:
    """Return the products of each row with the matrices of its expert, [R, parts * n] in the dtype of x.

    Args:
        x: [R / slots, K], the dtype that the experts were packed for; rows s, s + 1, … of one token are neighbours.
        experts: E of them.
        bias: [E * parts, n] or None.
        routes: of R rows.
        count: over how many programs K is split; by default enough to fill the GPU.

    Raises:
        ValueError: an argument does not fit.
    """
    rows, n, k, operands = len(routes.rows), experts.n, experts.k, experts.operands
    slots = _check(x, experts, bias, rows)
    if not rows:
        return x.new_empty((0, experts.parts * n))
    x = x if x.stride(1) == 1 else x.contiguous()
    alone = routes.firsts is None
    row = tables.for_device(experts.layout.name, x.device).tile(1 if alone else rows // experts.count, x.dtype)
    compiled = constants(experts, row, x.dtype, slots, alone)
    chunks = -(-k // compiled["CHUNK"])
    tiles_n = -(-n // row.block_n)
    tiles_m = rows if alone else rows // row.block_m + experts.count + 1
    if count is None:
        busy = rows if alone else min(rows, experts.count) + rows // row.block_m
        count = splits.split_count(tiles_n * experts.parts * busy, chunks, launch.processors(x.device))
    per_split, count = splits.divide(chunks, count)
    out = torch.empty((rows, experts.parts * n), dtype=x.dtype, device=x.device)
    target = splits.target(out, count)
    with launch.on(x.device):
        grouped_kernel[(tiles_n, tiles_m, count * experts.parts)](
            x_ptr=x,
            w_ptr=operands.weight,
            s_ptr=operands.scales,
            z_ptr=operands.zeros,
            b_ptr=bias,
            o_ptr=target,
            r_ptr=routes.rows,
            f_ptr=routes.rows if alone else routes.firsts,
            rows=rows,
            N=n,
            K=k,
            chunks=chunks,
            chunks_per_split=per_split,
            stride_xm=x.stride(0),
            stride_we=operands.weight.stride(0),
            stride_wn=operands.weight.stride(1),
            stride_se=operands.scales.stride(0),
            stride_sg=operands.scales.stride(1),
            num_warps=row.num_warps,
            num_stages=row.num_stages,
            **launch.COMPILE_OPTIONS,
            **compiled,
        )
        if count > 1:
            splits.add(target, None, out)
    return out


def _check(x: Tensor, experts: Experts, bias: Tensor | None, rows: int) -> int:
    """Return how many of `rows` rows there are for each row of x; ValueError: an argument does not fit."""
    operands, matrices = experts.operands, len(experts.operands.weight)
    if experts.parts < 1 or matrices < 1 or matrices % experts.parts:
        raise ValueError(f"weight: {matrices} matrices; needs some for each expert, {experts.parts} each")
    for name, tensor in (("scales", operands.scales), ("zeros", operands.zeros)):
        if tensor is not None and len(tensor) != matrices:
            raise ValueError(f"{name} {list(tensor.shape)}: needs those of {matrices} matrices")
    first = Packed(*(None if tensor is None else tensor[0] for tensor in operands))  # type: ignore[arg-type]
    check_operands(Weight(experts.layout, first, experts.n, experts.k, experts.group_size), x, None)
    if operands.zeros is not None and operands.zeros.stride() != operands.scales.stride():
        raise ValueError(
            f"zeros of strides {operands.zeros.stride()}: need those of scales, {operands.scales.stride()}"
        )
    if bias is not None and (bias.shape != (matrices, experts.n) or not bias.is_contiguous()):
        raise ValueError(f"bias {list(bias.shape)}: needs contiguous [{matrices}, {experts.n}]")
    slots = rows // max(1, len(x))
    if slots * len(x) != rows:
        raise ValueError(f"x {list(x.shape)}: {rows} rows are not as many for each token")
    return max(1, slots)
