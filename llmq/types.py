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
    """One group's placement on the grid: ``w = (code - zero) * scale``."""

    scale: Tensor  # float32 [N, 1]; its values are exact in the dtype that the format stores
    zero: Tensor  # float32 [N, 1], whole numbers


class Grid(Protocol):
    """Real numbers to codes and back, for the columns of one group."""

    @property
    def bits(self) -> int:
        """Bits per code."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether every zero is the middle code, so that no zeros need to be stored."""
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

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, float32 [N, K]."""
        k = self.codes.shape[1]
        scale, zero = (t.repeat_interleave(self.group_size, dim=1)[:, :k] for t in (self.scales, self.zeros))
        return self.grid.decode(self.codes, Affine(scale, zero))


@dataclass(frozen=True)
class Solution:
    """A solver's answer and what it took to get there."""

    weight: QuantizedWeight
    damp_percent: float  # the damping the factorization succeeded with; 0 where there was none
    remedies: tuple[str, ...] = ()  # rungs of the ladder (docs/how-it-works.md) that were needed, in order
