"""Learned levels: each row of each group has a table of its own, ``w = levels[code]``.

The table is the one that loses least: levels c minimize ``Σ_j weight_j (w_j - c[code_j])²`` over all tables and codes
(SqueezeLLM, Kim et al. 2023, arXiv 2306.07629, has such tables, by iteration). That is k-means in one dimension, where
clusters are intervals of the sorted weights, so that dynamic programming finds the best of all (Grønlund et al. 2017,
arXiv 1701.07204). With S0 the sum of the weights of an interval and S1 that of weight times w, a level for it saves
``S1² / S0`` of what a level at 0 would lose, and the most that l of them save up to place j is

    D_l(j) = max_{i ≤ j} D_{l-1}(i) + S1(i, j)² / S0(i, j) .

Groups of more than 256 columns may be cut at 255 places only, which divide the integral of the cube root of the density
into equal parts: so lie the best levels where there are many. Then Lloyd's iteration moves each cut to any column.

Tables are rounded to those of `llmq.grids.level_bytes`. Their levels are exact in float16 and in bfloat16, and so are
the points halfway between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import SolverError
from llmq.grids.level_bytes import nearest_table
from llmq.grids.scales import check_finite
from llmq.types import Affine

_PLACES = 256  # between which cuts are searched
_LIGHT = 1e-3  # of the mean importance: between equal weights that hardly count there may be cuts, too
_POLISH = 20  # iterations at most after a search that could not cut everywhere
_ENTRIES = 2**22  # weights that are sorted together
_SAVINGS = 2**19  # savings of intervals that are held together: they stay in a core's cache


@dataclass(frozen=True)
class CodebookGrid:
    """2^bits levels anywhere, learned by each row of each group; scales are 1, zeros 0, and mean nothing."""

    bits: int

    @property
    def symmetric(self) -> bool:
        """No zeros need to be stored."""
        return True

    @property
    def name(self) -> str:
        """Its row in `llmq.grids.GRIDS`."""
        return "codebook"

    @property
    def zeros(self) -> tuple[int, int]:
        """The lowest and the highest zero."""
        return 0, 0

    @property
    def tables(self) -> None:
        """No tables that groups share."""
        return

    @property
    def learns(self) -> bool:
        """Each group has levels of its own."""
        return True

    def adapted(self, w: Tensor) -> CodebookGrid:
        """Return itself: groups know nothing of each other."""
        return self

    def fit(self, w: Tensor, weight: Tensor | None = None, *, norm: float = 2.0) -> Affine:
        """Return the levels [N, 1, L] that lose least for the columns `w` [N, S] of one group.

        They rise, and may repeat.

        Args:
            w: real weights, any float dtype.
            weight: importance of each column, [S], not negative; None: all are as important.
            norm: 2, the power that has a best level in closed form.

        Raises:
            SolverError: a weight that is not finite or larger than levels can be, or another norm.
        """
        if norm != 2:
            raise SolverError(
                f"codebook grid: search_norm is {norm:g}; levels are means, which minimize squares: use 2"
            )
        w = w.float()
        check_finite(w)
        if weight is None or not bool((weight > 0).any()):
            weight = torch.ones_like(w[0])
        rows = max(1, _ENTRIES // w.shape[1])
        levels = torch.cat([_learned(part, weight.double(), 2**self.bits) for part in w.split(rows)])
        scale = torch.ones_like(w[:, :1])
        return Affine(scale, torch.zeros_like(scale), self.storable(levels)[:, None])

    def storable(self, scale: Tensor) -> Tensor:
        """Return levels [..., L], which stand for the scale here, rounded as files hold them, as `fit` returns them.

        Raises:
            SolverError: a level is beyond what float16 holds.
        """
        return nearest_table(scale.sort(dim=-1).values)

    def encode(self, w: Tensor, at: Affine) -> Tensor:
        """Return uint8 codes of the levels nearest to `w`; ties go to the lower level. Any shapes that broadcast."""
        levels = _of(at)
        codes = torch.zeros(torch.broadcast_shapes(w.shape, levels.shape[:-1]), dtype=torch.uint8, device=w.device)
        for bound in _bounds(levels).unbind(-1):
            codes.add_(w > bound)
        return codes

    def nearest(self, w: Tensor, at: Affine) -> Tensor:
        """Return ``decode(encode(w, at), at)``, without the codes in between."""
        lowest, *higher = _of(at).unbind(-1)
        found = lowest.expand(torch.broadcast_shapes(w.shape, lowest.shape))
        for bound, level in zip(_bounds(_of(at)).unbind(-1), higher, strict=True):
            found = torch.where(w > bound, level, found)
        return found

    def decode(self, codes: Tensor, at: Affine) -> Tensor:
        """Return the float32 values of uint8 `codes`, of their shape."""
        levels = _of(at)
        return levels.expand(*codes.shape, levels.shape[-1]).gather(-1, codes.long()[..., None])[..., 0]


def codebook_grid(bits: int, symmetric: bool = True) -> CodebookGrid:
    """Return the codebook grid."""
    return CodebookGrid(bits)


def _of(at: Affine) -> Tensor:
    """Return the levels of a placement."""
    assert at.levels is not None, "its grid learns them"
    return at.levels


def _bounds(levels: Tensor) -> Tensor:
    """Return the largest number that each of `levels` [..., L] but the last is nearest to, rising [..., L - 1].

    They are exact; of levels that repeat, only the first is nearest to anything.
    """
    low, high = levels[..., :-1], levels[..., 1:]
    bounds = ((low + high) / 2).masked_fill_(low == high, torch.inf)
    return bounds.flip(-1).cummin(dim=-1).values.flip(-1)


def _learned(w: Tensor, weight: Tensor, count: int) -> Tensor:
    """Return the best `count` levels for each row of `w` float32 [N, S], not yet rounded, in any order."""
    values, order = w.sort(dim=1)
    mass = weight[order]
    center = (mass * values).sum(dim=1, keepdim=True) / mass.sum(dim=1, keepdim=True)
    s0, s1 = _sums(mass), _sums(mass * (values - center))
    places = _places(values, mass)
    cuts = _cuts(s0.gather(1, places), s1.gather(1, places), count)
    levels = _means(s0, s1, places.gather(1, cuts))
    if places.shape[1] <= values.shape[1]:
        levels = _polished(levels, values - center, s0, s1)
    return (levels + center).float()


def _sums(x: Tensor) -> Tensor:
    """Return the sums of the first 0 … S entries of each row of `x` [N, S], float64 [N, S + 1]."""
    return torch.nn.functional.pad(x.cumsum(dim=1, dtype=torch.float64), (1, 0))


def _places(values: Tensor, mass: Tensor) -> Tensor:
    """Return after how many of the rising `values` [N, S] cuts are searched, int64 [N, P + 1]: 0, then up to S."""
    n, s = values.shape
    if s <= _PLACES:
        return torch.arange(s + 1, device=values.device).expand(n, -1)
    near = (mass[:, 1:] + mass[:, :-1]).clamp_(min=_LIGHT * mass.mean(dim=1, keepdim=True))
    gaps = values.diff(dim=1).double().square_().mul_(near).pow_(1 / 3)
    steps = torch.linspace(0, 1, _PLACES + 1, dtype=torch.float64, device=values.device)[1:-1]
    whole = gaps.cumsum(dim=1)
    inner = torch.searchsorted(whole, steps * whole[:, -1:]) + 1
    ends = torch.tensor([[0, s]], device=values.device).expand(n, -1)
    return torch.cat([ends[:, :1], inner, ends[:, 1:]], dim=1)


def _cuts(s0: Tensor, s1: Tensor, count: int) -> Tensor:
    """Return the cuts that save most, int64 [N, count + 1], of places with these sums [N, P + 1] of all before them."""
    rows = max(1, _SAVINGS // s0.shape[1] ** 2)
    return torch.cat([_few_cuts(*part, count) for part in zip(s0.split(rows), s1.split(rows), strict=True)])


def _few_cuts(s0: Tensor, s1: Tensor, count: int) -> Tensor:
    """Return what `_cuts` does, of rows whose savings fit into memory."""
    n, p = s0.shape
    mass = s0[:, :, None] - s0[:, None, :]  # [N, j, i] of the interval from i to j
    saved = (s1[:, :, None] - s1[:, None, :]).square_()
    saved.div_(mass.clamp_(min=torch.finfo(torch.float64).tiny))
    future = torch.ones(p, p, dtype=torch.bool, device=s0.device).triu_(1)
    saved.masked_fill_(future, -torch.inf)
    best = [saved[:, :, 0]]
    for _ in range(count - 2):
        best.append(torch.add(saved, best[-1][:, None, :], out=mass).amax(dim=2))
    cuts = torch.zeros(n, count + 1, dtype=torch.int64, device=s0.device)
    cuts[:, count] = p - 1
    each = torch.arange(n, device=s0.device)
    for level in range(count - 1, 0, -1):
        cuts[:, level] = (saved[each, cuts[:, level + 1]] + best[level - 1]).argmax(dim=1)
    return cuts


def _means(s0: Tensor, s1: Tensor, cuts: Tensor, instead: Tensor | None = None) -> Tensor:
    """Return the means [N, L] between `cuts` [N, L + 1]; where no mass lies, `instead`, or one of the others."""
    mass = s0.gather(1, cuts).diff(dim=1)
    means = s1.gather(1, cuts).diff(dim=1) / mass
    if instead is None:
        instead = torch.where(mass > 0, means, -torch.inf).amax(dim=1, keepdim=True)
    return torch.where(mass > 0, means, instead)


def _polished(levels: Tensor, values: Tensor, s0: Tensor, s1: Tensor) -> Tensor:
    """Return `levels` [N, L] after Lloyd's iteration on rising `values` [N, S]: cut halfway, take the means."""
    ends = torch.tensor([[0, values.shape[1]]], device=values.device).expand(len(values), -1)
    before: Tensor | None = None
    for _ in range(_POLISH):
        levels = levels.sort(dim=1).values
        inner = torch.searchsorted(values, (levels[:, 1:] + levels[:, :-1]) / 2)
        cuts = torch.cat([ends[:, :1], inner, ends[:, 1:]], dim=1)
        if before is not None and torch.equal(cuts, before):
            break
        before, levels = cuts, _means(s0, s1, cuts, levels)
    return levels
