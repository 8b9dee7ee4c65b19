"""Learned levels in float64: the best table by trying all, and solvers on tables that are given."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor


def loss(w: Tensor, weight: Tensor, levels: Tensor) -> float:
    """Return ``Σ weight (w - nearest level)²`` of one row `w` [S]."""
    off = (w.double()[:, None] - levels.double()[None]).square().amin(1)
    return float(off @ weight.double())


def best_loss(w: Tensor, weight: Tensor, count: int) -> float:
    """Return the least loss of one row `w` [S] on `count` levels: every way to cut the sorted row is tried."""
    w, order = w.double().sort()
    weight = weight.double()[order]
    s = len(w)
    spread = [[_spread(w[a:b], weight[a:b]) for b in range(s + 1)] for a in range(s + 1)]
    ways = combinations_with_replacement(range(s + 1), count - 1)
    return min(sum(spread[a][b] for a, b in zip((0, *cuts), (*cuts, s), strict=True)) for cuts in ways)


def _spread(w: Tensor, weight: Tensor) -> float:
    """Return what the best single level for `w` loses."""
    if not weight.any():
        return 0.0
    mean = (w * weight).sum() / weight.sum()
    return float(((w - mean) ** 2 * weight).sum())


class Solved(NamedTuple):
    """Codes, and which rows float32 must agree on."""

    codes: Tensor  # int64 [N, K]
    clear: Tensor  # bool [N]


def nearest_codes(w: Tensor, levels: Tensor) -> Tensor:
    """Return the first of the nearest `levels` [N, L] for each entry of `w` [N, S], int64."""
    return (w.double()[:, :, None] - levels.double()[:, None]).abs().argmin(2)


def _to_tie(w: Tensor, levels: Tensor) -> Tensor:
    """Return how far each of `w` [N] is from lying between two different levels of its row, [N]."""
    low, high = levels[:, :-1].double(), levels[:, 1:].double()
    off = (w.double()[:, None] - (low + high) / 2).abs()
    return torch.where(high > low, off, torch.inf).amin(1)


def gptq(w: Tensor, h: Tensor, levels: Tensor, group_size: int, damp_percent: float, columns: list[int]) -> Solved:
    """Return textbook GPTQ (Frantar et al. 2022, algorithm 1) of `w` [N, K] on `levels` [N, G, L] that are given.

    `columns` is the order of the visit.
    """
    inverse = torch.linalg.inv(_damped(h, damp_percent)[columns][:, columns])
    u = torch.linalg.cholesky(inverse, upper=True)
    work, n = w.double()[:, columns].clone(), len(w)
    codes, clear = torch.zeros(w.shape, dtype=torch.int64), torch.ones(n, dtype=torch.bool)
    for at, column in enumerate(columns):
        table, target = levels[:, column // group_size].double(), work[:, at].clone()
        codes[:, column] = nearest_codes(target[:, None], table)[:, 0]
        clear &= _to_tie(target, table) > 1e-4 * target.abs().max()
        error = (target - table.gather(1, codes[:, column, None])[:, 0]) / u[at, at]
        work[:, at:] -= error[:, None] * u[at, at:]
    return Solved(codes, clear)


def entering(w: Tensor, h: Tensor, q: Tensor, start: int, stop: int, damp_percent: float) -> tuple[Tensor, Tensor]:
    """Return what GPTQ in natural order makes of the columns start … stop when it gets there, and their energies.

    The columns before are `q` already; those behind follow them where that costs least: ``w - e H_ab H_bb⁻¹``, with a
    the columns before and b all others. The energy of a column is what its error costs, those behind it being free.
    """
    damped = _damped(h, damp_percent)
    free = slice(start, None)
    error = q.double()[:, :start] - w.double()[:, :start]
    follow = torch.linalg.solve(damped[free, free], damped[free, :start] @ error.T).T
    moved = w.double()[:, free] - follow
    energies = [1 / torch.linalg.inv(damped[j:, j:])[0, 0] for j in range(len(h))]
    return moved[:, : stop - start], torch.stack(energies)


def descend(w: Tensor, h: Tensor, codes: Tensor, levels: Tensor, group_size: int) -> Solved:
    """Return the codes after one pass of coordinate descent, the whole gradient anew for every column."""
    w, h, codes = w.double(), h.double(), codes.long().clone()
    clear = torch.ones(len(w), dtype=torch.bool)
    for j in range(w.shape[1]):
        if h[j, j] == 0:
            continue
        values = decode(codes, levels, group_size)
        target = values[:, j] + ((w - values) @ h)[:, j] / h[j, j]
        table = levels[:, j // group_size].double()
        clear &= _to_tie(target, table) > 1e-4 * target.abs().max()
        codes[:, j] = nearest_codes(target[:, None], table)[:, 0]
    return Solved(codes, clear)


def decode(codes: Tensor, levels: Tensor, group_size: int) -> Tensor:
    """Return the values [N, K], float64, of `codes` on `levels` [N, G, L]."""
    of = torch.arange(codes.shape[1]) // group_size
    return levels.double()[:, of].gather(2, codes.long()[:, :, None])[:, :, 0]


def _damped(h: Tensor, damp_percent: float) -> Tensor:
    h = h.double()
    return h + damp_percent * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def places(codes: Tensor, groups: int, count: int, group_size: int) -> Tensor:
    """Return P [K, G·L] of one row with `codes` [K], 0-1 and float64: its values are P times its levels."""
    k = len(codes)
    p = torch.zeros(k, groups * count, dtype=torch.float64)
    for j in range(k):
        p[j, j // group_size * count + int(codes[j])] = 1
    return p


def least_squares(p: Tensor, w: Tensor, h: Tensor) -> Tensor:
    """Return the c that minimizes ``(w - P c) H (w - P c)ᵀ``, nearest to 0 where there are several, [G·L]."""
    a = p.T @ h.double() @ p
    return torch.linalg.pinv(a, hermitian=True, rtol=1e-12) @ (p.T @ h.double() @ w.double())


def conjugate_gradients(p: Tensor, levels: Tensor, w: Tensor, h: Tensor, steps: int) -> Tensor:
    """Return levels after `steps` of conjugate gradients from `levels` [G·L], preconditioned by the energy of each."""
    a = p.T @ h.double() @ p
    energy = p.T @ h.double().diagonal()
    scale = torch.where(energy > 0, 1 / energy, 0.0)
    c = levels.double().clone()
    rest = p.T @ (h.double() @ (w.double() - p @ c))
    aim = scale * rest
    for _ in range(steps):
        bend = aim @ a @ aim
        if bend <= 0:
            break
        far = (rest @ (scale * rest)) / bend
        c += far * aim
        after = rest - far * (a @ aim)
        aim = scale * after + (after @ (scale * after)) / (rest @ (scale * rest)) * aim
        rest = after
    return c
