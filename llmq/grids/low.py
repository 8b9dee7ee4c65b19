"""One and two bits a weight: `ternary`, `binary` and `residual_binary`, each placed where it loses least.

Their best scale is found exactly, so there is nothing to search; a span would be of no use, since most weights are far
from the largest. Let the magnitudes of a group be sorted, a_1 ≥ a_2 ≥ …, and ω their importances.

- *binary* (±s): every weight keeps its sign, and ``s = Σ ω a / Σ ω`` is best (Rastegari et al. 2016, XNOR-Net, arXiv
  1603.05279). 0 is not a level: a group of zeros gets the smallest scale that there is.
- *ternary* (0, ±s): the k largest are ±s, and their mean is the best s for them, which saves ``(Σ_k ω a)² / Σ_k ω`` of
  the loss; all k are compared. (Li et al. 2016, Ternary Weight Networks, arXiv 1605.04711, put the threshold at 0.7 of
  the mean.) Codes have two bits, of which the fourth is left over.
- *residual_binary* (±s ± t): a second pair of signs for what the first leaves. Magnitudes lie near s + t or s - t, so
  that the best of both are the means of the k largest and of the others; all k are compared. (The greedy way, Guo et
  al. 2017, Network Sketching, arXiv 1706.02021, fixes s first.) The scale is s + t, and the zero says ``(s - t) / (s +
  t)``, in 32nds. At 0 the inner two levels are one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.grids.scales import MIN_SCALE, Half, half_precision
from llmq.grids.search import lightest
from llmq.grids.table import TableGrid, largest
from llmq.types import Affine

_PARTS = 32  # of the outer level: the unit of the inner one


@dataclass(frozen=True)
class _NeverOne(Half):
    """Scales in float16; that of a group of zeros is as small as can be, since 0 is no level."""

    def storable(self, scale: Tensor) -> Tensor:
        """Return `scale` rounded to the nearest that files hold.

        Raises:
            SolverError: a scale beyond what float16 holds.
        """
        return half_precision(torch.where(scale == 0, MIN_SCALE, scale))


class _LeastSquares(TableGrid):
    """A grid that knows the placement of the least weighted squared error."""

    def fit(self, w: Tensor, weight: Tensor | None = None, *, norm: float = 2.0) -> Affine:
        """Return the placement for the columns `w` [N, S] of one group: that of the least squared error.

        `weight` [S] weighs it. Powers `norm` other than 2 are not solved for, but the best by them of these two
        placements, weighted and not, is taken.

        Raises:
            SolverError: a scale beyond what files hold, or weights that are not finite.
        """
        w = w.float()
        largest(w)
        equal = torch.ones(w.shape[1], device=w.device)
        plain = lightest(w, equal, 2.0, self._candidates(w, equal), self.nearest)
        if weight is None:
            return plain
        return lightest(w, weight, norm, [plain, *self._candidates(w, weight)], self.nearest)

    def _candidates(self, w: Tensor, weight: Tensor) -> Iterator[Affine]:
        """Yield placements, of which the best is the best of all."""
        raise NotImplementedError


class _Binary(_LeastSquares):
    def _candidates(self, w: Tensor, weight: Tensor) -> Iterator[Affine]:
        mean = _ratio(w.abs() @ weight, weight.sum())[:, None]
        yield Affine(self.storable(mean), torch.zeros_like(mean))


class _Ternary(_LeastSquares):
    def _candidates(self, w: Tensor, weight: Tensor) -> Iterator[Affine]:
        total, importance = _sums(w, weight)
        count = _ratio(total.square(), importance).argmax(dim=1, keepdim=True)
        scale = _ratio(total, importance).gather(1, count)
        yield Affine(self.storable(scale.float()), torch.zeros(len(w), 1, device=w.device))


class _ResidualBinary(_LeastSquares):
    def _candidates(self, w: Tensor, weight: Tensor) -> Iterator[Affine]:
        total, importance = _sums(w, weight)
        rest, others = total[:, -1:] - total, importance[:, -1:] - importance
        count = (_ratio(total.square(), importance) + _ratio(rest.square(), others)).argmax(dim=1, keepdim=True)
        total, importance, rest, others = (t.gather(1, count) for t in (total, importance, rest, others))
        outer = _ratio(total, importance)
        table = (_ratio(_ratio(rest, others), outer) * _PARTS).round()
        for move in (0, -1, 1):
            zero = (table + move).clamp(0, _PARTS - 1)
            inner = zero / _PARTS
            scale = _ratio(total + inner * rest, importance + inner.square() * others)
            yield Affine(self.storable(scale.float()), zero.float())
        mean = (total + rest) / (importance + others).clamp(min=1e-30)
        yield Affine(self.storable(mean.float()), torch.zeros_like(mean, dtype=torch.float32))


def ternary(bits: int, symmetric: bool = True) -> TableGrid:
    """Return the grid of 0 and ±s."""
    return _Ternary("ternary", bits, ((-1.0, 0.0, 1.0),))


def binary(bits: int, symmetric: bool = True) -> TableGrid:
    """Return the grid of ±s; 0 becomes s."""
    return _Binary("binary", bits, ((-1.0, 1.0),), _NeverOne(), up=(True,))


def residual_binary(bits: int, symmetric: bool = False) -> TableGrid:
    """Return the grid of ±s ± t."""
    inner = [table / _PARTS for table in range(_PARTS)]
    tables = tuple((-1.0, -own, own, 1.0) if own else (-1.0, 0.0, 1.0) for own in inner)
    return _ResidualBinary("residual_binary", bits, tables)


def _sums(w: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Σ_k ω a`` and ``Σ_k ω`` over the k largest magnitudes a of each row, k = 1 … S, float64 [N, S]."""
    magnitude, order = w.abs().double().sort(dim=1, descending=True)
    own = weight.double()[order]
    return (own * magnitude).cumsum(dim=1), own.cumsum(dim=1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a / b``, 0 where `b` is."""
    return torch.where(b > 0, a / b, 0.0)
