"""The values that pass between the parts of llmq: frozen dataclasses without behaviour.

One convention holds inside llmq: ``w = (code - zero) * scale`` with `zero` in code units. What other people's
files store instead (zero minus one, interleaved nibbles, float zeros) lives in `llmq.formats` and nowhere else.

Letters: N outputs, K inputs, G groups per row, S columns of one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Affine(NamedTuple):
    """One group's placement on the grid; on the uniform one ``w = (code - zero) * scale``."""

    scale: Tensor  # float32 [N, 1]; its values are exact in the dtype that the format stores
    zero: Tensor  # float32 [N, 1], whole numbers: a code, or which of a grid's tables has the levels
    levels: Tensor | None = None  # of grids that learn them, float32, one dimension more than `scale`: [N, 1, L]


class Grid(Protocol):
    """Real numbers to codes and back, for the columns of one group.

    Levels that are not equally spaced stand in a table, ``w = tables[zero][code] * scale``, or each group has learned
    its own, ``w = levels[code]``.
    """

    @property
    def name(self) -> str:
        """Its row in `llmq.grids.GRIDS`."""
        ...

    @property
    def bits(self) -> int:
        """Bits per code."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether every zero is the same, so that no zeros need to be stored."""
        ...

    @property
    def zeros(self) -> tuple[int, int]:
        """The lowest and the highest zero; one number twice, if symmetric."""
        ...

    @property
    def tables(self) -> Tensor | None:
        """The levels by zero and code, float32 [T, 2^bits] on the CPU, or None where there are no such tables."""
        ...

    @property
    def learns(self) -> bool:
        """Whether each group has levels of its own, `Affine.levels`."""
        ...

    def adapted(self, w: Tensor) -> Grid:
        """Return the grid for a whole weight `w` [N, K], if something of it depends on all groups; else itself."""
        ...

    def fit(self, w: Tensor, weight: Tensor | None = None, *, norm: float = 2.0) -> Affine:
        """Return the placement for the columns `w` [N, S] of one group.

        Without `weight` it spans the group; with `weight` [S] it lowers ``Σ_j weight_j |w_j - ŵ_j|^norm`` of each row.
        """
        ...

    def storable(self, scale: Tensor) -> Tensor:
        """Return `scale` rounded to the nearest that files hold."""
        ...

    def encode(self, w: Tensor, at: Affine) -> Tensor:
        """Return the uint8 codes [N, S] of the level nearest to each entry of `w` [N, S]."""
        ...

    def nearest(self, w: Tensor, at: Affine) -> Tensor:
        """Return the level nearest to each entry of `w`, ``decode(encode(w, at), at)``; any shapes that broadcast."""
        ...

    def decode(self, codes: Tensor, at: Affine) -> Tensor:
        """Return the float32 values [N, S] that uint8 `codes` [N, S] stand for."""
        ...


@dataclass(frozen=True)
class QuantSpec:
    """What config.json says about a packed layer: enough to allocate it, load it and run it."""

    bits: int
    group_size: int  # columns per group; -1 means one group per row
    symmetric: bool
    format: str  # a name in llmq.formats.FORMATS
    scale_dtype: torch.dtype = torch.float16  # of the scales in the file
    grid: str = "uniform"  # a name in llmq.grids.GRIDS

    def group_columns(self, in_features: int) -> int:
        """Return the number of columns in one group of a layer with `in_features` inputs."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Return the number of groups per row, counting a short last one."""
        return -(-in_features // self.group_columns(in_features))


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid: what a solver returns, a refiner improves and a format packs."""

    codes: Tensor  # uint8 [N, K], original column order, always
    scales: Tensor  # float32 [N, G]
    zeros: Tensor  # float32 [N, G], whole numbers in code units
    grid: Grid
    group_size: int  # columns per group; the last group may be short
    levels: Tensor | None = None  # float32 [N, G, L] of a grid that learns them

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, float32 [N, K]."""
        k = self.codes.shape[1]
        if self.levels is not None:
            groups = zip(self.codes.split(self.group_size, dim=1), self.scales.T, self.zeros.T, strict=True)
            parts = [
                self.grid.decode(codes, Affine(scale[:, None], zero[:, None], self.levels[:, group, None]))
                for group, (codes, scale, zero) in enumerate(groups)
            ]
            return torch.cat(parts, dim=1)
        scale, zero = (t.repeat_interleave(self.group_size, dim=1)[:, :k] for t in (self.scales, self.zeros))
        return self.grid.decode(self.codes, Affine(scale, zero))


@dataclass(frozen=True)
class Solution:
    """A solver's answer and what it took to get there."""

    weight: QuantizedWeight
    damp_percent: float  # the damping the factorization succeeded with; 0 where there was none
    remedies: tuple[str, ...] = ()  # rungs of the ladder (docs/how-it-works.md) that were needed, in order
