"""Alternating projection: scale and codes of each group in turns, on the error of the weights themselves.

`llmq.grids.alternating` has the arithmetic and the source. The error is that of the weights, or of the outputs as if
inputs were uncorrelated (the diagonal of H); `llmq.solvers.bitsplit` starts here and goes on with all of H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.alternating import alternate
from llmq.hessian import checked
from llmq.solvers.placing import floored, nearest, place_all, placer
from llmq.solvers.takes import check, scaled
from llmq.types import Grid, Solution


def admm(
    w: Tensor,
    h: Tensor,
    grid: Grid,
    group_size: int,
    *,
    scale_search: str = "hessian",
    search_norm: float = 2.0,
) -> Solution:
    """Return `w` rounded to nearest on scales of which none near by is better for these codes.

    Args:
        w: weights [N, K], any float dtype.
        h: Hessian float32 [K, K], of which only the diagonal counts.
        grid: what the columns of one group are rounded to; any with scales.
        group_size: columns per group; a short last group is legal.
        scale_search: where to start, see `llmq.solvers.placing.placer`. With ``hessian`` the error of column j weighs
            H_jj from there on, too; otherwise all columns weigh the same.
        search_norm: the power that ``mse`` sums.

    Raises:
        SolverError: `h` holds NaN or infinity, an option has no such value, or the grid has no scales.
    """
    check("admm", scaled(grid))
    w, energy = w.float(), floored(checked(h).diagonal().clamp(min=0))
    placements = place_all(placer(grid, scale_search, search_norm), w, energy, group_size)
    weight = energy if scale_search == "hessian" else torch.ones_like(energy)
    parts = zip(w.split(group_size, dim=1), weight.split(group_size), placements, strict=True)
    fitted = [alternate(grid, columns, own, at) for columns, own, at in parts]
    return Solution(nearest(grid, group_size, w, fitted), damp_percent=0.0)
