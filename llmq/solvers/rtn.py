"""Round to nearest: every weight to the closest level of its group's grid. The baseline of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.types import Grid, QuantizedWeight, Solution


def rtn(w: Tensor, h: Tensor | None, grid: Grid, group_size: int) -> Solution:
    """Return `w` rounded to nearest, group by group.

    Args:
        w: weights [N, K], any float dtype.
        h: ignored; solvers share one signature.
        grid: what the columns of one group are rounded to.
        group_size: columns per group; a short last group is legal.
    """
    del h
    codes, placements = [], []
    for columns in w.float().split(group_size, dim=1):
        at = grid.fit(columns)
        codes.append(grid.encode(columns, at))
        placements.append(at)
    scales, zeros = (torch.cat(parts, dim=1) for parts in zip(*placements, strict=True))
    return Solution(QuantizedWeight(torch.cat(codes, dim=1), scales, zeros, grid, group_size), damp_percent=0.0)
