"""Optimal brain quantization (Frantar and Alistarh 2022) in float64 with an explicit inverse, and tiny optima."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from gptq_reference import Trace, _Groups, damped
from grid_reference import encode, steps_to_tie
from order_reference import WHOLE_GROUPS, visit
from torch import Tensor


def obq_fixed_order(
    w: Tensor, h: Tensor, bits: int, symmetric: bool, group_size: int, damp_percent: float, order: str
) -> Trace:
    """Return what OBQ does to `w` [N, K] when told the order: round one weight, correct the rest, down-date H⁻¹."""
    columns = visit(h, order, group_size)
    inverse = torch.linalg.inv(damped(h, damp_percent))
    original = w.double()
    work = original.clone()
    sweep = _Groups(original, bits, symmetric, group_size, static=order not in WHOLE_GROUPS)
    loss = torch.zeros(len(w), dtype=torch.float64)
    for at, q in enumerate(columns):
        group = columns[at : at + sweep.columns_of(q)]
        rounded = sweep.round(q, work[:, q].clone(), work[:, group], group)
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


class Greedy(NamedTuple):
    """What greedy OBQ does to a weight."""

    codes: Tensor  # [N, K] whole numbers
    gap: Tensor  # [N], least relative gap between the chosen weight's cost and the next best, or to a tie, in steps


def obq_rows(w: Tensor, h: Tensor, scales: Tensor, zeros: Tensor, bits: int, damp_percent: float) -> Greedy:
    """Return OBQ on given scales and zeros [N, K], row by row, with an inverse made anew for what is left.

    As the authors' code: while a live weight is off the grid by more than half a step, the worst such goes next.
    """
    full = damped(h, damp_percent)
    codes, gaps = torch.empty_like(w, dtype=torch.float64), torch.full((len(w),), float("inf"), dtype=torch.float64)
    for row in range(len(w)):
        work, left = w[row].double().clone(), list(range(w.shape[1]))
        scale, zero = scales[row].double(), zeros[row].double()
        while left:
            inverse = torch.linalg.inv(full[left][:, left])
            code = encode(work, scale, zero, bits)
            error = work - (code - zero) * scale
            off = [q for q in left if abs(error[q]) > abs(scale[q]) / 2 * (1 + 1e-9)]
            cost = {q: (error[q] ** 2 / inverse[at, at]).item() for at, q in enumerate(left)}
            ranked = sorted(((-(error[q] ** 2)).item(), q) for q in off) or sorted((cost[q], q) for q in left)
            q = ranked[0][1]
            gap = abs(ranked[1][0] / ranked[0][0] - 1) if len(ranked) > 1 and ranked[0][0] else 1.0
            tie = steps_to_tie(work, scale, zero, bits)[left].min().item()
            gaps[row] = min(gaps[row].item(), gap, tie)
            codes[row, q] = code[q]
            work[left] -= error[q] / inverse[left.index(q), left.index(q)] * inverse[left.index(q)]
            left.remove(q)
    return Greedy(codes, gaps)
