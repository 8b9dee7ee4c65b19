"""Bit-split by its formulas, one row, one digit and one coordinate at a time, in float64."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor


def coordinate(a: Tensor, s: Tensor, q: Tensor, k: int) -> int:
    """Return the digit k that minimizes ``q A qᵀ - s qᵀ`` over -1, 0 and 1, all other digits [K] fixed."""
    r = -s[k] + 2 * sum(a[k, i] * q[i] for i in range(len(q)) if i != k)
    return -int(r.sign()) if abs(r) > a[k, k] else 0


def best_of_three(a: Tensor, s: Tensor, q: Tensor, k: int) -> int:
    """Return the same by trying them."""
    tried = {}
    for digit in (-1, 0, 1):
        q = q.clone()
        q[k] = digit
        tried[digit] = float(q @ a @ q - s @ q)
    return min(tried, key=tried.__getitem__)


def stored(scale: Tensor) -> Tensor:
    """Return a scale with eight significant bits."""
    return scale.float().bfloat16().double()


def solve_row(w: Tensor, h: Tensor, codes: Tensor, scales: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return whole numbers [K] and scales [G] after up to eight rounds from `codes` (their zero taken off)."""
    k = len(w)
    digits = torch.stack([codes.sign() * ((codes.abs().long() >> m) & 1) for m in range(bits - 1)]).double()
    scales = scales.clone()
    powers = torch.tensor([2.0**m for m in range(bits - 1)], dtype=torch.float64)
    of = torch.arange(k) // group_size
    for _ in range(8):
        before = (digits.clone(), scales.clone())
        for g in range(len(scales)):
            q = powers @ digits
            unit = torch.where(of == g, q, 0.0)
            rest = w - torch.where(of == g, 0.0, scales[of] * q)
            if unit.any():
                ideal = (rest @ h @ unit) / (unit @ h @ unit)
                if (stored(ideal) - ideal).abs() < (scales[g] - ideal).abs():
                    scales[g] = stored(ideal)
        for m in reversed(range(bits - 1)):
            part = scales[of] * powers[m]
            y = w - scales[of] * (powers @ digits - powers[m] * digits[m])
            a, s = part[:, None] * h * part, 2 * part * (h @ y)
            for j in range(k):
                digits[m, j] = coordinate(a, s, digits[m], j)
        if torch.equal(scales[of] * (powers @ digits), before[1][of] * (powers @ before[0])):
            break
    return powers @ digits, scales


def least_loss(w: Tensor, h: Tensor, bits: int) -> float:
    """Return the least ``(w - α q) H (w - α q)ᵀ`` over every α and all q of one group, by trying all q."""
    top = 2 ** (bits - 1) - 1
    q = torch.tensor(list(product(range(-top, top + 1), repeat=len(w))), dtype=torch.float64)
    q = q[q.any(1)]
    saved = (q @ h @ w).square() / ((q @ h) * q).sum(1)
    return float(w @ h @ w - saved.max())
