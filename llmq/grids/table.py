"""Grids whose levels stand in tables: ``w = tables[zero][code] * scale``, levels rising with the codes.

Whatever spaces levels unequally by a formula (logarithms, powers of two, small floats) is a table of them and a rule
for its scales; the files beside this one make them. Where groups differ in more than a scale, there are several tables
and the zero of a group says which is its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite

import torch
from torch import Tensor

from llmq.grids.rank import rank
from llmq.grids.scales import Half, ScaleRule, check_finite
from llmq.grids.search import lightest
from llmq.types import Affine


@dataclass(frozen=True)
class TableGrid:
    """Up to 2^bits levels in any places, scaled per group; with several tables, each group picks one."""

    name: str
    bits: int
    choices: tuple[tuple[float, ...], ...]  # tables, each rising; of several, each goes from -1 to 1
    rule: ScaleRule = Half()  # noqa: RUF009  it has no state
    up: tuple[bool, ...] | None = None  # whether a tie between levels i and i + 1 goes to i + 1; None: towards 0

    @property
    def symmetric(self) -> bool:
        """Whether there is one table, so that no zeros need to be stored."""
        return len(self.choices) == 1

    @property
    def zeros(self) -> tuple[int, int]:
        """The first and the last table."""
        return 0, len(self.choices) - 1

    @property
    def learns(self) -> bool:
        """Levels are not learned."""
        return False

    @property
    def top(self) -> float:
        """The largest magnitude in the tables."""
        return max(abs(level) for levels in self.choices for level in (levels[0], levels[-1]))

    @cached_property
    def tables(self) -> Tensor:
        """The levels by table and code, float32 [T, 2^bits]; the last one fills what no code stands for."""
        full = [(*levels, *levels[-1:] * (2**self.bits - len(levels))) for levels in self.choices]
        return torch.tensor(full, dtype=torch.float64, device="cpu").float()  # whatever the default device is

    @cached_property
    def bounds(self) -> Tensor:
        """The largest number that each level but the last is nearest to, float32 [T, B], padded with infinity."""
        found = torch.full((len(self.choices), max(map(len, self.choices)) - 1), torch.inf, device="cpu")
        for row, levels in zip(found, self.choices, strict=True):
            exact = torch.tensor(levels, dtype=torch.float64, device="cpu")
            middle = ((exact[1:] + exact[:-1]) / 2).float()
            up = middle < 0 if self.up is None else torch.tensor(self.up, device="cpu")
            row[: len(middle)] = torch.where(up, torch.nextafter(middle, torch.full_like(middle, -torch.inf)), middle)
        return found

    def adapted(self, w: Tensor) -> TableGrid:
        """Return the grid for a whole weight `w` [N, K], if its scales depend on all groups; else itself."""
        extreme = float(w.abs().max())
        rule = self.rule.adapted(extreme, self.top) if isfinite(extreme) else self.rule
        return self if rule is self.rule else replace(self, rule=rule)

    def fit(self, w: Tensor, weight: Tensor | None = None, *, norm: float = 2.0) -> Affine:
        """Return the placement for the columns `w` [N, S] of one group.

        The rule puts its outermost level near the largest magnitude, unless `weight` [S] is given: then it is moved as
        far as that lowers the weighted error ``Σ_j weight_j |w_j - ŵ_j|^norm`` of the row.

        Raises:
            SolverError: a scale beyond what files hold, or weights that are not finite.
        """
        w = w.float()
        extreme = largest(w)
        zero = torch.zeros_like(extreme)
        if weight is None:
            return Affine(self.rule.spanning(extreme, self.top), zero)
        tried = (Affine(self.rule.spanning(extreme * factor, self.top), zero) for factor in self.rule.factors)
        return lightest(w, weight, norm, tried, self.nearest)

    def storable(self, scale: Tensor) -> Tensor:
        """Return `scale` rounded to the nearest that files hold."""
        return self.rule.storable(scale)

    def encode(self, w: Tensor, at: Affine) -> Tensor:
        """Return uint8 codes [N, S] of the levels nearest to `w` [N, S]."""
        return self._places(w, at).to(torch.uint8)

    def nearest(self, w: Tensor, at: Affine) -> Tensor:
        """Return the level nearest to each entry of `w`, float32 of the shape that it and `at` broadcast to."""
        return self._levels(self._places(w, at), at).mul_(at.scale)

    def decode(self, codes: Tensor, at: Affine) -> Tensor:
        """Return the float32 values [N, S] of uint8 `codes` [N, S]."""
        return self._levels(codes.int(), at).mul_(at.scale)

    def _places(self, w: Tensor, at: Affine) -> Tensor:
        return rank((w / at.scale).float(), self.bounds, None if self.symmetric else at.zero)

    def _levels(self, codes: Tensor, at: Affine) -> Tensor:
        """Return the levels of int32 `codes`, not scaled."""
        places = codes if self.symmetric else codes + (at.zero * 2**self.bits).int()
        return self.tables.to(codes.device).flatten().index_select(0, places.reshape(-1)).view(places.shape)


def largest(w: Tensor) -> Tensor:
    """Return the largest magnitude of each row of float32 `w` [N, S], [N, 1].

    Raises:
        SolverError: `w` is not finite.
    """
    extreme = w.abs().amax(dim=1, keepdim=True)
    check_finite(extreme)
    return extreme


def signed(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    """Return rising `magnitudes`, of which the first is 0, and their negatives, rising."""
    return (*(-level for level in reversed(magnitudes[1:])), *magnitudes)
