"""Placing the groups of a weight on the grid: one meaning of ``scale_search`` for every solver."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmq.errors import SolverError
from llmq.types import Affine, Grid, QuantizedWeight

Place = Callable[[Tensor, Tensor], Affine]  # (w [N, S], energy [S]) -> placement of these columns

_FLOOR = 1e-6  # of the mean energy: what a column that never occurred in calibration still weighs in the search


def placer(grid: Grid, scale_search: str, search_norm: float) -> Place:
    """Return how the columns `w` [N, S] of one group, with these energies [S], are placed on `grid`.

    Args:
        grid: what the columns are rounded to.
        scale_search: ``none``: by their extremes; ``mse``: by the least sum of ``|w - ŵ|^search_norm``; ``hessian``: by
            the least sum of ``energy (w - ŵ)²``, where the energy of a column is what its error costs.
        search_norm: the power that ``mse`` sums.

    Raises:
        SolverError: `scale_search` is none of the three.
    """
    ways: dict[str, Place] = {
        "none": lambda w, energy: grid.fit(w),
        "mse": lambda w, energy: grid.fit(w, torch.ones_like(energy), norm=search_norm),
        "hessian": lambda w, energy: grid.fit(w, energy),
    }
    if scale_search not in ways:
        raise SolverError(f"scale_search is {scale_search!r}; use {', '.join(ways)}")
    return ways[scale_search]


def floored(energy: Tensor) -> Tensor:
    """Return the energies [K], none below a millionth of their mean: groups that never occurred are searched too."""
    return energy.clamp(min=_FLOOR * float(energy.mean()))


def place_all(place: Place, w: Tensor, energy: Tensor, group_size: int) -> list[Affine]:
    """Return the placement of each group of `w` [N, K], by columns of these energies [K]."""
    parts = zip(w.split(group_size, dim=1), energy.split(group_size), strict=True)
    return [place(columns, weight) for columns, weight in parts]


def nearest(grid: Grid, group_size: int, w: Tensor, placements: list[Affine]) -> QuantizedWeight:
    """Return `w` [N, K] rounded to the nearest level of each group's placement."""
    parts = zip(w.split(group_size, dim=1), placements, strict=True)
    codes = torch.cat([grid.encode(columns, at) for columns, at in parts], dim=1)
    scales, zeros = (torch.cat(parts, dim=1) for parts in zip(*placements, strict=True))
    return QuantizedWeight(codes, scales, zeros, grid, group_size)
