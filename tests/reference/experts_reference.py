"""Second moments of what one expert sees, token by token in float64."""

import torch
from torch import Tensor


def expert_hessian(inputs: Tensor, picked: Tensor, expert: int) -> tuple[Tensor, int]:
    """Return ``2 Σ x xᵀ`` over the tokens of `inputs` [T, K] that `picked` [T, k] sends to `expert`, and how many."""
    total, tokens = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64), 0
    for x, names in zip(inputs.double(), picked.tolist(), strict=True):
        if expert in names:
            total += 2 * torch.outer(x, x)
            tokens += 1
    return total, tokens


def shrunk(own: Tensor, tokens: int, every: Tensor, count: int, prior: float) -> Tensor:
    """Return the mean of an expert's moments `own`, shrunk towards that of `count` tokens with the weight `prior`.

    METHODS 8: ``(N H̄ + κ H̄_all) / (N + κ)``.
    """
    mean = own / tokens if tokens else torch.zeros_like(own)
    return (tokens * mean + prior * (every / count)) / (tokens + prior)
