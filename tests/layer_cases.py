"""Small linears, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmq.families import Linear

K = 64  # inputs of every linear


def linear(name: str, n: int, seed: int = 0) -> Linear:
    module = nn.Linear(K, n, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.randn(n, K, generator=torch.Generator().manual_seed(seed)))
    return Linear(name, module, transposed=False)


def tokens(count: int, seed: int = 0) -> Tensor:
    """Return correlated inputs [count, K]."""
    mix = torch.randn(K, K, generator=torch.Generator().manual_seed(99)) * K**-0.5 + torch.eye(K)
    return torch.randn(count, K, generator=torch.Generator().manual_seed(seed)) @ mix
