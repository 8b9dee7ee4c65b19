"""One pass of rescaling in float64: the whole gradient anew for every group, each rounding from its definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from descent_reference import U
from grid_reference import eight_bits, encode, steps_to_tie
from torch import Tensor

TRIED = ((1.0, 0), (0.94, 0), (1.06, 0), (1.0, 1), (1.0, -1))
DAMP = 1e-4


class Rescaled(NamedTuple):
    """A weight after the pass, and which rows a float32 pass must agree with."""

    codes: Tensor  # [N, K] whole numbers, float64
    scales: Tensor  # [N, G] float64
    zeros: Tensor  # [N, G] float64
    clear: Tensor  # bool [N]: no decision was so near to a tie that float32 may decide otherwise


def one_pass(
    codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bits: int, symmetric: bool, w: Tensor, h: Tensor
) -> Rescaled:
    """Return what one pass makes of `codes` [N, K] under `scales` and `zeros` [N, G]; H_gg must be definite."""
    w, h = w.double(), h.double()
    codes, scales, zeros = (t.double().clone() for t in (codes, scales, zeros))
    n, k = w.shape
    of = torch.arange(k) // group_size
    clear = torch.ones(n, dtype=torch.bool)
    for g in range(scales.shape[1]):
        columns = (of == g).nonzero()[:, 0]
        here = _Block(h[columns][:, columns])
        for row in range(n):
            gradient = ((w[row] - (codes[row] - zeros[row, of]) * scales[row, of]) @ h)[columns]
            old = (codes[row, columns] - zeros[row, g]) * scales[row, g]
            new = _one_group(old, gradient, here, scales[row, g], zeros[row, g], bits, symmetric)
            codes[row, columns], scales[row, g], zeros[row, g] = new.codes, new.scales, new.zeros
            clear[row] &= new.clear
    return Rescaled(codes, scales, zeros, clear)


class _Block:
    """What all rows share of one group."""

    def __init__(self, h: Tensor) -> None:
        self.h = h
        self.damped = h + DAMP * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
        spread = torch.linalg.eigvalsh(self.damped)
        self.condition = (spread[-1] / spread[0]).item()
        self.order = torch.argsort(h.diagonal(), descending=True, stable=True).tolist()
        # e_j = follow[i] · e[order[:i]] costs least, if j = order[i] and those behind it are free
        self.follow = []
        for i in range(len(h)):
            done, free = self.order[:i], self.order[i:]
            self.follow.append(-torch.linalg.solve(self.damped[free][:, free], self.damped[free][:, done])[0])


def _one_group(
    q: Tensor, gradient: Tensor, block: _Block, scale: Tensor, zero: Tensor, bits: int, sym: bool
) -> Rescaled:
    """Return one group of one row after its visit."""
    top, h, damped = 2**bits - 1, block.h, block.damped
    t = q + torch.linalg.solve(damped, gradient)
    # a float32 solution errs by some u times the condition number; 2K of them are summed, mostly cancelling
    slack = 4 * U * block.condition * (2 * len(h)) ** 0.5 * (t.abs().max() + (t - q).abs().max())
    clear = torch.tensor(True)
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    costs = []
    for factor, move in TRIED:
        if sym and move:
            continue
        s, far = eight_bits(scale * torch.tensor(factor).double())
        z = (zero + move).clamp(0, top)
        clear &= far > 2 * U
        codes, off = _gptq(t, block, s, z, bits)
        e = t - (codes - z) * s
        costs.append((e @ damped @ e).item())
        if best is None or costs[-1] < best[0]:
            best = torch.tensor(costs[-1]), codes, s, z
        clear &= off > slack / s.abs()
    assert best is not None
    _, codes, s, z = best
    two = sorted(set(costs))[:2]
    clear &= len(two) < 2 or two[1] - two[0] > 1e-4 * two[1]
    change = (codes - z) * s - q
    gain = 2 * change @ gradient - change @ h @ change
    clear &= bool((change == 0).all() or gain.abs() > 1e-5 * (change.abs() @ gradient.abs() + change @ h @ change))
    if gain <= 0:
        codes, s, z = q / scale + zero, scale, zero
    u = codes - z
    slope, bend = u @ (gradient - ((u * s) - q) @ h), u @ h @ u
    if bend > 0:
        d = (slope / bend).clamp(-s.abs() / 2, s.abs() / 2)
        refitted, far = eight_bits(s + d)
        clear &= far > 1e-4
        d = refitted - s
        gain = 2 * d * slope - d * d * bend
        clear &= bool(d == 0 or gain.abs() > 1e-3 * d * d * bend)
        s = refitted if gain > 0 else s
    return Rescaled(codes, s, z, clear)


def _gptq(t: Tensor, block: _Block, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the codes of `t`, each rounded where it costs least beside those before it, and the steps to a tie."""
    codes, e = torch.zeros_like(t), torch.zeros_like(t)
    off = torch.tensor(torch.inf, dtype=torch.float64)
    for i, j in enumerate(block.order):
        aim = t[j] - block.follow[i] @ e[block.order[:i]]
        codes[j] = encode(aim, scale, zero, bits)
        off = torch.minimum(off, steps_to_tie(aim, scale, zero, bits))
        e[j] = t[j] - (codes[j] - zero) * scale
    return codes, off
