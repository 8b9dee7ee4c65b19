"""What a linear on its grid is, and the gradients of a loss by what is tuned, entry by entry in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def weight(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, change: Tensor) -> Tensor:
    """Return ``(code - zero) * scale * (1 + change)``, [N, K]; scales, zeros and change are [N, G]."""
    result = torch.zeros(codes.shape, dtype=torch.float64)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            g = k // group_size
            scale = scales[n, g].double() * (1 + change[n, g].double())
            result[n, k] = (codes[n, k].double() - zeros[n, g].double()) * scale
    return result


def gradients(
    slope: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, change: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients by the latents [N, K] and by the changes [N, G], given that by the weight, `slope` [N, K].

    Rounding counts as the identity (the straight-through estimator), so that a latent moves its weight by one scale.
    """
    latent = torch.zeros(codes.shape, dtype=torch.float64)
    by_change = torch.zeros(scales.shape, dtype=torch.float64)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            g = k // group_size
            scale = scales[n, g].double()
            latent[n, k] = slope[n, k].double() * scale * (1 + change[n, g].double())
            by_change[n, g] += slope[n, k].double() * (codes[n, k].double() - zeros[n, g].double()) * scale
    return latent, by_change
