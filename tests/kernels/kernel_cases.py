"""Random quantized weights for the kernel tests, and where those tests run."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] on its grid, as `llmq_kernels.naive` takes it, with a bias."""

    codes: Tensor  # uint8 [N, K]
    scales: Tensor  # float32 [N, G], exact in fp16 and in bf16, of both signs
    zeros: Tensor  # float32 [N, G]
    stored_zeros: Tensor | None  # None if all are the middle code
    bias: Tensor  # float32 [N], exact in fp16 and in bf16
    group_size: int


def random_weight(n: int, k: int, group_size: int, bits: int, symmetric: bool, seed: int = 0) -> Weight:
    """Return a weight that uses every code, and zeros from 0 to one past the last code."""
    draw = torch.Generator().manual_seed(seed)
    groups = (n, k // group_size)
    codes = torch.randint(0, 2**bits, (n, k), generator=draw).to(torch.uint8)
    scales = (torch.rand(groups, generator=draw) + 0.5) * 2.0**-6
    scales = (scales * torch.where(torch.rand(groups, generator=draw) < 0.5, -1, 1)).bfloat16().float()
    zeros = torch.randint(0, 2**bits + 1, groups, generator=draw).float()
    if symmetric:
        zeros = torch.full(groups, 2.0 ** (bits - 1))
    bias = torch.randn(n, generator=draw).bfloat16().float()
    tensors = (t.to(DEVICE) for t in (codes, scales, zeros, bias))
    codes, scales, zeros, bias = tensors
    return Weight(codes, scales, zeros, None if symmetric else zeros, bias, group_size)


def random_x(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Return activations [m, k] of both signs."""
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
