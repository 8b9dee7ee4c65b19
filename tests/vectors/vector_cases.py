"""Random weights on codebooks, for tests of what stores and runs them."""

from __future__ import annotations

import torch

from llmq.grids.vq import VectorGrid, VectorWeight
from llmq.types import QuantSpec


def spec_of(grid: VectorGrid, group_size: int = -1) -> QuantSpec:
    return QuantSpec(grid.bits, group_size, True, "llmq", torch.float16, grid.name)


def packed_weight(grid: VectorGrid, n: int, k: int, group_size: int = -1, seed: int = 0) -> VectorWeight:
    """Return a weight that uses any code and any entry; its scales are exact in float16 and bfloat16."""
    draw = torch.Generator().manual_seed(seed)
    size = k if group_size == -1 else group_size
    codes = torch.randint(0, grid.entries, (n, grid.codes_in(k)), generator=draw).to(torch.uint8)
    scales = (torch.rand(n, -(-k // size), generator=draw) * 1e-3 + 1e-3).bfloat16().float()
    book = torch.randint(-127, 128, (grid.entries, grid.columns), generator=draw).float()
    return VectorWeight(codes, scales, torch.zeros_like(scales), grid, size, codebook=book, in_features=k)


ALL = [VectorGrid(bits, d) for d in (2, 4, 8) for bits in range(1, 8 // d + 1)]
