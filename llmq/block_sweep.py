"""One block of GPTQ's column loop on a GPU, in a single launch: a Triton kernel in place of ten launches per column.

Here, in `llmq.scale_search` and in `llmq.formats.bits` quantizing reaches for `llmq_kernels`, and only for tensors that
are on a GPU; without one, neither that package nor Triton is imported.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.gpu import runs_triton
from llmq.grids.uniform import UniformGrid
from llmq.types import Grid

MAX_COLUMNS = 128  # of one block: the sums of its columns stay in registers


class Block(NamedTuple):
    """Up to 128 columns of a sweep, in its order and K-major: B columns, N rows of the weight."""

    w: Tensor  # weights float32 [B, N]
    y: Tensor  # Σ E_i R_ij over the finished columns i before the block, float32 [B, N]
    r: Tensor  # diagonal block of the upper factor, float32 [B, B]
    groups: Tensor  # group of each column, int64 [B], on the same device
    codes: Tensor  # result, uint8 [B, N]
    errors: Tensor  # result, w minus its level, float32 [B, N]


def runs_on(device: torch.device, grid: Grid) -> bool:
    """Return whether `cuda_block` can round to `grid` on `device`: a GPU that Triton compiles for, levels in steps."""
    return isinstance(grid, UniformGrid) and runs_triton(device)


def cuda_block(block: Block, scales: Tensor, zeros: Tensor, grid: Grid) -> None:
    """Round the columns of `block` one after another, into its `codes` and `errors`, without waiting for the GPU.

    Column j is rounded at ``w_j + (y_j + Σ_{i<j} E_i R_ij) / R_jj`` with the scale and the zero of its group; see
    `llmq.solvers.gptq`. Codes differ from those of the same loop in PyTorch only where the order of a sum decides a
    tie.

    Args:
        block: slices of the sweep's tensors, every row contiguous.
        scales: float32 [G, N]; only rows that `block.groups` names are read.
        zeros: float32 [G, N].
        grid: one for which `runs_on` holds.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    from llmq_kernels.gptq_block import gptq_block

    assert isinstance(grid, UniformGrid), "runs_on says which grids the kernel knows"
    gptq_block(
        block.w,
        block.y,
        block.r,
        scales,
        zeros,
        block.groups,
        lowest=grid.lowest,
        highest=2**grid.bits - 1,
        codes=block.codes,
        errors=block.errors,
    )
