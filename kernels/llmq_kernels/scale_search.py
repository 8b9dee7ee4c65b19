"""The search for the scales of a uniform grid: every span of every group of a weight, in one launch.

A program takes a tile of rows of one group, keeps its weights in registers, finds their extremes, and then tries one
span after another: the placement that the span gives, the levels nearest to all weights, the sum of weighted errors. Of
equal sums the first span wins. Groups that are wider than a tile are read again for each span; their rows are few, so
that the cache has them.

Everything up to the errors rounds as in PyTorch on a CPU: divisions exactly, ties to the even code, and without
contraction (a difference of two products would round once less); so a placement is bit by bit that of
`UniformGrid.fit`. Sums run in another order: where two spans are within rounding of each other, either may win. Powers
other than squares are taken as 2 ** (norm * log2), a few 1e-6 beside those of PyTorch.

Letters: N rows of the weight, K columns, S columns per group, G groups, T spans.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.gptq_block import ROUNDER
from llmq_kernels.launch import interpreted, on

TILE = 4096  # weights of a program: 32 registers of each of its 128 threads
WIDEST = 1024  # columns of a tile; S above that goes through it in several
NUM_WARPS = 4
MOST_GROUPS = 65535  # the second dimension of a launch

# A contracted difference would round once where PyTorch rounds twice.
COMPILE_OPTIONS = {"enable_fp_fusion": False, "num_warps": NUM_WARPS}


@dataclass(frozen=True)
class Levels:
    """A uniform grid as the kernel needs it: ``w = (code - zero) * scale``, and how a span places it."""

    lowest: int  # first code in use
    highest: int  # last code
    symmetric: bool
    steps: float  # of the scale that make up the span; negative: a symmetric scale takes the sign of -extreme
    min_scale: float  # the least and largest magnitude of a scale that can be stored
    max_scale: float


class Operands(NamedTuple):
    """What is searched."""

    w: Tensor  # float32 [N, K], of any strides
    weight: Tensor  # importance of each column, float32 [K], not negative
    spans: Tensor  # float32 [T], tried in this order; that of [0] is the widest


@triton.jit
def finite(b_w):
    """Return weights with 0 in place of those that are no finite numbers."""
    return tl.where(tl.abs(b_w) < float("inf"), b_w, 0.0)


@triton.jit
def stored(b_s, MIN_SCALE: tl.constexpr):
    """Return scales rounded to eight significant bits, ties to even, none below the least but 1 in place of 0."""
    b_bits = b_s.to(tl.int32, bitcast=True)
    b_bits = (b_bits + (0x7FFF + ((b_bits >> 16) & 1))) & -65536
    b_round = b_bits.to(tl.float32, bitcast=True)
    b_floor = tl.where(b_s < 0, -MIN_SCALE, MIN_SCALE)
    b_round = tl.where(tl.abs(b_round) < MIN_SCALE, b_floor, b_round)
    return tl.where(b_s == 0, 1.0, b_round)


@triton.jit
def placement(b_lo, b_hi, SYMMETRIC: tl.constexpr, HIGHEST: tl.constexpr, STEPS: tl.constexpr, MIN_SCALE: tl.constexpr):
    """Return scales and zeros [BLOCK_N] of groups with these extremes."""
    if SYMMETRIC:
        b_extreme = tl.where(-b_lo >= b_hi, b_lo, b_hi)
        if STEPS > 0:
            b_extreme = tl.abs(b_extreme)
        b_s = stored(tl.div_rn(b_extreme, STEPS), MIN_SCALE)
        b_z = tl.full(b_s.shape, (HIGHEST + 1) * 0.5, tl.float32)
    else:
        b_lo = tl.minimum(b_lo, 0.0)
        b_s = stored(tl.div_rn(tl.maximum(b_hi, 0.0) - b_lo, STEPS), MIN_SCALE)
        b_z = (tl.div_rn(-b_lo, b_s) + ROUNDER) - ROUNDER
        b_z = tl.minimum(tl.maximum(b_z, 0.0), HIGHEST)
    return b_s, b_z


@triton.jit
def error_sums(b_w, b_v, b_s, b_z, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, NORM: tl.constexpr):
    """Return ``Σ v |w - ŵ| ** NORM`` of each row of w [BLOCK_N, BLOCK_S] at scales s and zeros z [BLOCK_N]."""
    b_z = b_z[:, None]
    b_steps = (tl.div_rn(b_w, tl.broadcast_to(b_s[:, None], b_w.shape)) + ROUNDER) - ROUNDER
    b_steps = tl.minimum(tl.maximum(b_steps + b_z, LOWEST), HIGHEST) - b_z
    b_e = b_steps * b_s[:, None] - b_w
    if NORM == 2.0:
        b_e = b_e * b_e
    else:
        b_e = tl.abs(b_e)
        b_e = tl.where(b_e > 0, tl.exp2(NORM * tl.log2(tl.where(b_e > 0, b_e, 1.0))), 0.0)
    return tl.sum(b_e * b_v[None, :], axis=1)


@triton.jit
def scale_search_kernel(
    w_ptr,
    v_ptr,
    t_ptr,
    s_ptr,
    z_ptr,
    N,
    K,
    S,
    G,
    T,
    stride_wn,
    stride_wk,
    SYMMETRIC: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    STEPS: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    MAX_SCALE: tl.constexpr,
    NORM: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Store scales s and zeros z [N, G] of BLOCK_N rows of one group; grid (N tiles, G).

    w [N, K], v [K], t [T], s, z [N, G] float32. ONE_TILE: S <= BLOCK_S. A scale is one above MAX_SCALE where a span
    asks for it, whatever is best, and NaN where a weight is not finite.
    """
    i_g = tl.program_id(1)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_s = tl.arange(0, BLOCK_S)
    first = i_g * S
    last = tl.minimum(first + S, K)
    mask_n = o_n < N
    p_n = w_ptr + o_n[:, None] * stride_wn
    o_k = first + o_s
    mask = mask_n[:, None] & (o_k < last)[None, :]
    # Zeros beside the group change no extreme: the span is one of 0 and the weights.
    b_w = tl.load(p_n + o_k.to(tl.int64)[None, :] * stride_wk, mask=mask, other=0.0)
    b_v = tl.load(v_ptr + o_k, mask=o_k < last, other=0.0)
    b_finite = finite(b_w)
    b_odd = tl.sum(tl.where(b_w == b_finite, 0, 1), axis=1)
    b_w = b_finite
    b_lo = tl.min(b_w, axis=1)
    b_hi = tl.max(b_w, axis=1)
    if not ONE_TILE:
        for start in range(first + BLOCK_S, last, BLOCK_S):
            o_k = start + o_s
            mask = mask_n[:, None] & (o_k < last)[None, :]
            b_w = tl.load(p_n + o_k.to(tl.int64)[None, :] * stride_wk, mask=mask, other=0.0)
            b_finite = finite(b_w)
            b_odd += tl.sum(tl.where(b_w == b_finite, 0, 1), axis=1)
            b_lo = tl.minimum(b_lo, tl.min(b_finite, axis=1))
            b_hi = tl.maximum(b_hi, tl.max(b_finite, axis=1))

    b_least = tl.full((BLOCK_N,), float("inf"), tl.float32)
    b_scale = tl.full((BLOCK_N,), float("nan"), tl.float32)
    b_zero = tl.zeros((BLOCK_N,), tl.float32)
    b_large = tl.zeros((BLOCK_N,), tl.float32)
    for i_t in range(T):
        b_t = tl.load(t_ptr + i_t)
        b_s, b_z = placement(b_lo * b_t, b_hi * b_t, SYMMETRIC, HIGHEST, STEPS, MIN_SCALE)
        b_large = tl.where(tl.abs(b_s) > MAX_SCALE, b_s, b_large)
        if ONE_TILE:
            b_sum = error_sums(b_w, b_v, b_s, b_z, LOWEST, HIGHEST, NORM)
        else:
            b_sum = tl.zeros((BLOCK_N,), tl.float32)
            for start in range(first, last, BLOCK_S):
                o_k = start + o_s
                mask = mask_n[:, None] & (o_k < last)[None, :]
                b_w = tl.load(p_n + o_k.to(tl.int64)[None, :] * stride_wk, mask=mask, other=0.0)
                b_v = tl.load(v_ptr + o_k, mask=o_k < last, other=0.0)
                b_sum += error_sums(finite(b_w), b_v, b_s, b_z, LOWEST, HIGHEST, NORM)
        b_better = (b_sum < b_least) | (i_t == 0)
        b_least = tl.where(b_better, b_sum, b_least)
        b_scale = tl.where(b_better, b_s, b_scale)
        b_zero = tl.where(b_better, b_z, b_zero)
    p_o = o_n * G + i_g
    b_scale = tl.where(b_large == 0, b_scale, b_large)
    tl.store(s_ptr + p_o, tl.where(b_odd == 0, b_scale, float("nan")), mask=mask_n)
    tl.store(z_ptr + p_o, b_zero, mask=mask_n)


