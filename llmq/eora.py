"""EoRA: the low-rank part of a quantization error that costs most, in closed form (arXiv 2410.21271, section 3).

A layer that got Q for W loses ``tr(E H Eᵀ)``, E = W - Q. The rank-r correction B A that leaves the least of it is the
truncated SVD of E S, H = S Sᵀ, with S divided out again. Written with the left singular vectors U alone it is
``B = U_r, A = U_rᵀ E``: the error projected onto the r directions of output space in which it is loudest. U are the
eigenvectors of ``E H Eᵀ``, so no root of H is taken, none is inverted, and a singular H needs no threshold; on inputs
that never occurred the correction is a projection of E too, never larger than E, where dividing by S could be anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import SolverError, SpecError


def eora(error: Tensor, h: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors (A [r, K], B [N, r]), float32, of the rank-r matrix nearest to `error` as `h` measures.

    What remains, ``tr((E - B A) H (E - B A)ᵀ)``, is the sum of all but the r largest eigenvalues of ``E H Eᵀ``. The
    columns of B are orthonormal and come by falling eigenvalue. Computed in float64, on the shorter side of E.

    Args:
        error: E = W - Q, [N, K].
        h: the Hessian of the layer's inputs, [K, K], symmetric positive semidefinite up to rounding, at any scale.
        rank: r, 1 <= r <= min(N, K).

    Raises:
        SpecError: the rank is out of range.
        SolverError: `error` or `h` holds NaN or infinity.
    """
    n, k = error.shape
    if not 1 <= rank <= min(n, k):
        raise SpecError(f"rank is {rank}; a layer of {n} outputs and {k} inputs takes 1 to {min(n, k)}")
    for name, tensor in (("quantization error", error), ("Hessian", h)):
        if not tensor.isfinite().all():
            raise SolverError(f"the {name} holds NaN or infinite entries")
    e, frame = error.double(), None
    if n > k:  # E = frame · e: the loudest directions lie in the span of its columns
        frame, e = torch.linalg.qr(e)
    gram = e @ h.double() @ e.T
    directions = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors[:, -rank:].flip(1)
    b = directions if frame is None else frame @ directions
    return (directions.T @ e).float(), b.float()
