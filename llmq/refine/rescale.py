"""Rescale: the grid of a group and its codes are chosen anew together, one group after another.

With all other groups fixed, G = (W - Q) H and H_gg the block of H of the group's columns, its values cost
``(t - q) H_gg (t - q)ᵀ`` with ``t = q + G_g H_gg⁻¹``. For a few placements near the present one, t is rounded as by
GPTQ within the group. The cheapest is taken if it lowers the loss, which changes by ``Δ H_gg Δᵀ - 2 Δ G_gᵀ``, Δ being
the change of the values. Then the scale is refitted to the codes in closed form: it moves by ``u G_gᵀ / (u H_gg uᵀ)``,
u being the codes minus their zero, if that, rounded to what the format stores, lowers the loss.

Descent changes one code at a time under a fixed grid, a refit the grid under fixed codes. Both stop where only both
together could improve; this pass goes on from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.descent import State, sweep
from llmq.types import Affine, Grid

# factor of the scale and move of the zero of each placement that is tried, the present one first
_TRIED = ((1.0, 0), (0.94, 0), (1.06, 0), (1.0, 1), (1.0, -1))
_STRETCH = 0.5  # largest change of a scale by a refit, of itself: beyond lies noise of inputs that hardly occur
_LARGEST = 6.4e4  # below the largest float16
_DAMP = 1e-4  # of the mean diagonal of H_gg, so that it has a factor; it only chooses candidates
_LEAF = 32  # columns that are rounded one by one before the next matrix product
_ENTRIES = 2**21  # of all candidates of one piece of rows; bounds the memory of wide groups


def rescale(state: State) -> State:
    """Return the complete `state` with the placements and codes of its groups improved, each row for itself.

    Zeros move on asymmetric grids only. A grid that learns its levels has no scale to move. Groups of which no input
    ever occurs stay.
    """
    if state.grid.learns:
        return state
    return sweep(state, [columns for columns, _ in state.groups()], _improve)


def _improve(work: State, changes: Tensor, columns: slice) -> None:
    """Improve one group."""
    group = columns.start // work.group_size
    diagonal = work.h.diagonal()[columns]
    order = diagonal.argsort(descending=True, stable=True) + columns.start
    h = work.h[order[:, None], order]
    damped = h.clone()
    damped.diagonal().add_(_DAMP * diagonal.mean())
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if info.item():
        return
    inverse = torch.cholesky_inverse(lower).flip(0, 1)
    step = max(1, _ENTRIES // (len(_TRIED) * len(order)))
    for start in range(0, work.values.shape[1], step):
        rows = slice(start, start + step)
        old, gradient = work.values[order, rows], work.gradient[order, rows]
        at = Affine(work.scales[group, rows], work.zeros[group, rows])
        target = old + inverse @ gradient
        # damped = R Rᵀ with R = lower, both of its axes reversed
        found, placed = _rounded(target, lower.flip(0, 1), work.grid, _placements(work.grid, at))
        values, at = _taken(old, found, gradient, h, at, placed)
        values, at = _refitted(values, gradient - h @ (values - old), h, work.grid, at)
        work.values[order, rows], work.scales[group, rows], work.zeros[group, rows] = values, at.scale, at.zero
        changes[order, rows] = values - old


def _placements(grid: Grid, at: Affine) -> Affine:
    """Return the placements to try for rows at `at` [N], [C, N]."""
    tried = [(factor, move) for factor, move in _TRIED if not (grid.symmetric and move)]
    scales = torch.stack([at.scale * factor for factor, _ in tried]).clamp(-_LARGEST, _LARGEST)
    zeros = torch.stack([at.zero + move for _, move in tried]).clamp(*grid.zeros)
    return Affine(grid.storable(scales), zeros)


def _rounded(target: Tensor, r: Tensor, grid: Grid, tried: Affine) -> tuple[Tensor, Affine]:
    """Return `target` [S, N] rounded by GPTQ under that of the placements `tried` [C, N] that errs least, and it."""
    size, n = target.shape
    candidates = len(tried.scale)
    at = Affine(tried.scale.reshape(-1), tried.zero.reshape(-1))
    aims = target.repeat(1, candidates)  # the targets, corrected for the errors before them
    goals, errors = target.repeat(1, candidates), torch.empty_like(aims)
    diagonal = r.diagonal()
    unit = r / diagonal
    for lo in range(0, size, _LEAF):
        hi = min(lo + _LEAF, size)
        for j in range(lo, hi):
            aims[j].addmv_(errors[lo:j].T, unit[lo:j, j])
            torch.sub(goals[j], grid.nearest(aims[j], at), out=errors[j])
        aims[hi:].addmm_(unit[lo:hi, hi:].T, errors[lo:hi])
    off = aims.sub(goals).add_(errors)  # aim minus level, of which each column costs R_jj² times its square
    best = (diagonal.square() @ off.square_()).view(candidates, n).argmin(dim=0)
    pick = best * n + torch.arange(n, device=best.device)
    chosen = Affine(at.scale[pick], at.zero[pick])
    return grid.nearest(aims[:, pick], chosen), chosen


def _taken(
    old: Tensor, found: Tensor, gradient: Tensor, h: Tensor, at: Affine, placed: Affine
) -> tuple[Tensor, Affine]:
    """Return `found` at `placed` for the rows whose loss that lowers, `old` at `at` for the others."""
    change = found - old
    better = (change * torch.addmm(gradient, h, change, alpha=1, beta=-2)).sum(dim=0, dtype=torch.float64) < 0
    scale, zero = torch.where(better, placed.scale, at.scale), torch.where(better, placed.zero, at.zero)
    return torch.where(better, found, old), Affine(scale, zero)


def _refitted(values: Tensor, gradient: Tensor, h: Tensor, grid: Grid, at: Affine) -> tuple[Tensor, Affine]:
    """Return `values` at `at` with the scale of each row refitted where that lowers its loss; `gradient` is theirs."""
    units = values / at.scale
    slope = (units * gradient).sum(dim=0, dtype=torch.float64)
    curvature = (units * (h @ units)).sum(dim=0, dtype=torch.float64)
    most = _STRETCH * at.scale.abs()
    ideal = torch.where(curvature > 0, slope / curvature, 0.0).clamp(-most, most)
    scale = grid.storable((at.scale + ideal).float().clamp(-_LARGEST, _LARGEST))
    step = (scale - at.scale).double()
    better = step * (step * curvature - 2 * slope) < 0
    scale = torch.where(better, scale, at.scale)
    return units * scale, at._replace(scale=scale)
