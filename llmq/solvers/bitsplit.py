"""Bit-split and stitching: codes as sums of signed digits, improved digit by digit in the metric of the outputs.

Wang et al. 2020, "Towards Accurate Post-training Network Quantization via Bit-Split and Stitching" (ICML, PMLR 119),
section 3. A symmetric code of b bits is ``q = Σ_m 2^m q_m`` with m = 0 … b - 2 and digits q_m of -1, 0 and 1; for a row
w and a scale α per group the loss is ``(w - α q) H (w - α q)ᵀ``. In turns:

- each α, with the codes and the other groups fixed, goes to the bottom of its parabola (as near as files hold scales);
- for each m, column by column, the digit with all else fixed. With ``G = (w - α q) H`` the loss as a function of it is
  a parabola with its lowest point at ``t = q_m + G_k / (2^m α H_kk)``, and the best digit is the one nearest to t. In
  terms of ``A = (2^m α)² H`` and s, the slope at 0, that is ``-sign(r)`` where ``|r| > A_kk``, else 0, for
  ``r = -s_k + 2 Σ_{i≠k} A_ki q_i``.

Neither raises the loss. Inputs enter by H alone. A digit moves a code by a power of two, so that what lies between two
codes may be two digits away, both of them uphill: `llmq.solvers.descent` decides on whole codes, for no more work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llmq.descent import State, begin, complete, leaves, sweep
from llmq.grids.alternating import least_squares
from llmq.grids.uniform import UniformGrid
from llmq.hessian import symmetric
from llmq.solvers.admm import admm
from llmq.solvers.placing import nearest
from llmq.solvers.takes import check, symmetric_steps
from llmq.types import Affine, Grid, QuantizedWeight, Solution

_ROUNDS = 8  # at most


def bitsplit(
    w: Tensor,
    h: Tensor,
    grid: Grid,
    group_size: int,
    *,
    damp_percent: float = 0.01,
    scale_search: str = "hessian",
    search_norm: float = 2.0,
) -> Solution:
    """Return codes of which, given all others, no digit could be better, and scales that fit them.

    Args:
        w: weights [N, K], any float dtype.
        h: Hessian float32 [K, K]; only its direction matters, not its scale.
        grid: a symmetric uniform one. Codes have no digits for its lowest level, and leave it out, as ``restricted``.
        group_size: columns per group; a short last group is legal.
        damp_percent: share of the mean diagonal of `h` added to the diagonal.
        scale_search: where `llmq.solvers.admm.admm`, whose result is the start, starts, and what it weighs.
        search_norm: the power that ``mse`` sums.

    Raises:
        SolverError: `h` holds NaN or infinity, an option has no such value, or the grid is another.
    """
    check("bitsplit", symmetric_steps(grid))
    assert isinstance(grid, UniformGrid)
    own = replace(grid, sym_range="restricted")
    w, h = w.float(), symmetric(h)
    start = admm(w, h, own, group_size, scale_search=scale_search, search_norm=search_norm).weight
    found = _improved(start, w, metric(h, damp_percent))
    unseen = h.diagonal() <= 0  # their codes are to be the nearest under the scales as they came out
    placements = [Affine(*pair) for pair in zip(found.scales.split(1, 1), found.zeros.split(1, 1), strict=True)]
    codes = torch.where(unseen, nearest(own, group_size, w, placements).codes, found.codes)
    return Solution(replace(found, codes=codes, grid=grid), damp_percent)


def metric(h: Tensor, damp_percent: float) -> Tensor:
    """Return symmetric `h` [K, K] with the mean of its diagonal, times `damp_percent`, added where an input occurs.

    Inputs that never occur must not pull at scales or at the codes of others.
    """
    h = h.clone()
    diagonal = h.diagonal()
    diagonal.add_(torch.where(diagonal > 0, damp_percent * diagonal.mean(), 0.0))
    return h


def _improved(start: QuantizedWeight, w: Tensor, h: Tensor) -> QuantizedWeight:
    """Return `start` after rounds of `scale_step` and `digit_step`, until one changes nothing or `_ROUNDS` are done."""
    state, digits = begin(start, w, h), split(start)
    for _ in range(_ROUNDS):
        before = state
        state = scale_step(complete(state))
        for m in reversed(range(len(digits))):
            state = digit_step(complete(state), digits[m], m)
        if torch.equal(state.values, before.values):
            break
    return state.weight()


def split(q: QuantizedWeight) -> Tensor:
    """Return the digits [b - 1, K, N] of codes [N, K], the lowest first: the bits of the magnitude, times the sign."""
    whole = q.codes.T.int() - 2 ** (q.grid.bits - 1)
    bits = [(whole.abs() >> m) & 1 for m in range(q.grid.bits - 1)]
    return torch.stack(bits).mul_(whole.sign()).float()


def digit(t: Tensor) -> Tensor:
    """Return the best digit of -1, 0 and 1, given the lowest point `t` of the loss as a function of it."""
    return t.round().clamp_(-1, 1)


def scale_step(state: State) -> State:
    """Return the complete `state` with each scale at its best, one group after another."""
    return sweep(state, [columns for columns, _ in state.groups()], _fit_scale)


def digit_step(state: State, digits: Tensor, m: int) -> State:
    """Return the complete `state` with digit m of every code at its best, column by column; `digits` [K, N] follow."""
    improve: Callable[[State, Tensor, slice], None] = partial(_choose_digits, digits=digits, unit=2.0**m)
    return sweep(state, leaves(len(digits)), improve)


def _fit_scale(work: State, changes: Tensor, columns: slice) -> None:
    """Move the scale of one group."""
    group, old = columns.start // work.group_size, work.values[columns].clone()
    scale = work.scales[group].clone()
    codes = (old / scale).round_()
    slope = (codes * work.gradient[columns]).sum(dim=0, dtype=torch.float64)
    curvature = (codes * (work.h[columns, columns] @ codes)).sum(dim=0, dtype=torch.float64)
    work.scales[group] = least_squares(work.grid, scale, slope, curvature)
    work.values[columns] = codes * work.scales[group]
    changes[columns] = work.values[columns] - old


def _choose_digits(work: State, changes: Tensor, columns: slice, *, digits: Tensor, unit: float) -> None:
    """Choose one digit of these columns, one by one; `unit` is what it is worth in the code."""
    energies = work.h.diagonal()[columns].tolist()
    for j, energy in enumerate(energies, start=columns.start):
        if energy <= 0:
            continue
        worth = work.scales[j // work.group_size] * unit
        done = slice(columns.start, j)
        gradient = torch.addmv(work.gradient[j], changes[done].T, work.h[j, done], alpha=-1)
        best = digit(digits[j] + gradient / (worth * energy))
        torch.mul(best - digits[j], worth, out=changes[j])
        digits[j] = best
    work.values[columns] += changes[columns]
