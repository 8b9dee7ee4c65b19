"""The search for the scales of a weight on a GPU, all its groups and spans in a single launch.

Eagerly it is some ten launches for each of 35 spans of each group. Nothing is imported for tensors on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.gpu import runs_triton
from llmq.grids.scales import MAX_SCALE, MIN_SCALE
from llmq.grids.uniform import SPANS, UniformGrid
from llmq.types import Affine, Grid


def runs_on(device: torch.device, grid: Grid) -> bool:
    """Return whether `search` can place groups: on a GPU that Triton compiles for, on equally spaced levels."""
    return isinstance(grid, UniformGrid) and runs_triton(device)


def search(grid: Grid, w: Tensor, weight: Tensor, group_size: int, norm: float) -> Affine:
    """Return the placement of all groups of `w`, each as ``grid.fit(columns, weight, norm=norm)`` would have it.

    Scales and zeros differ from those only where two spans are within rounding of each other: the order of sums is
    another, and powers other than squares are off by some 1e-6.

    Args:
        grid: one for which `runs_on` holds.
        w: weights [N, K], any float dtype.
        weight: importance of each column, [K].
        group_size: columns per group; the last may have fewer.
        norm: power of the error that `weight` weighs.

    Returns:
        Scales and zeros float32 [N, G].

    Raises:
        SolverError: a scale beyond what float16 holds.
    """
    from llmq_kernels.scale_search import Levels, Operands, scale_search

    assert isinstance(grid, UniformGrid), "runs_on says which grids the kernel knows"
    levels = Levels(grid.lowest, 2**grid.bits - 1, grid.symmetric, grid.steps, MIN_SCALE, MAX_SCALE)
    operands = Operands(w.float(), weight.float().contiguous(), torch.tensor(SPANS, device=w.device))
    scales, zeros = scale_search(operands, levels, group_size, norm)
    return Affine(grid.storable(scales), zeros)  # they are; those that are not raise
