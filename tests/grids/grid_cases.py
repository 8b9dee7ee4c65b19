"""All grids that know their levels beforehand, and what a law needs to know of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from llmq.grids import GRIDS, make_grid
from llmq.grids.table import TableGrid
from llmq.grids.uniform import UniformGrid
from llmq.types import Affine, Grid

ALL: dict[str, Grid] = {
    f"{name}-{bits}-{'sym' if symmetric else 'asym'}": make_grid(name, bits, symmetric)
    for name, row in GRIDS.items()
    for bits in row.bits
    for symmetric in row.symmetric
    if not make_grid(name, bits, symmetric).learns
}
TABLES: dict[str, TableGrid] = {name: grid for name, grid in ALL.items() if isinstance(grid, TableGrid)}
FITTED = ("ternary", "binary", "residual_binary")  # placed where they lose least, with and without importances

every_grid = pytest.mark.parametrize("grid", ALL.values(), ids=ALL.keys())
every_table = pytest.mark.parametrize("grid", TABLES.values(), ids=TABLES.keys())


def uniform(bits: tuple[int, ...] = tuple(range(2, 9)), symmetric: tuple[bool, ...] = (True, False)) -> Any:
    """Return the mark that runs a test on these uniform grids."""
    grids = [UniformGrid(b, s) for b in bits for s in symmetric]
    return pytest.mark.parametrize("grid", grids, ids=lambda g: f"{g.bits}-{'sym' if g.symmetric else 'asym'}")


def groups(low: float = -1.0, high: float = 1.0) -> st.SearchStrategy[Tensor]:
    """Return a strategy for one group [1, S] whose magnitude spans twelve decades."""
    unit = st.lists(st.floats(low, high, width=32), min_size=1, max_size=12)
    magnitude = st.sampled_from([1e-8, 1e-6, 1e-4, 1e-2, 1.0, 30.0, 1e4])
    return st.tuples(unit, magnitude).map(lambda t: torch.tensor([t[0]], dtype=torch.float32) * t[1])


def used(grid: Grid, at: Affine) -> Tensor:
    """Return the codes that stand for a level of one group, uint8 [1, L]; what is above them repeats the last."""
    count = len(grid.choices[int(at.zero)]) if isinstance(grid, TableGrid) else 2**grid.bits
    return torch.arange(count, dtype=torch.uint8)[None]


def heavy(n: int, s: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return heavy-tailed weights [n, s] and importances [s] over two decades, some 0."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(n, s, generator=draw) * torch.rand(n, s, generator=draw).pow(-0.4)
    return w, 10 ** (2 * torch.rand(s, generator=draw)) * (torch.rand(s, generator=draw) > 0.1)


def errors(grid: TableGrid, w: Tensor, weight: Tensor, at: Affine, norm: float = 2.0) -> Tensor:
    """Return the weighted error of each row, float64 [N], by brute force over the levels."""
    tables = torch.tensor([[*t, *t[-1:] * (2**grid.bits - len(t))] for t in grid.choices], dtype=torch.float64)
    levels = tables[at.zero[:, 0].long()] * at.scale.double()
    off = (w.double()[:, :, None] - levels[:, None, :]).abs().amin(2)
    return off.pow(norm) @ weight.double()
