"""OBQ, exactly: every row rounds next the weight that costs it least, and all its other weights make up for it.

Frantar and Alistarh 2022 (Optimal Brain Compression, arXiv 2208.11580, algorithm 3). Rounding weight q of a row costs
``(ŵ_q - w_q)² / [H⁻¹]_qq`` and moves the others by ``-(w_q - ŵ_q) / [H⁻¹]_qq · H⁻¹_q``; H⁻¹ then loses row and
column q. Each row has an order of its own, hence an inverse of its own: O(K³) time and K² float64 numbers per row. For
small layers, and to see how much the fixed order of the sweep costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import SolverError
from llmq.hessian import damped, factorize, symmetric
from llmq.solvers.descent import without_factor
from llmq.solvers.placing import floored, place_all, placer
from llmq.types import Affine, Grid, QuantizedWeight, Solution

_LARGEST = 2048  # columns: a row takes K³ steps and 8 K² bytes
_MEMORY = 2**28  # bytes of inverses at a time


def obq(
    w: Tensor,
    h: Tensor,
    grid: Grid,
    group_size: int,
    *,
    damp_percent: float = 0.01,
    scale_search: str = "none",
    search_norm: float = 2.0,
) -> Solution:
    """Return codes that minimize ``tr(E H Eᵀ)`` greedily, each row in the order that is cheapest for it.

    All groups are placed beforehand. A weight that has been pushed off the grid, by more than half a step, is rounded
    at once, the worst first: it will only get worse (as the authors' code does).

    Args:
        w: weights [N, K], any float dtype.
        h: Hessian float32 [K, K]; only its direction matters, not its scale.
        grid: what the columns of one group are rounded to; neighbouring levels are one scale apart.
        group_size: columns per group; a short last group is legal.
        damp_percent: share of the mean diagonal of `h` added to the diagonal.
        scale_search: see `llmq.solvers.placing.placer`; the energy of column j is H_jj.
        search_norm: the power that ``mse`` sums.

    Returns:
        The solution; on a Hessian that no damping makes positive definite it is that of
        `llmq.solvers.descent.without_factor`, with its remedy.

    Raises:
        SolverError: more than 2048 columns, `h` holds NaN or infinity, or an option has no such value.
    """
    k = w.shape[1]
    if grid.learns or grid.tables is not None:
        raise SolverError(f"obq knows equally spaced levels only, not the {grid.name} grid; use --method gptq")
    if k > _LARGEST:
        raise SolverError(
            f"obq takes K³ steps per row and is limited to {_LARGEST} inputs; this layer has {k}: use --method gptq"
        )
    place = placer(grid, scale_search, search_norm)
    factor = factorize(h, damp_percent)
    if factor is None:
        return without_factor(w, h, grid, group_size, place)
    h, w = symmetric(h), w.float()
    placements = place_all(place, w, floored(h.diagonal()), group_size)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(h, factor.damp_percent, torch.float64)))
    scales, zeros = torch.cat([at.scale for at in placements], dim=1), torch.cat([at.zero for at in placements], dim=1)
    at = Affine(*(t.repeat_interleave(group_size, dim=1)[:, :k] for t in (scales, zeros)))
    rows = max(1, _MEMORY // (8 * k * k))
    parts = zip(w.double().split(rows), at.scale.split(rows), at.zero.split(rows), strict=True)
    codes = torch.cat([_round_rows(part, Affine(scale, zero), grid, inverse) for part, scale, zero in parts])
    return Solution(QuantizedWeight(codes, scales, zeros, grid, group_size), factor.damp_percent, factor.remedies)


def _round_rows(w: Tensor, at: Affine, grid: Grid, inverse: Tensor) -> Tensor:
    """Return the uint8 codes [N, K] of the rows `w` float64 [N, K], placed by `at` [N, K] each."""
    n, k = w.shape
    w, rows = w.clone(), torch.arange(n, device=w.device)
    inverses = inverse.expand(n, k, k).clone()
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    live = torch.ones(n, k, dtype=torch.bool, device=w.device)
    reach = (at.scale.double() / 2).square() * (1 + 1e-9)  # an error of exactly half a step is on the grid
    for _ in range(k):
        nearest = grid.encode(w, at)
        error = w - grid.decode(nearest, at).double()
        squared = torch.where(live, error.square(), -1.0)
        cost = torch.where(live, squared / inverses.diagonal(dim1=1, dim2=2), torch.inf)
        lost = squared > reach
        worst = torch.where(lost, squared, -1.0).argmax(dim=1)
        q = torch.where(lost.any(dim=1), worst, cost.argmin(dim=1))
        codes[rows, q] = nearest[rows, q]
        live[rows, q] = False
        column = inverses[rows, q]
        pivot = column[rows, q]
        w -= (error[rows, q] / pivot)[:, None] * column
        column /= pivot.sqrt()[:, None]
        inverses.baddbmm_(column[:, :, None], column[:, None, :], alpha=-1)
    return codes
