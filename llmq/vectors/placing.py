"""Scales of a layer on a codebook, and the codebook as files hold it.

Rows are brought to one size before a codebook is learned, so that one serves all of them: the scale of a row (or of a
group of its columns) is its root mean square over `_UNIT`. Entries are whole numbers from -127 to 127: the largest
entry lies there, or is cut off where that costs less, since the steps of all the others are smaller then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.scales import half_precision
from llmq.grids.vq import MAX_ENTRY, VectorGrid, VectorWeight, whole_vectors
from llmq.vectors.codebooks import first_codebook, learn, nearest_entries, vectors_of

_SPANS = (1.0, 0.8, 0.6, 0.45, 0.3)  # of the largest entry, that are tried as the largest that there is
_SAMPLE = 2**19  # vectors that a codebook is learned from; a strided choice of rows where there are more


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
    n, k = w.shape
    sizes = normalized(w, group_size)
    padded = whole_vectors(w, grid.columns)
    count = grid.codes_in(k)
    every = -(-n * count // _SAMPLE)
    unit = vectors_of(padded[::every], per_vector(sizes, grid, group_size, count)[::every], roots)
    codebook, _ = learn(unit, first_codebook(unit, grid.entries))
    best: VectorWeight | None = None
    least = float("inf")
    for span in _SPANS:
        step = codebook.abs().max() * span / MAX_ENTRY
        if not step > 0:
            step = torch.ones_like(step)
        scales = half_precision(sizes * step)
        entries = (codebook / step).round().clamp(-MAX_ENTRY, MAX_ENTRY)
        vectors = vectors_of(padded, per_vector(scales, grid, group_size, count), roots)
        codes, costs = nearest_entries(vectors, entries)
        cost = float(costs.double().sum())
        if cost < least:
            least = cost
            stored = codes.T.to(torch.uint8).contiguous()
            zeros = torch.zeros_like(scales)
            best = VectorWeight(stored, scales, zeros, grid, group_size, codebook=entries, in_features=k)
    assert best is not None, "costs are finite"
    return best
