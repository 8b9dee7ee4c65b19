"""Solvers for weights on codebooks of vectors, by the names of those for single weights.

They see one linear layer at a time: its rows share a codebook, and so are not independent as elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq.errors import SolverError, SpecError
from llmq.grids.scales import check_finite
from llmq.grids.vq import VectorGrid, VectorWeight, whole_vectors
from llmq.hessian import damped, factorize, symmetric
from llmq.recipe import Recipe
from llmq.report import DESCENDED, ROUNDED
from llmq.solvers import SOLVERS, Solver
from llmq.types import Grid, Solution
from llmq.vectors import metrics, refining
from llmq.vectors.codebooks import vectors_of
from llmq.vectors.placing import per_vector, placed
from llmq.vectors.sweep import swept

ORDERS = ("natural", "act", "group")  # that know whole vectors; act and group are the same
_SWEEPS = 8  # of coordinate descent, at most


def vector_rtn(w: Tensor, h: Tensor | None, grid: VectorGrid, group_size: int) -> Solution:
    """Return `w` [N, K] on a codebook learned by plain k-means, each vector on the nearest entry.

    Args:
        w: weights, any float dtype.
        h: ignored; solvers share one signature.
        grid: number and size of the entries.
        group_size: columns per scale.

    Raises:
        SolverError: a weight is not finite, or a scale does not fit float16.
    """
    del h
    w = _finite(w)
    roots = metrics.plain(grid.codes_in(w.shape[1]), grid.columns, w.shape[1], w.device)
    return Solution(placed(w, grid, group_size, roots), damp_percent=0.0)


def vector_weighted_rtn(w: Tensor, h: Tensor, grid: VectorGrid, group_size: int) -> Solution:
    """Return `w` on a codebook that lowers the output error, inputs of different vectors taken as uncorrelated.

    The metric of a vector is its block of `h`, float32 [K, K] (Stock et al. 2020, arXiv 1907.05686); the rest as in
    `vector_rtn`.
    """
    roots = metrics.block_roots(symmetric(h), grid.columns)
    return Solution(placed(_finite(w), grid, group_size, roots), damp_percent=0.0)


def vector_descent(w: Tensor, h: Tensor, grid: VectorGrid, group_size: int, *, damp_percent: float = 0.05) -> Solution:
    """Return codes of which, given all others, hardly any could be better, on the codebook of `vector_weighted_rtn`.

    `damp_percent` is the share of the mean diagonal of `h` that is added to the diagonal; nothing is factorized.
    """
    w, h = _finite(w), damped(symmetric(h), damp_percent, torch.float32)
    start = placed(w, grid, group_size, metrics.block_roots(h, grid.columns))
    return Solution(_passes(start, w, h), damp_percent)


def vector_gptq(
    w: Tensor, h: Tensor, grid: VectorGrid, group_size: int, *, damp_percent: float = 0.05, order: str = "act"
) -> Solution:
    """Return the codes of a sweep over vectors, each making up for the errors before it.

    The codebook is learned beforehand, in the metric R_BB R_BBᵀ: what an error in block B still costs after the columns
    behind it have made up for it as well as they can (for d = 1, the energy R_jj² of `llmq.solvers.gptq`).

    Args:
        w: weights [N, K], any float dtype.
        h: Hessian float32 [K, K]; only its direction matters, not its scale.
        grid: number and size of the entries.
        group_size: columns per scale.
        damp_percent: share of the mean diagonal of `h` added to the diagonal.
        order: ``natural``, or ``act``: vectors by falling energy of their inputs.

    Returns:
        The solution; where `h` has no factor, that of coordinate descent on it, with its remedy.

    Raises:
        SolverError: a weight or `h` is not finite, a scale does not fit float16, or there is no such order.
    """
    w, d = _finite(w), grid.columns
    k = w.shape[1]
    energy = metrics.blocks_of(metrics.filled(h, d), d).diagonal(dim1=1, dim2=2).sum(dim=1)
    if order not in ORDERS:
        raise SolverError(f"order is {order!r}, which knows no vectors; use {', '.join(ORDERS)}")
    visit = torch.arange(len(energy), device=w.device)
    if order != "natural":
        visit = energy.argsort(descending=True, stable=True)
    columns = (visit[:, None] * d + torch.arange(d, device=w.device)).flatten()
    factor = factorize(metrics.filled(h, d, fill=float(h.diagonal().mean())), damp_percent, columns)
    if factor is None:
        return _without_factor(w, h, grid, group_size)
    r = factor.r
    beyond = columns >= k  # what reaches beyond the end of a row costs nothing
    r[beyond, beyond] = 0.0
    roots = torch.empty(len(visit), d, d, device=w.device)
    roots[visit] = metrics.blocks_of(r, d)
    start = placed(w, grid, group_size, roots)
    scales = per_vector(start.scales, grid, group_size, len(visit))
    codes = swept(vectors_of(whole_vectors(w, d), scales, roots), start.codebook, r, visit)
    found = replace(start, codes=codes.T.to(torch.uint8).contiguous())
    return Solution(found, factor.damp_percent, factor.remedies)


def _without_factor(w: Tensor, h: Tensor, grid: VectorGrid, group_size: int) -> Solution:
    """Return what can be had from an `h` that is not positive semidefinite; see `llmq.solvers.descent`."""
    h = symmetric(h)
    if not (h.diagonal() > 0).any():
        return replace(vector_rtn(w, None, grid, group_size), remedies=(ROUNDED,))
    start = placed(w, grid, group_size, metrics.block_roots(h, grid.columns))
    found = _passes(start, w, h)
    error = w - found.dequantize()
    possible = ((error @ h) * error).sum(dim=1) >= 0
    codes = torch.where(possible[:, None], found.codes, start.codes)
    return Solution(replace(found, codes=codes), 0.0, (DESCENDED,))


def _passes(q: VectorWeight, w: Tensor, h: Tensor) -> VectorWeight:
    """Return `q` after passes of coordinate descent over its codes, until one changes nothing."""
    state = refining.begin(q, w, h)
    for _ in range(_SWEEPS):
        after = refining.descended(state)
        if after is state:
            break
        state = after
    return state.weight


def _finite(w: Tensor) -> Tensor:
    """Return `w` in float32 if it has no NaN or infinity."""
    check_finite(w)
    return w.float()


VECTOR_SOLVERS: dict[str, Solver] = {
    "gptq": Solver(vector_gptq, calibrated=True, options=("damp_percent", "order")),
    "descent": Solver(vector_descent, calibrated=True, options=("damp_percent",)),
    "weighted_rtn": Solver(vector_weighted_rtn, calibrated=True, options=()),
    "rtn": Solver(vector_rtn, calibrated=False, options=()),
}


def solvers_of(grid: Grid) -> dict[str, Solver]:
    """Return the solvers that know a grid, by their names."""
    return VECTOR_SOLVERS if isinstance(grid, VectorGrid) else SOLVERS


def check_recipe(recipe: Recipe, grid: VectorGrid) -> None:
    """Check that a recipe asks nothing of a grid of vectors that knows single weights only.

    Raises:
        SpecError: it does.
    """
    if recipe.method in SOLVERS and recipe.method not in VECTOR_SOLVERS:
        raise SpecError(
            f"method {recipe.method} decides on single weights, the {grid.name} grid has vectors of {grid.columns}; "
            f"use {', '.join(VECTOR_SOLVERS)}"
        )
    if recipe.method == "gptq" and recipe.order not in ORDERS:
        raise SpecError(f"order {recipe.order} takes vectors of the {grid.name} grid apart; use {', '.join(ORDERS)}")
    if recipe.guidance_groups > 1:
        raise SpecError(
            f"guidance_groups is {recipe.guidance_groups}, which solves parts of a layer apart; all of it shares a "
            f"codebook on the {grid.name} grid: use 0 or 1"
        )
