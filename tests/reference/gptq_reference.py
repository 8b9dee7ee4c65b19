"""Textbook GPTQ in float64: Frantar et al. 2022, algorithm 1, column by column, nothing deferred, nothing clever."""

from __future__ import annotations

from typing import NamedTuple

import torch
from grid_reference import encode, place, steps_to_tie
from order_reference import WHOLE_GROUPS, visit
from torch import Tensor


class Trace(NamedTuple):
    """A solved weight, and how far its decisions were from coming out otherwise."""

    codes: Tensor  # [N, K] whole numbers
    scales: Tensor  # [N, G]
    zeros: Tensor  # [N, G]
    loss: Tensor  # [N], the sum of (c_j - q_j)² / U_jj²
    margin: Tensor  # [N], steps by which any compensated weight may move without changing a decision
    moved: Tensor  # [N], the largest compensation in steps


def damped(h: Tensor, damp_percent: float) -> Tensor:
    """Return ``H + λI`` with ``λ = damp_percent · mean(diag H)``, float64."""
    h = h.double()
    return h + damp_percent * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def gptq_u_form(
    w: Tensor, h: Tensor, bits: int, symmetric: bool, group_size: int, damp_percent: float, order: str
) -> Trace:
    """Return what GPTQ does to `w` [N, K].

    Groups are contiguous columns, placed by the compensated weights when the sweep enters them, or, where the order
    mixes them, by the original weights beforehand.
    """
    columns = visit(h, order, group_size)
    inverse = torch.linalg.inv(damped(h, damp_percent)[columns][:, columns])
    u = torch.linalg.cholesky(inverse, upper=True)  # inverse = Uᵀ U
    sweep = _Groups(w.double(), bits, symmetric, group_size, order not in WHOLE_GROUPS)
    return sweep_columns(sweep, columns, u, torch.zeros_like(u))


def sweep_columns(sweep: _Groups, columns: list[int], u: Tensor, p: Tensor) -> Trace:
    """Round one column after another; correct those behind by its error, and (GPTAQ) by `p` times its target.

    `u` and `p` [K, K] have their rows and columns in the order of `columns`; H⁻¹ = Uᵀ U, and `p` is 0 for GPTQ.
    """
    work = sweep.original[:, columns].clone()
    loss = torch.zeros(len(work), dtype=torch.float64)
    for at, column in enumerate(columns):
        target = work[:, at].clone()
        rounded = sweep.round(column, target, work[:, at : at + sweep.columns_of(column)], columns[at:])
        error = (target - rounded) / u[at, at]
        loss += error**2
        work[:, at:] += target[:, None] * p[at, at:] - error[:, None] * u[at, at:]
    return sweep.trace(loss)


class _Groups:
    """The grid of each group, and the codes so far; shared by the references."""

    def __init__(self, original: Tensor, bits: int, symmetric: bool, group_size: int, static: bool) -> None:
        n, k = original.shape
        self.original, self.bits, self.symmetric, self.group_size = original, bits, symmetric, group_size
        groups = -(-k // group_size)
        self.codes = torch.full((n, k), float("nan"), dtype=torch.float64)
        self.scales = torch.full((n, groups), float("nan"), dtype=torch.float64)
        self.zeros = self.scales.clone()
        self.margin = torch.full((n,), float("inf"), dtype=torch.float64)
        self.moved = torch.zeros(n, dtype=torch.float64)
        self.static = static
        if static:
            for group in range(groups):
                self._place(group, original[:, group * group_size : (group + 1) * group_size])

    def columns_of(self, column: int) -> int:
        """Return the number of columns in the group of `column`; the last may be short."""
        return min(self.group_size, self.original.shape[1] - column // self.group_size * self.group_size)

    def _place(self, group: int, w: Tensor, columns: list[int] | None = None) -> None:
        placed = place(w, self.bits, self.symmetric)
        self.scales[:, group], self.zeros[:, group] = placed.scale, placed.zero
        if not self.static:  # original weights are the same in float32: no decision about them can differ
            self.margin = torch.minimum(self.margin, placed.margin)

    def round(self, column: int, target: Tensor, entering: Tensor, ahead: list[int]) -> Tensor:
        """Return the level nearest to `target` [N]; `entering` are the weights of `ahead` if a group starts here."""
        group = column // self.group_size
        if self.scales[:, group].isnan().all():
            self._place(group, entering, ahead[: entering.shape[1]])
        scale, zero = self.scales[:, group], self.zeros[:, group]
        self.codes[:, column] = encode(target, scale, zero, self.bits)
        self.margin = torch.minimum(self.margin, steps_to_tie(target, scale, zero, self.bits))
        self.moved = torch.maximum(self.moved, ((target - self.original[:, column]) / scale).abs())
        return (self.codes[:, column] - zero) * scale

    def trace(self, loss: Tensor) -> Trace:
        """Return the result."""
        return Trace(self.codes, self.scales, self.zeros, loss, self.margin, self.moved)
