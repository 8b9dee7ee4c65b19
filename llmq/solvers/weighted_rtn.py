"""Round to nearest on scales that know the inputs: each group's span is clipped where that costs the outputs least.

The cheapest use of calibration data: only the diagonal of the Hessian is looked at, nothing is factorized.
"""

from __future__ import annotations

from torch import Tensor

from llmq.hessian import checked
from llmq.solvers.placing import floored, nearest, place_all, placer
from llmq.types import Grid, Solution


def weighted_rtn(
    w: Tensor,
    h: Tensor,
    grid: Grid,
    group_size: int,
    *,
    scale_search: str = "hessian",
    search_norm: float = 2.0,
) -> Solution:
    """Return `w` rounded to nearest, on scales that minimize ``Σ_j H_jj e_j²`` of each row and group.

    Args:
        w: weights [N, K], any float dtype.
        h: Hessian float32 [K, K], of which only the diagonal counts.
        grid: what the columns of one group are rounded to.
        group_size: columns per group; a short last group is legal.
        scale_search: see `llmq.solvers.placing.placer`; the energy of column j is H_jj.
        search_norm: the power that ``mse`` sums.

    Raises:
        SolverError: `h` holds NaN or infinity, or an option has no such value.
    """
    w, energy = w.float(), floored(checked(h).diagonal().clamp(min=0))
    placements = place_all(placer(grid, scale_search, search_norm), w, energy, group_size)
    return Solution(nearest(grid, group_size, w, placements), damp_percent=0.0)
