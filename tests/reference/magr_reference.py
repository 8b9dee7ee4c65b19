"""MagR in float64, one group of one row at a time; the proximal step by bisection."""

from __future__ import annotations

import torch
from torch import Tensor


def prox(v: Tensor, radius: float) -> Tensor:
    """Return argmin ½‖u - v‖² + radius·max|u| for a vector: its entries clipped so that `radius` is cut off in all."""
    low, high = 0.0, float(v.abs().max())
    if float(v.abs().sum()) <= radius:
        return torch.zeros_like(v)
    for _ in range(200):
        middle = (low + high) / 2
        cut = float((v.abs() - middle).clamp(min=0).sum())
        low, high = (middle, high) if cut > radius else (low, middle)
    return v.clamp(-high, high)


def objective(w: Tensor, start: Tensor, h: Tensor, penalty: Tensor, group_size: int) -> Tensor:
    """Return ½ (w - w₀) H (w - w₀)ᵀ + λ Σ_g max|w_g| of each row, float64 [N]; `penalty` is λ [N]."""
    rows = []
    for row, first, weight in zip(w.double(), start.double(), penalty.double(), strict=True):
        e = row - first
        largest = sum(part.abs().max() for part in row.split(group_size))
        rows.append(0.5 * e @ h.double() @ e + weight * largest)
    return torch.stack(rows)


def descend(w: Tensor, h: Tensor, penalty: Tensor, group_size: int, lipschitz: float, steps: int) -> Tensor:
    """Return `w` [N, K] after so many proximal gradient steps of length 1 / `lipschitz`."""
    start, w, h = w.double(), w.double().clone(), h.double()
    for _ in range(steps):
        for i in range(len(w)):
            v = w[i] - h @ (w[i] - start[i]) / lipschitz
            w[i] = torch.cat([prox(part, float(penalty[i]) / lipschitz) for part in v.split(group_size)])
    return w
