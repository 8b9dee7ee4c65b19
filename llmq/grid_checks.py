"""Which grid a recipe means, and whether a weight can be placed on it: asked before work starts."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from llmq.errors import SolverError, SpecError
from llmq.grids import ALL_GRIDS, make_grid
from llmq.grids.level_bytes import power_for
from llmq.grids.scales import half_precision
from llmq.grids.uniform import UniformGrid
from llmq.grids.vq import MAX_ENTRY, VectorGrid
from llmq.recipe import Recipe
from llmq.solvers.vectors import check_recipe
from llmq.types import Grid, QuantSpec


def grid_of(recipe: Recipe, spec: QuantSpec) -> Grid:
    """Return the grid of layers as `spec` describes them.

    Raises:
        SpecError: the grid has no such bits or groups, or something in the recipe knows the uniform grid only.
    """
    grid, row = make_grid(spec.grid, spec.bits, spec.symmetric), ALL_GRIDS[spec.grid]
    if isinstance(grid, UniformGrid):
        return replace(grid, sym_range=recipe.sym_range)
    if row.group_size not in (None, spec.group_size):
        raise SpecError(f"{spec.grid} grid: group_size is {spec.group_size}; it has groups of {row.group_size}")
    for stage in ("tune_steps", "tune_epochs"):
        if getattr(recipe, stage):
            raise SpecError(f"{stage}: tuning moves codes by steps, which the {spec.grid} grid has not; use 0")
    if grid.learns and recipe.scale_search == "mse" and recipe.search_norm != 2:
        raise SpecError(f"search_norm: the {spec.grid} grid learns levels by squared errors; use 2")
    if isinstance(grid, VectorGrid):
        check_recipe(recipe, grid)
    return grid


def check_scales(name: str, weight: Tensor, spec: QuantSpec, grid: Grid) -> None:
    """Check that files hold the scales of a weight [N, K] by extremes, or of some rows of it.

    Raises:
        SolverError: they do not; names the weight.
    """
    try:
        if isinstance(grid, VectorGrid):
            half_precision(weight.abs().max() / MAX_ENTRY)
            return
        if grid.learns:  # which takes seconds: no level is beyond the largest weight
            power_for(weight.float())
            return
        grid = grid.adapted(weight)
        for columns in weight.split(spec.group_columns(weight.shape[1]), dim=1):
            grid.fit(columns)
    except SolverError as error:
        raise SolverError(f"{name}: {error}") from error