def blocks(group_size: int) -> tuple[int, int]:
    """Return the rows and columns of a tile for groups of `group_size` columns."""
    columns = min(max(triton.next_power_of_2(group_size), 16), WIDEST)
    return TILE // columns, columns


def scale_search(found: Operands, levels: Levels, group_size: int, norm: float) -> tuple[Tensor, Tensor]:
    """Return the scales and zeros float32 [N, G] of the groups of `found`; see `naive.scale_search`.

    Nothing waits for the GPU. Columns of a group are neighbours; the last group may be short.

    Args:
        found: the weight, the importance of its columns, and the spans to try.
        levels: the grid.
        group_size: columns per group, S.
        norm: power of the error that is weighed.

    Returns:
        Scales and zeros. A scale is NaN where a weight of the group is not finite, and one above ``levels.max_scale``
        where any span asks for it: neither can be used.

    Raises:
        ValueError: an argument does not fit; the message says which.
    """
    _check(found, group_size)
    w, weight, spans = found
    n, k = w.shape
    groups = -(-k // group_size)
    block_n, _ = blocks(group_size)
    scales, zeros = torch.empty((2, n, groups), dtype=torch.float32, device=w.device)
    if not n:
        return scales, zeros
    with on(w.device):
        scale_search_kernel[(-(-n // block_n), groups)](
            w_ptr=w,
            v_ptr=weight,
            t_ptr=spans,
            s_ptr=scales,
            z_ptr=zeros,
            N=n,
            K=k,
            S=group_size,
            G=groups,
            T=len(spans),
            stride_wn=w.stride(0),
            stride_wk=w.stride(1),
            **constants(levels, group_size, norm),
            **COMPILE_OPTIONS,
        )
    return scales, zeros


def constants(levels: Levels, group_size: int, norm: float) -> dict[str, float | bool]:
    """Return the compile-time arguments of the kernel: for the launcher and for the report on machine code."""
    block_n, block_s = blocks(group_size)
    return {
        "SYMMETRIC": levels.symmetric,
        "LOWEST": float(levels.lowest),
        "HIGHEST": float(levels.highest),
        "STEPS": float(levels.steps),
        "MIN_SCALE": levels.min_scale,
        "MAX_SCALE": levels.max_scale,
        "NORM": float(norm),
        "ONE_TILE": group_size <= block_s,
        "BLOCK_N": block_n,
        "BLOCK_S": block_s,
    }


def _check(found: Operands, group_size: int) -> None:
    """Raise ValueError unless the kernel may assume its shapes, dtypes and devices."""
    w = found.w
    if w.ndim != 2 or w.dtype != torch.float32:
        raise ValueError(f"w: {w.dtype} {list(w.shape)}; needs float32 [N, K]")
    if not 1 <= group_size <= w.shape[1]:
        raise ValueError(f"group_size {group_size}: needs 1 to K = {w.shape[1]}")
    if -(-w.shape[1] // group_size) > MOST_GROUPS:
        raise ValueError(f"group_size {group_size}: K = {w.shape[1]} has more than {MOST_GROUPS} groups of it")
    for name, tensor, length in (
        ("weight", found.weight, w.shape[1]),
        ("spans", found.spans, max(1, len(found.spans))),
    ):
        if tensor.shape != (length,) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}; needs contiguous float32 [{length}]")
        if tensor.device != w.device:
            raise ValueError(f"{name}: on {tensor.device}, but w is on {w.device}")
    if w.device.type == "cpu" and not interpreted(scale_search_kernel):
        raise ValueError("w: on cpu; Triton kernels need a GPU, or TRITON_INTERPRET=1 set before they are imported")
