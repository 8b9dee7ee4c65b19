"""GPTQ over vectors: d columns are decided at a time, each vector where it best makes up for the errors before it.

With ``H + λI = R Rᵀ``, R upper triangular, and E the errors of the columns before block B, the loss so far grows by

    ‖ (E R)_B + (w_B - q_B) R_BB ‖² ,

since R is upper triangular: what comes later does not touch it. So each vector takes the entry c that is nearest, after
both have been multiplied by R_BB, to ``t = (E R)_B + w_B R_BB``. For d = 1 this is `llmq.solvers.sweep`'s rule. Nothing
is inverted. van Baalen et al. 2024 (GPTVQ, arXiv 2402.15319, algorithm 1) reach it through H⁻¹.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.grids.vq import VectorWeight
from llmq.vectors.codebooks import Vectors

_LEAF = 8  # vectors of a row that are decided one by one before the next matrix product


def swept(vectors: Vectors, codebook: Tensor, r: Tensor, visit: Tensor) -> Tensor:
    """Return the codes, int64 [P, N], of one sweep.

    Args:
        vectors: sub-vectors and their scales.
        codebook: entries, float32 [k, d].
        r: the factor R, float32 [P·d, P·d], of columns in the order of `visit`.
        visit: the positions of vectors as they are visited, int64 [P].
    """
    count, n, d = vectors.values.shape
    w, scales = vectors.values[visit], vectors.scales[visit]
    codes = torch.empty(count, n, dtype=torch.int64, device=w.device)
    errors = torch.zeros(count * d, n, device=w.device)
    carried = torch.zeros(count * d, n, device=w.device)  # (E R)ᵀ of the leaves before
    for start in range(0, count, _LEAF):
        stop = min(start + _LEAF, count)
        for p in range(start, stop):
            block, leaf = slice(p * d, p * d + d), slice(start * d, p * d)
            target = carried[block].T + w[p] @ r[block, block] + errors[leaf].T @ r[leaf, block]
            entries = codebook @ r[block, block]
            squares = entries.square().sum(dim=1)
            distance = torch.addmm(squares * (scales[p, :, None] / 2), target, entries.T, alpha=-1)
            codes[p] = distance.argmin(dim=1)
            errors[block] = (w[p] - scales[p, :, None] * codebook[codes[p]]).T
        done = slice(start * d, stop * d)
        carried[stop * d :].addmm_(r[done, stop * d :].T, errors[done])
    found = torch.empty_like(codes)
    found[visit] = codes
    return found


def rows_of(codes: Tensor, like: VectorWeight) -> Tensor:
    """Return codes [P, N] as a weight has them: uint8 [N, P]."""
    return codes.T.to(like.codes.dtype).contiguous()
