"""Coordinate descent from round-to-nearest: a solver that factorizes nothing.

Behdin et al. 2023 (QuantEase, arXiv 2309.01885) without its relaxation. It needs no inverse and no positive definite
H, which also makes it the last resort of the solvers that do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.descent import descend
from llmq.hessian import damped, symmetric
from llmq.report import DESCENDED, ROUNDED
from llmq.solvers.placing import Place, floored, nearest, place_all, placer
from llmq.solvers.rtn import rtn
from llmq.types import Grid, QuantizedWeight, Solution
from llmq.weights import chosen

_SWEEPS = 8  # at most; four bring all but the last percent of the gain


def descent(
    w: Tensor,
    h: Tensor,
    grid: Grid,
    group_size: int,
    *,
    damp_percent: float = 0.01,
    scale_search: str = "hessian",
    search_norm: float = 2.0,
) -> Solution:
    """Return codes of which, given all others, hardly any could be better: passes over the columns until all stay.

    Args:
        w: weights [N, K], any float dtype.
        h: Hessian float32 [K, K]; only its direction matters, not its scale.
        grid: what the columns of one group are rounded to.
        group_size: columns per group; a short last group is legal.
        damp_percent: share of the mean diagonal of `h` added to the diagonal, for inputs that calibration did not see.
        scale_search: see `llmq.solvers.placing.placer`; the energy of column j is H_jj.
        search_norm: the power that ``mse`` sums.

    Raises:
        SolverError: `h` holds NaN or infinity, or an option has no such value.
    """
    w, h = w.float(), symmetric(h)
    start = _start(w, h, grid, group_size, placer(grid, scale_search, search_norm))
    return Solution(_passes(start, w, damped(h, damp_percent, torch.float32)), damp_percent)


def without_factor(w: Tensor, h: Tensor, grid: Grid, group_size: int, place: Place) -> Solution:
    """Return what can be had from an H that is not positive semidefinite, hence not what it should be.

    Coordinate descent on it, undamped. A row whose loss comes out negative, which no inputs could cause, is rounded
    to nearest instead; so is everything if not even the diagonal of H is usable.
    """
    h = symmetric(h)
    w = w.float()
    if not (h.diagonal() > 0).any():
        return Solution(rtn(w, None, grid, group_size).weight, 0.0, (ROUNDED,))
    start = _start(w, h, grid, group_size, place)
    found = _passes(start, w, h)
    error = w - found.dequantize()
    possible = ((error @ h) * error).sum(dim=1) >= 0
    return Solution(chosen(possible, found, start), 0.0, (DESCENDED,))


def _start(w: Tensor, h: Tensor, grid: Grid, group_size: int, place: Place) -> QuantizedWeight:
    """Return `w` rounded to nearest on scales that were placed by the diagonal of `h`."""
    energy = floored(h.diagonal().clamp(min=0))
    return nearest(grid, group_size, w, place_all(place, w, energy, group_size))


def _passes(q: QuantizedWeight, w: Tensor, h: Tensor) -> QuantizedWeight:
    """Return `q` after passes of coordinate descent, until one changes nothing or `_SWEEPS` are done."""
    for _ in range(_SWEEPS):
        before = q.codes
        q = descend(q, w, h)
        if torch.equal(q.codes, before):
            break
    return q
