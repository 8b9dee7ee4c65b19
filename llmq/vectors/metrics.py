"""What an error in a vector costs: roots of d x d matrices, one per position."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 1e-6  # of the mean energy: what a column that never occurred in calibration still weighs


def plain(count: int, d: int, in_features: int, device: torch.device) -> Tensor:
    """Return roots [P, d, d] for which all weights count alike, and what reaches beyond the last not at all."""
    inside = torch.arange(count * d, device=device) < in_features
    return torch.diag_embed(inside.float().view(count, d))


def filled(h: Tensor, d: int, fill: float = 0.0) -> Tensor:
    """Return `h` [K, K] as [P·d, P·d]: columns that complete a vector depend on no other, and have energy `fill`."""
    k = len(h)
    size = -(-k // d) * d
    if size == k:
        return h
    found = h.new_zeros(size, size)
    found[:k, :k] = h
    found.diagonal()[k:] = fill
    return found


def blocks_of(h: Tensor, d: int) -> Tensor:
    """Return the blocks [P, d, d] on the diagonal of `h` [P·d, P·d]."""
    count = len(h) // d
    found: Tensor = h.view(count, d, count, d).diagonal(dim1=0, dim2=2)
    return found.permute(2, 0, 1).contiguous()


def block_roots(h: Tensor, d: int) -> Tensor:
    """Return roots [P, d, d] of the blocks on the diagonal of `h` [K, K], which is symmetric.

    A millionth of the mean is added to the diagonal: columns that never occurred are rounded to nearest.
    """
    blocks = blocks_of(filled(h, d), d).double()
    inside = plain(len(blocks), d, len(h), h.device).double()
    values, vectors = torch.linalg.eigh(blocks + inside * (_FLOOR * float(h.diagonal().mean())))
    roots: Tensor = vectors * values.clamp(min=0).sqrt()[:, None]
    return roots.float()
