"""Inputs whose Hessians are known, and what those are."""

from __future__ import annotations

import torch
from torch import Tensor

U = 2.0**-24  # unit roundoff of float32


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Return small whole numbers: sums of their products are exact in float32."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


def expected(x: Tensor) -> Tensor:
    """Return 2 X Xᵀ / T, float64, of the tokens `x` [T, K]."""
    return 2 * x.double().T @ x.double() / len(x)
