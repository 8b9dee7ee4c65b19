"""Scale and codes of a group in turns, each the best for the other: ``min over s, u of Σ_j ω_j (w_j - s u_j)²``.

With the scale fixed, the level nearest to each weight is best; with the levels u fixed (in units of the scale), the
best scale is ``s = Σ ω w u / Σ ω u²``. Neither step can raise the error, so there is an end (the projection step of
Leng et al. 2018, "Extremely Low Bit Neural Network: Squeeze the Last Bit Out with ADMM", arXiv 1707.09870). It is a
local one: where it starts decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.types import Affine, Grid

_ROUNDS = 50  # at most; groups of 128 normal weights take about ten
_LARGEST = 6.4e4  # below the largest float16


def alternate(grid: Grid, w: Tensor, weight: Tensor, at: Affine) -> Affine:
    """Return `at` with the scale moved until it and the nearest levels are each the best for the other.

    Zeros, which pick tables or shift codes, stay. The error of a row falls or stays in every step, and the scale is one
    that files hold all the way.

    Args:
        grid: of levels that a scale multiplies, hence none that learns them.
        w: columns of one group, float32 [N, S].
        weight: ω, importance of each column, [S], not negative.
        at: placement to start from, [N, 1] each.
    """
    for _ in range(_ROUNDS):
        before = at.scale
        at = at._replace(scale=_best_scale(grid, w, weight, at))
        if torch.equal(at.scale, before):
            break
    return at


def _best_scale(grid: Grid, w: Tensor, weight: Tensor, at: Affine) -> Tensor:
    """Return the best scale [N, 1] for the levels that are nearest under `at`."""
    units = grid.nearest(w, at) / at.scale
    weighed = units * weight
    slope = (weighed * (w - units * at.scale)).sum(dim=1, keepdim=True, dtype=torch.float64)
    curvature = (weighed * units).sum(dim=1, keepdim=True, dtype=torch.float64)
    return least_squares(grid, at.scale, slope, curvature)


def least_squares(grid: Grid, scale: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    """Return the storable scale nearest to the lowest point of a parabola, or `scale` where that is as near.

    Args:
        grid: says what is storable.
        scale: where the parabola was measured, float32 of any shape.
        slope: how fast the loss falls there, halved, float64: the lowest point is ``scale + slope / curvature``.
        curvature: halved too; where it is not positive, the scale stays.
    """
    ideal = torch.where(curvature > 0, scale + slope / curvature, scale.double()).clamp(-_LARGEST, _LARGEST)
    found = grid.storable(ideal.float())
    return torch.where((found - ideal).abs() < (scale - ideal).abs(), found, scale)
