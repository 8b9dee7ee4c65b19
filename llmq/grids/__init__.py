"""Grids: real numbers to codes and back.

A grid is a frozen dataclass with the methods of `llmq.types.Grid`, one file each; those whose levels stand in a table
only make one (`llmq.grids.table`). A row in `GRIDS` makes it known to recipes and puts it under the tests that every
grid must pass.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from llmq.errors import SpecError
from llmq.grids.codebook import codebook_grid
from llmq.grids.float4 import fp4, mxfp4, nf4, nvfp4
from llmq.grids.log import log
from llmq.grids.low import binary, residual_binary, ternary
from llmq.grids.piecewise import pwlq, pwlq_overlapping
from llmq.grids.powers import apot, pot
from llmq.grids.uniform import UniformGrid
from llmq.grids.vq import VECTORS, vector_bits, vector_grid
from llmq.types import Grid


class GridRow(NamedTuple):
    """One row of `GRIDS`."""

    make: Callable[[int, bool], Grid]  # of (bits, symmetric)
    bits: Sequence[int]  # of a code
    symmetric: tuple[bool, ...] = (True,)  # False: zeros are stored
    group_size: int | None = None  # the only one that there is; None: any
    scale_dtype: torch.dtype = torch.float16  # of the scales in files
    default_group_size: int = 128

    def defaults(self) -> dict[str, object]:
        """Return what a recipe with this grid has where it says nothing."""
        if True in self.symmetric and False in self.symmetric:
            return {}
        bits = 4 if 4 in self.bits else self.bits[0]
        group_size = self.group_size or self.default_group_size
        return {"bits": bits, "group_size": group_size, "sym": self.symmetric[0], "format": "llmq"}


def _vectors(name: str, bits: int, symmetric: bool) -> Grid:
    return vector_grid(name, bits)


GRIDS: dict[str, GridRow] = {
    "uniform": GridRow(UniformGrid, range(2, 9), (True, False)),
    "log": GridRow(log, range(4, 9)),
    "pot": GridRow(pot, range(3, 6)),
    "apot": GridRow(apot, range(4, 9)),
    "pwlq": GridRow(pwlq, range(3, 9), (False,)),
    "pwlq_overlapping": GridRow(pwlq_overlapping, range(4, 9), (False,)),
    "nf4": GridRow(nf4, (4,)),
    "fp4": GridRow(fp4, (4,)),
    "mxfp4": GridRow(mxfp4, (4,), group_size=32, scale_dtype=torch.float8_e8m0fnu),
    "nvfp4": GridRow(nvfp4, (4,), group_size=16, scale_dtype=torch.float8_e4m3fn),
    "ternary": GridRow(ternary, (2,)),
    "binary": GridRow(binary, (1,)),
    "residual_binary": GridRow(residual_binary, (2,), (False,)),
    "codebook": GridRow(codebook_grid, (2, 3, 4), default_group_size=-1),
}

# Grids of vectors: a layer has a codebook of its own, and solvers of their own (`llmq.solvers.vectors`).
VECTOR_GRIDS: dict[str, GridRow] = {
    name: GridRow(partial(_vectors, name), vector_bits(name), default_group_size=-1) for name in VECTORS
}

ALL_GRIDS: Mapping[str, GridRow] = ChainMap(VECTOR_GRIDS, GRIDS)  # which lists the last one first


def make_grid(name: str, bits: int, symmetric: bool) -> Grid:
    """Return the grid of row `name`.

    Raises:
        SpecError: there is no such grid, or it has none of these bits.
    """
    if name not in ALL_GRIDS:
        raise SpecError(f"grid is {name!r}; llmq has {', '.join(ALL_GRIDS)}")
    row = ALL_GRIDS[name]
    if bits not in row.bits:
        raise SpecError(f"{name} grid: bits is {bits}; use {', '.join(map(str, row.bits))}")
    if symmetric not in row.symmetric:
        raise SpecError(f"{name} grid: {'has zeros; use --asym' if symmetric else 'has no zeros; use --sym'}")
    return row.make(bits, symmetric)
