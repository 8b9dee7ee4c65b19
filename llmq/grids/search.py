"""The best of several placements of a group, for grids that have no faster way."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from llmq.types import Affine


def lightest(
    w: Tensor, weight: Tensor, norm: float, tried: Iterable[Affine], nearest: Callable[[Tensor, Affine], Tensor]
) -> Affine:
    """Return, row by row, the first of the placements that loses least.

    Args:
        w: columns of one group, float32 [N, S].
        weight: importance of each column, [S], not negative.
        norm: the loss of a row is ``Σ_j weight_j |w_j - ŵ_j|^norm``.
        tried: placements of all rows, [N, 1] each; at least one.
        nearest: `Grid.nearest`.
    """
    best: Affine | None = None
    least = torch.full((len(w), 1), torch.inf, device=w.device)
    for at in tried:
        error = nearest(w, at).sub_(w)
        powers = error.square_() if norm == 2 else error.abs_().pow_(norm)
        loss = (powers @ weight)[:, None]
        better = loss < least
        if best is None:
            best = at
        else:
            best = Affine(torch.where(better, at.scale, best.scale), torch.where(better, at.zero, best.zero))
        least = torch.where(better, loss, least)
    assert best is not None, "there is at least one"
    return best
