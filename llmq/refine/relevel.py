"""Relevel: learned levels move to where they lose least under the codes that there are.

With P the 0-1 matrix that puts the levels c of a row, those of all its groups, in the places of its codes, the row
loses ``(w - P c) H (w - P c)ᵀ``: least squares in c, with the solution ``(Pᵀ H P)⁻¹ Pᵀ H w`` (LNQ, in Kim et al. 2025,
GuidedQuant, arXiv 2505.07004). Pᵀ H P differs from row to row, and to make it for all of them costs a product of the
size of ``W H`` per level. Conjugate gradients, preconditioned by the energy of the inputs at each level, need one per
step and come as near in a few. Pᵀ sums what a vector has at the places of a level, P looks levels up.

What is found is rounded to what files hold, and taken by the rows whose loss that lowers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq.descent import State
from llmq.grids.level_bytes import LARGEST

_STEPS = 3  # of conjugate gradients: more gain nothing that rounding keeps
_COLUMNS = 64  # whose codes are looked at together


def relevel(state: State) -> State:
    """Return the complete `state` with better levels under the same codes, each row for itself.

    A grid that learns no levels has none to move.
    """
    if state.levels is None:
        return state
    codes = _codes(state)
    moved = state.levels.transpose(1, 2) + _way(state, codes)  # [G, L, N], by code
    moved, order = moved.transpose(1, 2).clamp(-LARGEST, LARGEST).sort(dim=-1)
    levels = state.grid.storable(moved)
    by_code = torch.empty_like(levels).scatter_(-1, order, levels)
    change = _looked_up(by_code.transpose(1, 2), codes, state.group_size).sub_(state.values)
    slope = state.h @ change
    better = (change * (2 * state.gradient - slope)).sum(dim=0, dtype=torch.float64) > 0
    return replace(
        state,
        values=torch.where(better, state.values + change, state.values),
        levels=torch.where(better[:, None], levels, state.levels),
        gradient=torch.where(better, state.gradient - slope, state.gradient),
    )


def _codes(state: State) -> Tensor:
    """Return the codes of the values, uint8 [K, N]."""
    return torch.cat([state.grid.encode(state.values[columns], at) for columns, at in state.groups()])


def _way(state: State, codes: Tensor) -> Tensor:
    """Return how far to move the levels, [G, L, N], by conjugate gradients from where they are."""
    count, size = 2**state.grid.bits, state.group_size
    energy = _summed(state.h.diagonal()[:, None].expand_as(state.values), codes, size, count)
    part = torch.where(energy > 0, 1 / energy, 0.0)  # a level that no input ever meets stays
    rest = _summed(state.gradient, codes, size, count)
    way, aim = torch.zeros_like(rest), torch.zeros_like(rest)
    before = torch.ones_like(rest[0, 0])
    for _ in range(_STEPS):
        steep = part * rest
        now = (rest * steep).sum(dim=(0, 1))
        aim = torch.addcmul(steep, aim, _ratio(now, before))
        slope = _summed(state.h @ _looked_up(aim, codes, size), codes, size, count)
        far = _ratio(now, (aim * slope).sum(dim=(0, 1)))
        way.addcmul_(aim, far)
        rest.addcmul_(slope, far, value=-1)
        before = now
    return way


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b where b is positive, and 0 elsewhere."""
    return torch.where(b > 0, a / b, 0.0)


def _summed(x: Tensor, codes: Tensor, group_size: int, count: int) -> Tensor:
    """Return the sums [G, L, N] of the entries of `x` [K, N] at each level of each group: Pᵀ x."""
    groups = zip(x.split(group_size), codes.split(group_size), strict=True)
    sums = torch.zeros(-(-len(x) // group_size), count, x.shape[1], device=x.device)
    for out, (own, places) in zip(sums, groups, strict=True):
        for part, code in zip(own.split(_COLUMNS), places.split(_COLUMNS), strict=True):
            out.scatter_add_(0, code.long(), part)
    return sums


def _looked_up(tables: Tensor, codes: Tensor, group_size: int) -> Tensor:
    """Return the entries [K, N] of `tables` [G, L, N] that `codes` name: P c."""
    groups = zip(tables, codes.split(group_size), strict=True)
    found = [table.gather(0, part.long()) for table, own in groups for part in own.split(_COLUMNS)]
    return torch.cat(found)
