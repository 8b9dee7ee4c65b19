"""K split over several programs, where there are too few tiles of outputs to fill the GPU.

The float32 partial sums are added by a second kernel: deterministic, unlike atomics, and without a buffer to be
zeroed first.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels import launch

BLOCK = 1024


def split_count(tiles: int, chunks: int, processors: int, per_processor: int = 2) -> int:
    """Return over how many programs to split the `chunks` of K, for `tiles` output tiles on `processors` SMs.

    Several programs per SM hide each other's latency. Each keeps at least four chunks, or the pipeline never
    fills; above 8 splits the partial sums (8 bytes per output and split) cost as much as they gain.
    """
    wanted = -(-per_processor * processors // tiles)
    return max(1, min(wanted, chunks // 4, 8))


def divide(chunks: int, splits: int) -> tuple[int, int]:
    """Return the chunks per split, and how many splits of that size have any."""
    per_split = -(-chunks // splits)
    return per_split, -(-chunks // per_split)


def target(out: Tensor, splits: int) -> Tensor:
    """Return where the programs store: `out` [M, N] itself, or partial sums float32 [splits, M, N]."""
    return out if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)


def add(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Store the sum of `parts` float32 [splits, M, N] and `bias` [N] in `out` [M, N]."""
    splits, m, n = parts.shape
    add_splits_kernel[(-(-m * n // BLOCK),)](
        p_ptr=parts, b_ptr=bias, o_ptr=out, total=m * n, N=n, SPLITS=splits, BLOCK=BLOCK, **launch.COMPILE_OPTIONS
    )


@triton.jit
def add_splits_kernel(p_ptr, b_ptr, o_ptr, total, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the partial sums p [SPLITS, M, N] float32 and the bias b [N]; store o [M, N]; total = M * N."""
    o_i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_i < total
    b_acc = tl.zeros((BLOCK,), tl.float32)
    p_p = p_ptr + o_i
    for _ in tl.static_range(SPLITS):
        b_acc += tl.load(p_p, mask=mask, other=0.0)
        p_p += total
    if b_ptr is not None:
        b_acc += tl.load(b_ptr + o_i % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(o_ptr + o_i, b_acc.to(o_ptr.dtype.element_ty), mask=mask)
