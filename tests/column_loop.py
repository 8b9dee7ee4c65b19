"""The column loop of GPTQ in one block, one PyTorch call after another: what the kernel of it is compared with."""

from __future__ import annotations

from torch import Tensor

from llmq.block_sweep import Block
from llmq.types import Affine, Grid


def eager_block(block: Block, scales: Tensor, zeros: Tensor, grid: Grid) -> None:
    """Do what `llmq.block_sweep.cuda_block` does, through the methods of the grid."""
    for j, group in enumerate(block.groups.tolist()):
        at = Affine(scales[group, :, None], zeros[group, :, None])
        target = block.w[j] + (block.y[j] + block.errors[:j].T @ block.r[:j, j]) / block.r[j, j]
        block.codes[j] = grid.encode(target[:, None], at)[:, 0]
        block.errors[j] = block.w[j] - grid.decode(block.codes[j, :, None], at)[:, 0]
