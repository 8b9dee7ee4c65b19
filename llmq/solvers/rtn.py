"""Round to nearest: every weight to the closest level of its group's grid. The baseline of all others."""

from __future__ import annotations

from torch import Tensor

from llmq.solvers.placing import nearest
from llmq.types import Grid, Solution


def rtn(w: Tensor, h: Tensor | None, grid: Grid, group_size: int) -> Solution:
    """Return `w` rounded to nearest, group by group.

    Args:
        w: weights [N, K], any float dtype.
        h: ignored; solvers share one signature.
        grid: what the columns of one group are rounded to.
        group_size: columns per group; a short last group is legal.
    """
    del h
    w = w.float()
    placements = [grid.fit(columns) for columns in w.split(group_size, dim=1)]
    return Solution(nearest(grid, group_size, w, placements), damp_percent=0.0)
