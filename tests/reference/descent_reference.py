"""Coordinate descent on the codes in float64: the whole gradient anew for every column, every level tried."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

U = 2.0**-24


class Pass(NamedTuple):
    """The codes after one pass, and which rows a float32 pass must agree with."""

    codes: Tensor  # [N, K] whole numbers, float64
    clear: Tensor  # bool [N]: no target was so near to a tie that float32 may see it on the other side


def gradient_error(values: Tensor, error: Tensor, changes: Tensor, h: Tensor) -> Tensor:
    """Return how far, [N, K], a float32 gradient may be off in ``(W - Q) H``, with the rounding of the target in it.

    The gradient is a sum of at most 2K products, K with the errors at the start and K with the changes since, in any
    order: 2K·u·Σ_i |H_ij| (|e_i| + |Δ_i|). Levels and changes are whole numbers below 2^8 times scales of eight bits,
    hence exact; w - q rounds once; the quotient by H_jj, the sum with the old value and the two distances that are
    compared round once or twice each, relatively to the gradient and to H_jj |q_j|: eight more.
    """
    k = h.shape[0]
    h = h.double().abs()
    reach = (error.double().abs() + changes.double().abs()) @ h
    return U * ((2 * k + 8) * reach + 8 * h.diagonal() * values.double().abs())


def one_pass(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bits: int, w: Tensor, h: Tensor) -> Pass:
    """Return what one pass makes of `codes` [N, K] under `scales` and `zeros` [N, G]."""
    w, h = w.double(), h.double()
    n, k = w.shape
    codes = codes.double().clone()
    of = [j // group_size for j in range(k)]
    scale, zero = scales.double()[:, of], zeros.double()[:, of]
    every = torch.arange(2**bits, dtype=torch.float64)
    start = (codes - zero) * scale
    values = start.clone()
    clear = torch.ones(n, dtype=torch.bool)
    for j in range(k):
        if h[j, j] == 0:
            continue
        gradient = (w - values) @ h
        target = values[:, j] + gradient[:, j] / h[j, j]
        distances = ((every[None] - zero[:, j, None]) * scale[:, j, None] - target[:, None]).abs()
        nearest = distances.argmin(1)
        two = distances.topk(2, dim=1, largest=False).values
        off = gradient_error(values, w - start, values - start, h)[:, j] / h[j, j]
        clear &= (two[:, 1] - two[:, 0]) / 2 > off
        codes[:, j] = nearest.double()
        values[:, j] = (codes[:, j] - zero[:, j]) * scale[:, j]
    return Pass(codes, clear)
