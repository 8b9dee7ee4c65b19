"""Optimal brain quantization (Frantar and Alistarh 2022) in float64 with an explicit inverse, and tiny optima."""

from __future__ import annotations

from itertools import product

import torch
from gptq_reference import Trace, _Groups, damped, falling_energy
from torch import Tensor


def obq_fixed_order(
    w: Tensor, h: Tensor, bits: int, symmetric: bool, group_size: int, damp_percent: float, act_order: bool
) -> Trace:
    """Return what OBQ does to `w` [N, K] when told the order: round one weight, correct the rest, down-date H⁻¹."""
    order = falling_energy(h) if act_order else list(range(len(h)))
    inverse = torch.linalg.inv(damped(h, damp_percent))
    original = w.double()
    work = original.clone()
    sweep = _Groups(original, bits, symmetric, group_size, static=act_order)
    loss = torch.zeros(len(w), dtype=torch.float64)
    for q in order:
        rounded = sweep.round(q, work[:, q].clone(), work[:, q : q + group_size])
        error = work[:, q] - rounded
        loss += error**2 / inverse[q, q]
        work -= (error / inverse[q, q])[:, None] * inverse[q]
        inverse = down_date(inverse, q)
    return sweep.trace(loss)


def obq_greedy(w: Tensor, h: Tensor, levels: Tensor) -> Tensor:
    """Return the row `w` [K] on `levels` [L], always rounding the weight that costs least next."""
    inverse, work = torch.linalg.inv(h.double()), w.double().clone()
    result, left = torch.empty_like(work), set(range(len(w)))
    while left:
        nearest = {q: levels[(levels - work[q]).abs().argmin()] for q in left}
        q = min(left, key=lambda q: ((nearest[q] - work[q]) ** 2 / inverse[q, q]).item())
        result[q] = nearest[q]
        work -= (work[q] - nearest[q]) / inverse[q, q] * inverse[q]
        inverse = down_date(inverse, q)
        left.remove(q)
    return result


def down_date(inverse: Tensor, q: int) -> Tensor:
    """Return the inverse of H without row and column `q`, which become zero; `q` may come only once."""
    smaller = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    smaller[q], smaller[:, q] = 0.0, 0.0
    return smaller


def optimum(w: Tensor, h: Tensor, levels: Tensor) -> tuple[Tensor, float]:
    """Return the best of all roundings of the row `w` [K] to `levels` [L], and its loss e H eᵀ."""
    choices = torch.tensor(list(product(levels.tolist(), repeat=len(w))), dtype=torch.float64)
    errors = w.double() - choices
    losses = ((errors @ h.double()) * errors).sum(1)
    best = int(losses.argmin())
    return choices[best], losses[best].item()
