"""Placing the groups of a weight on the grid: one meaning of ``scale_search`` for every solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import SolverError
from llmq.scale_search import runs_on, search
from llmq.types import Affine, Grid, QuantizedWeight

Place = Callable[[Tensor, Tensor], Affine]  # (w [N, S], energy [S]) -> placement of these columns


@dataclass(frozen=True)
class _Search:
    """Places columns where their errors weigh least; on a GPU all groups of a weight at once."""

    grid: Grid
    weighted: bool  # by the energies; else alike
    norm: float

    def __call__(self, w: Tensor, energy: Tensor) -> Affine:
        weight = energy if self.weighted else torch.ones_like(energy)
        if runs_on(w.device, self.grid):
            return search(self.grid, w, weight, w.shape[1], self.norm)
        return self.grid.fit(w, weight, norm=self.norm)

    def of_groups(self, w: Tensor, energy: Tensor, group_size: int) -> list[Affine]:
        """Return the placement of each group of a weight that is on a GPU."""
        weight = energy if self.weighted else torch.ones_like(energy)
        found = search(self.grid, w, weight, group_size, self.norm)
        groups = zip(found.scale.split(1, dim=1), found.zero.split(1, dim=1), strict=True)
        return [Affine(scale, zero) for scale, zero in groups]


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
        "mse": _Search(grid, False, search_norm),
        "hessian": _Search(grid, True, 2.0),
    }
    if scale_search not in ways:
        raise SolverError(f"scale_search is {scale_search!r}; use {', '.join(ways)}")
    return ways[scale_search]


def floored(energy: Tensor) -> Tensor:
    """Return the energies [K], none below a millionth of their mean: groups that never occurred are searched too."""
    return energy.clamp(min=_FLOOR * float(energy.mean()))


def place_all(place: Place, w: Tensor, energy: Tensor, group_size: int) -> list[Affine]:
    """Return the placement of each group of `w` [N, K], by columns of these energies [K]."""
    if isinstance(place, _Search) and runs_on(w.device, place.grid):
        return place.of_groups(w, energy, group_size)
    parts = zip(w.split(group_size, dim=1), energy.split(group_size), strict=True)
    return [place(columns, weight) for columns, weight in parts]


def nearest(grid: Grid, group_size: int, w: Tensor, placements: list[Affine]) -> QuantizedWeight:
    """Return `w` [N, K] rounded to the nearest level of each group's placement."""
    parts = zip(w.split(group_size, dim=1), placements, strict=True)
    codes = torch.cat([grid.encode(columns, at) for columns, at in parts], dim=1)
    scales, zeros = torch.cat([at.scale for at in placements], dim=1), torch.cat([at.zero for at in placements], dim=1)
    learned = [at.levels for at in placements if at.levels is not None]
    return QuantizedWeight(codes, scales, zeros, grid, group_size, torch.cat(learned, dim=1) if learned else None)
