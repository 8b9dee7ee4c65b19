"""AWQ's search and its folding in float64, written out: every scale applied, every column looked up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def candidates(x_mean_abs: Tensor, owner: list[int]) -> list[Tensor]:
    """Return c of each input [K] for r = 0, .05, … .95; inputs with the same owner share the mean of their |x|."""
    found = []
    values = x_mean_abs.double().tolist()
    shared = []
    for mine in owner:
        group = [value for value, other in zip(values, owner, strict=True) if other == mine]
        shared.append(sum(group) / len(group))
    for step in range(20):
        powers = [value ** (0.05 * step) for value in shared]
        active = [power for power, value in zip(powers, shared, strict=True) if value > 0]
        middle = (max(active) * min(active)) ** 0.5 if active else 1.0
        found.append([max(p / middle, 1e-4) if v > 0 else 1.0 for p, v in zip(powers, shared, strict=True)])
    return [torch.tensor(c, dtype=torch.float64) for c in found]


def output_error(weights: list[Tensor], x: Tensor, c: Tensor, quantize: Callable[[Tensor], Tensor]) -> float:
    """Return 2/T Σ ‖(W - Q(W c) c⁻¹) x‖² over the tokens x [T, K]: the error of the outputs, token by token."""
    total = 0.0
    for w in weights:
        kept = quantize(w.double() * c) / c
        for token in x.double():
            total += float(((w.double() - kept) @ token).square().sum())
    return 2 * total / len(x)
