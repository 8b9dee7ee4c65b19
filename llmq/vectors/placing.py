"""Scales of a layer on a codebook, and the codebook as files hold it.

Rows are brought to one size before a codebook is learned, so that one serves all of them: the scale of a row (or of a
group of its columns) is its root mean square. That is only a guess. Once there is a codebook, each scale takes the
factor under which its vectors cost least, each on the entry that is then the best, and learning goes on. Most of it is
done on some rows: they show where entries belong.

Entries are whole numbers from -127 to 127: the largest entry lies there, or is cut off where that costs less, since the
steps of all the others are smaller then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmq.grids.scales import half_precision
from llmq.grids.vq import MAX_ENTRY, VectorGrid, VectorWeight, whole_vectors
from llmq.vectors.codebooks import Vectors, first_codebook, learn, least_costs, nearest_entries, vectors_of

_SPANS = (1.0, 0.8, 0.6, 0.45, 0.3)  # of the largest entry, that are tried as the largest that there is
_FACTORS = (1.0, 0.85, 0.93, 1.08, 1.2)  # of a scale, that are tried; the first of equals stays
_FEW = 2**14  # vectors from which a codebook is learned first: 64 for each of 256 entries
_SAMPLE = 2**19  # vectors from which it is learned last; both a strided choice of rows where there are more
_ROUNDS, _ITERATIONS = 3, 15  # of learning and trying scales with few vectors, and of each learning
_LAST_ROUNDS, _LAST_ITERATIONS = 2, 5  # the same with many: entries are near their places then


@dataclass(frozen=True)
class Rows:
    """Rows of a weight, and what errors in them cost."""

    w: Tensor  # float32 [N, P·d]
    roots: Tensor  # float32 [P, d, d]
    grid: VectorGrid
    group_size: int

    def some(self, every: int) -> Rows:
        """Return each row of so many."""
        return replace(self, w=self.w[::every])

    def vectors(self, scales: Tensor) -> Vectors:
        """Return their vectors at `scales` [N, G]."""
        return vectors_of(self.w, per_vector(scales, self.grid, self.group_size, len(self.roots)), self.roots)


def normalized(w: Tensor, group_size: int) -> Tensor:
    """Return the root mean square of each group of the rows of `w` [N, K], float32 [N, G]; of a zero group 1."""
    parts = [part.square().mean(dim=1).sqrt() for part in w.split(group_size, dim=1)]
    sizes = torch.stack(parts, dim=1)
    return torch.where(sizes > 0, sizes, 1.0)


def per_vector(scales: Tensor, grid: VectorGrid, group_size: int, count: int) -> Tensor:
    """Return for `scales` [N, G] the scale of each of a row's `count` vectors, [N, P]."""
    if scales.shape[1] == 1:
        return scales.expand(-1, count)
    return scales.repeat_interleave(group_size // grid.columns, dim=1)[:, :count]


def placed(w: Tensor, grid: VectorGrid, group_size: int, roots: Tensor) -> VectorWeight:
    """Return `w` on a codebook learned for it, each vector on the entry that costs least.

    Args:
        w: weights, float32 [N, K].
        grid: how many entries there are, and of what size.
        group_size: columns per scale, a multiple of d or K.
        roots: float32 [P, d, d], root rootᵀ is what errors in the vectors of a position cost.
    """
    rows = Rows(whole_vectors(w, grid.columns), roots, grid, group_size)
    sizes, codebook = _learned(rows, normalized(w, group_size))
    best: tuple[Tensor, Tensor] | None = None
    least = float("inf")
    for span in _SPANS:
        step = codebook.abs().max() * span / MAX_ENTRY
        if not step > 0:
            step = torch.ones_like(step)
        scales = half_precision(sizes * step)
        entries = (codebook / step).round().clamp(-MAX_ENTRY, MAX_ENTRY)
        cost = float(least_costs(rows.vectors(scales), entries).double().sum())
        if cost < least:
            least, best = cost, (scales, entries)
    assert best is not None, "costs are finite"
    scales, entries = best
    codes = nearest_entries(rows.vectors(scales), entries)[0].T.to(torch.uint8).contiguous()
    zeros, k = torch.zeros_like(scales), w.shape[1]
    return VectorWeight(codes, scales, zeros, grid, group_size, codebook=entries, in_features=k)


def _learned(rows: Rows, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales [N, G] that are better than `sizes`, and the codebook [k, d] for them."""
    vectors = len(sizes) * len(rows.roots)
    every = max(1, vectors // _FEW)
    few, own = rows.some(every), sizes[::every]
    codebook = first_codebook(few.vectors(own), rows.grid.entries)
    for _ in range(_ROUNDS):
        codebook, _ = learn(few.vectors(own), codebook, _ITERATIONS)
        own = fitted(few, own, codebook)
    sizes = sizes.clone()
    sizes[::every] = own
    every = -(-vectors // _SAMPLE)
    many = rows.some(every)
    for _ in range(_LAST_ROUNDS):
        sizes = fitted(rows, sizes, codebook)
        codebook, _ = learn(many.vectors(sizes[::every]), codebook, _LAST_ITERATIONS)
    return sizes, codebook


def fitted(rows: Rows, sizes: Tensor, codebook: Tensor) -> Tensor:
    """Return `sizes` [N, G], each times that of `_FACTORS` under which the vectors of its group cost least."""
    count, groups = len(rows.roots), sizes.shape[1]
    own = rows.group_size // rows.grid.columns if groups > 1 else count  # vectors of a group
    best, least = sizes, torch.full_like(sizes, torch.inf, dtype=torch.float64)
    for factor in _FACTORS:
        tried = sizes * factor
        costs = least_costs(rows.vectors(tried), codebook).T.double()
        total = pad(costs, (0, groups * own - count)).view(len(sizes), groups, own).sum(dim=2)
        best = torch.where(total < least, tried, best)
        least = torch.minimum(total, least)
    return best
