"""The weights that a solver should aim at when the inputs of a layer are already off: the exact shift.

Let X be the inputs in the quantized model and X_fp those in the original one. Completing the square,
``‖W X_fp - Q X‖² = ‖(W* - Q) X‖² + const`` with ``W* = W + W D H⁻¹``, where D = (X_fp - X) Xᵀ and H = X Xᵀ: to answer
for the errors in front of a layer is to quantize other weights with the same H, by any solver. With few tokens the
least-squares answer overfits; α < 1 takes part of it, and damping holds it near W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import SolverError
from llmq.hessian import all_finite, cholesky_, damp_, symmetric

_PARTS = 16  # in which the cross moment is turned to float64


def shifted(w: Tensor, h: Tensor, cross: Tensor, *, alpha: float, damp_percent: float) -> Tensor:
    """Return ``W + α W D (H + λI)⁻¹``, float32 [N, K].

    Args:
        w: weights [N, K], any float dtype.
        h: Hessian ``2 X Xᵀ / T`` of the inputs X [K, T] in the quantized model, [K, K].
        cross: D on the same scale, ``2 (X_fp - X) Xᵀ / T`` [K, K]; not symmetric.
        alpha: share of the shift; 0 returns `w`, 1 the least-squares answer.
        damp_percent: λ as a share of the mean diagonal of `h`; 0 is legal where `h` is positive definite.

    Raises:
        SolverError: `h` or `cross` holds NaN or infinity, or the damped `h` is not positive definite.
    """
    if not all_finite(cross):
        raise SolverError("the cross moment holds NaN or infinite entries")
    # its memory is all of this size that is held: cross moments are turned to float64 in parts
    lower = cholesky_(damp_(symmetric(h, torch.float64), damp_percent).T)
    if lower is None:
        raise SolverError(
            f"the Hessian is not positive definite at damping {damp_percent:g}, so that no shift can be computed; "
            "damp it more, or calibrate with more tokens"
        )
    wide = w.double()
    pull = torch.cat([wide @ part.double() for part in cross.chunk(_PARTS, dim=1)], dim=1)
    moved = torch.cholesky_solve(pull.T, lower).T
    return moved.mul_(alpha).add_(wide).float()
