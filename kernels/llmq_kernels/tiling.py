"""The kernel for a medium number of tokens: tiles on tensor cores.

A program computes one tile of the *transposed* product, ``out.T[BLOCK_N, BLOCK_M] = w @ x.T``. With the
weights on the left, Triton feeds Hopper's wgmma from registers even for a batch tile of 16 (it wants 64
rows on the left), so the unpacked weights never travel back through shared memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from llmq_kernels import launch, splits
from llmq_kernels.layout import Layout, Weight
from llmq_kernels.tables import Tile

COMPUTE_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def constants(layout: Layout, row: Tile, dtype: torch.dtype, k: int, group_size: int) -> dict[str, Any]:
    """Return the compile-time arguments of the kernel: for the launcher and for the report on machine code."""
    interpreted = launch.interpreted(layout.tiled)
    compute = torch.float32 if interpreted and dtype == torch.bfloat16 else dtype
    return {
        "BLOCK_M": row.block_m,
        "BLOCK_N": row.block_n,
        "POST_SCALE": row.post_scale,
        # Triton's interpreter (3.6 to 3.9) silently computes on the bit patterns of bf16: upcast there.
        "COMPUTE": COMPUTE_DTYPES[compute],
        "ASM": compute.itemsize == 2 and not interpreted and torch.version.hip is None,
        **layout.constants(k, group_size),
    }


def matmul(x: Tensor, weight: Weight, bias: Tensor | None, row: Tile, count: int | None = None) -> Tensor:
    """Return ``x @ w.T + bias`` [M, N] for x [M, K], rows contiguous, and bias [N] or None.

    `count` sets over how many programs K is split; by default enough to fill the GPU.
    """
    (m, k), n, operands = x.shape, weight.n, weight.operands
    compiled = constants(weight.layout, row, x.dtype, k, weight.group_size)
    chunks = -(-k // compiled["CHUNK"])
    tiles_n, tiles_m = -(-n // row.block_n), -(-m // row.block_m)
    if count is None:
        count = splits.split_count(tiles_n * tiles_m, chunks, launch.processors(x.device))
    per_split, count = splits.divide(chunks, count)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    target = splits.target(out, count)
    with launch.on(x.device):
        weight.layout.tiled[(tiles_n, tiles_m, count)](
            x_ptr=x,
            w_ptr=operands.weight,
            s_ptr=operands.scales,
            z_ptr=operands.zeros,
            b_ptr=bias if count == 1 else None,
            o_ptr=target,
            M=m,
            N=n,
            K=k,
            chunks=chunks,
            chunks_per_split=per_split,
            stride_xm=x.stride(0),
            stride_wn=operands.weight.stride(0),
            stride_sg=operands.scales.stride(0),
            num_warps=row.num_warps,
            num_stages=row.num_stages,
            **launch.COMPILE_OPTIONS,
            **compiled,
        )
        if count > 1:
            splits.add(target, bias, out)
    return out
