"""Refit of the scales: with the codes fixed, the loss of a row is a quadratic in its group scales, solved exactly.

Let u_g be a row's ``codes - zero`` within group g and 0 elsewhere. The scales that minimize ``(w - Σ s_g u_g) H (…)ᵀ``
solve ``A s = b`` with A_gh = u_g H u_hᵀ and b_g = u_g H wᵀ. They are rounded to what the format stores, and a row takes
them only if its loss falls with the rounding included.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq.types import QuantizedWeight

_RIDGE = 1e-9  # of the mean diagonal of A, whose groups may be collinear
_GROWTH = 2.0
_LARGEST = 6.4e4  # below the largest float16


def refit(q: QuantizedWeight, w: Tensor, h: Tensor) -> QuantizedWeight:
    """Return `q` with the scales of each row refitted where that lowers the row's loss; codes and zeros stay.

    Scales may come out negative, which every format and kernel takes.

    Args:
        q: the weight on its grid, which must be linear in its scales.
        w: the weight itself, float32 [N, K].
        h: Hessian float32 [K, K], symmetric positive semidefinite.
    """
    k, size = w.shape[1], q.group_size
    units = q.codes.float() - q.zeros.repeat_interleave(size, dim=1)[:, :k]
    a, b = _normal_equations(units, w, h, size)
    diagonal = a.diagonal(dim1=1, dim2=2)
    idle = diagonal <= 0  # no code off zero, or no input ever active: nothing to learn, the scale stays
    mean = diagonal.mean(dim=1, keepdim=True)
    diagonal.copy_(torch.where(idle, 1.0, diagonal + _RIDGE * mean))
    solved, info = torch.linalg.solve_ex(a, torch.where(idle, q.scales.double(), b))
    scales = solved.float()
    # far beyond the scales that the codes were made for lies only what a nearly singular system dreamt up
    limit = (_GROWTH * q.scales.abs().amax(dim=1, keepdim=True)).clamp(max=_LARGEST)
    sane = scales.abs() <= limit  # also False for NaN
    usable = (info == 0) & sane.all(dim=1)
    scales = q.grid.storable(torch.where(usable[:, None], scales, q.scales))
    candidate = replace(q, scales=scales)
    better = row_loss(candidate, w, h) < row_loss(q, w, h)
    return replace(q, scales=torch.where(better[:, None], scales, q.scales))


def row_loss(q: QuantizedWeight, w: Tensor, h: Tensor) -> Tensor:
    """Return ``(w - q) H (w - q)ᵀ`` of each row, float32 [N]."""
    error = w - q.dequantize()
    return ((error @ h) * error).sum(dim=1)


def _normal_equations(units: Tensor, w: Tensor, h: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return A [N, G, G] and b [N, G] in float64."""
    n, k = units.shape
    groups = -(-k // size)
    a = torch.empty(n, groups, groups, dtype=torch.float64, device=w.device)
    b = torch.empty(n, groups, dtype=torch.float64, device=w.device)
    for g in range(groups):
        columns = slice(g * size, (g + 1) * size)
        product = units[:, columns] @ h[columns]  # u_g H, [N, K]
        b[:, g] = (product * w).sum(dim=1)
        a[:, g] = torch.stack([part.sum(dim=1) for part in (product * units).split(size, dim=1)], dim=1)
    return a, b
