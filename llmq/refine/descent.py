"""Coordinate descent on the codes: each column is set to the best level given all others, one pass over the columns.

With G = (W - Q) H, the loss as a function of column j alone is a parabola with its lowest point at
``t = q_j + G_j / H_jj``; the level nearest to t is its exact minimizer on the grid (Behdin et al. 2023, QuantEase,
arXiv 2309.01885, without its relaxation). A code changes only where that strictly helps, so the loss of every row falls
or stays, and repeated passes end. Nothing is inverted: any H with a positive diagonal will do.

The columns are visited by halving the range, as in `llmq.solvers.gptq`: what the left half changed reaches the right
half in one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmq.types import Affine, Grid, QuantizedWeight

_LEAF = 32  # columns that are updated one by one before the next matrix product


@dataclass(frozen=True)
class _Pass:
    """One pass over the columns; all tensors K-major."""

    grid: Grid
    h: Tensor  # [K, K]
    gradient: Tensor  # ((W - Q) H)ᵀ at the start of the pass, brought up to date from the left, [K, N]
    values: Tensor  # Qᵀ [K, N]
    codes: Tensor  # uint8 [K, N]
    changes: Tensor  # new minus old values of the finished columns, [K, N]
    placements: list[Affine]  # per group
    group_size: int


def descent(q: QuantizedWeight, w: Tensor, h: Tensor) -> QuantizedWeight:
    """Return `q` after one pass of coordinate descent over its codes; scales and zeros stay.

    Args:
        q: the weight on its grid.
        w: the weight itself, float32 [N, K].
        h: Hessian float32 [K, K], symmetric positive semidefinite; columns with H_jj = 0 keep their codes.
    """
    values = q.dequantize().T.contiguous()
    sweep = _Pass(
        q.grid,
        h,
        h @ (w.T - values),
        values,
        q.codes.T.clone(memory_format=torch.contiguous_format),  # never the caller's memory
        torch.zeros_like(values),
        [Affine(s[:, None], z[:, None]) for s, z in zip(q.scales.T, q.zeros.T, strict=True)],
        q.group_size,
    )
    _visit(sweep, 0, w.shape[1])
    return replace(q, codes=sweep.codes.T.contiguous())


def _visit(sweep: _Pass, lo: int, hi: int) -> None:
    """Improve columns [lo, hi); the gradient already knows what changed before `lo`."""
    if hi - lo <= _LEAF:
        _leaf(sweep, lo, hi)
        return
    middle = lo + (hi - lo) // 2
    _visit(sweep, lo, middle)
    sweep.gradient[middle:hi].addmm_(sweep.h[middle:hi, lo:middle], sweep.changes[lo:middle], alpha=-1)
    _visit(sweep, middle, hi)


def _leaf(sweep: _Pass, lo: int, hi: int) -> None:
    """Improve columns [lo, hi) one by one."""
    diagonal = sweep.h.diagonal()[lo:hi].tolist()
    for j in range(lo, hi):
        if diagonal[j - lo] <= 0:
            continue
        at = sweep.placements[j // sweep.group_size]
        old = sweep.values[j]
        gradient = torch.addmv(sweep.gradient[j], sweep.changes[lo:j].T, sweep.h[j, lo:j], alpha=-1)
        target = torch.add(old, gradient, alpha=1.0 / diagonal[j - lo])
        codes = sweep.grid.encode(target[:, None], at)
        new = sweep.grid.decode(codes, at)[:, 0]
        better = (new - target).abs() < (old - target).abs()
        sweep.codes[j] = torch.where(better, codes[:, 0], sweep.codes[j])
        sweep.changes[j] = torch.where(better, new - old, 0.0)
