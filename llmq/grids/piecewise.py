"""Piecewise linear grids: equally spaced levels near 0, and others, further apart, beyond a breakpoint.

Fang et al. 2020 (Post-Training Piecewise Linear Quantization, arXiv 2002.00104) with one breakpoint p. A code of b bits
has a sign, a region and the b - 2 bits of a magnitude: 2^(b-2) levels from 0 to p, and as many from p to m (`pwlq`) or
from 0 to m (`pwlq_overlapping`; those below p are of use too, since each weight goes to the nearest of all). The paper
does not count the bit of the region: what it calls 4 bits is 5 here.

0 has two signs, and p (of overlapping regions: 0 again) belongs to both regions, so that three codes in 2^b are left
over; of overlapping regions more, where levels fall on each other.

The scale of a group is m, and its zero says which of 16 breakpoints it has, in 32nds of m from 1/32 to 1/2. For each
half of a symmetric density with distribution function F the expected squared error of a region is its width's square
times its probability, on one factor, so that p is best where

    (m - p)² + m (2p - m) (2 F(p) - 1)

is least, always below m/2 if the density falls. The error is flat there: the nearest 32nd costs a percent at most.
Solved for the normal and the Laplace distribution, p is close to the closed forms below. (The paper prints them as p /
m; its code, and the minimum, say p.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from llmq.grids.scales import half_precision
from llmq.grids.search import lightest
from llmq.grids.table import TableGrid, largest, signed
from llmq.types import Affine

_PARTS = 32  # of m: the unit of breakpoints
_BREAKS = 16  # they go to m/2
_NEAR = tuple(0.965**step for step in range(-4, 9) if step)  # of the best clip: others that are tried again


def gaussian_breakpoint(m: Tensor) -> Tensor:
    """Return the best breakpoint for normal data of σ = 1 on [-m, m], to 0.013 for m from 3 to 10."""
    return (0.8614 * m + 0.6079).log()


def laplace_breakpoint(m: Tensor) -> Tensor:
    """Return the best breakpoint for Laplace data of σ = 1 on [-m, m], to a hundredth near m = 4."""
    return 0.8030 * m.sqrt() - 0.3167


_FORMS = (gaussian_breakpoint, laplace_breakpoint)


class PiecewiseGrid(TableGrid):
    """Tables by breakpoint, rising; the last one is m/2."""

    def fit(self, w: Tensor, weight: Tensor | None = None, *, norm: float = 2.0) -> Affine:
        """Return the placement for the columns `w` [N, S] of one group.

        It spans the group, and the breakpoint is that of the normal or of the Laplace distribution, whichever loses
        less. With `weight` [S] the weighted error ``Σ_j weight_j |w_j - ŵ_j|^norm`` of the row decides, and the span
        is shrunk, its breakpoint with it, as far as that lowers it; then all breakpoints are tried, then spans again.

        Raises:
            SolverError: a scale beyond what files hold, or weights that are not finite.
        """
        w = w.float()
        extreme = largest(w)
        sigma = w.square().mean(dim=1, keepdim=True).sqrt()
        full = half_precision(extreme)
        span = lightest(
            w, torch.ones(w.shape[1], device=w.device), norm, [_broken(full, sigma, at) for at in _FORMS], self.nearest
        )
        if weight is None:
            return span
        shrunk = [_broken(half_precision(extreme * factor), sigma, gaussian_breakpoint) for factor in self.rule.factors]
        best = lightest(w, weight, norm, [span, *shrunk], self.nearest)
        tables = [best._replace(zero=torch.full_like(extreme, table)) for table in range(_BREAKS)]
        best = lightest(w, weight, norm, [best, *tables], self.nearest)
        clips = [best._replace(scale=half_precision((best.scale * by).minimum(full))) for by in _NEAR]
        return lightest(w, weight, norm, [best, *clips], self.nearest)


def pwlq(bits: int, symmetric: bool = False) -> PiecewiseGrid:
    """Return the piecewise linear grid whose outer region begins at the breakpoint; one of `bits` is the region's."""
    return PiecewiseGrid("pwlq", bits, _levels(bits, False))


def pwlq_overlapping(bits: int, symmetric: bool = False) -> PiecewiseGrid:
    """Return the piecewise linear grid whose outer region begins at 0, too."""
    return PiecewiseGrid("pwlq_overlapping", bits, _levels(bits, True))


@cache
def _levels(bits: int, overlapping: bool) -> tuple[tuple[float, ...], ...]:
    """Return the levels of both regions, by breakpoint."""
    steps = 2 ** (bits - 2) - 1
    found = []
    for p in ((table + 1) / _PARTS for table in range(_BREAKS)):
        start = 0.0 if overlapping else p
        near = {p * i / steps for i in range(steps + 1)}
        far = {start + (1 - start) * i / steps for i in range(1, steps + 1)}
        found.append(signed(tuple(sorted(near | far))))
    return tuple(found)


def _broken(scale: Tensor, sigma: Tensor, closed: Callable[[Tensor], Tensor]) -> Affine:
    """Return the placement of groups with clips `scale` and standard deviations `sigma`, both [N, 1]."""
    ratio = closed(scale / sigma) * sigma / scale
    table = (ratio.nan_to_num(0.0) * _PARTS).round() - 1  # of groups of zeros sigma is 0
    return Affine(scale, table.clamp(0, _BREAKS - 1))
