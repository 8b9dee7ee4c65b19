"""The layer Hessian ``H = 2 X Xᵀ / T`` of the squared output error, and its triangular factor.

For a linear layer ``y = W x`` the error of a row, e = w - q, costs ``e H eᵀ`` = 2 ‖e X‖² / T over T tokens X [K, T].
Solvers see H only up to scale, so the division by T changes no code; it makes losses of different runs comparable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import CalibrationError, SolverError

MAX_BAD_TOKENS = 0.01  # share of non-finite tokens above which the forward pass itself is broken
_MAX_DAMP = 1.0  # damping by the whole diagonal: the factor of any positive semidefinite H exists well before


class HessianSum:
    """Running sum of ``x xᵀ`` over valid tokens, float32 [K, K], with its token count."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0  # tokens that entered the sum
        self.dropped = 0  # tokens left out because an entry was not finite

    def add_(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Add the inputs `x` [..., K] of a layer.

        Args:
            x: activations, any float dtype; every leading dimension counts tokens.
            valid: bool, one entry per token in the order of `x`; False marks padding. None: all are valid.
        """
        x = x.detach().reshape(-1, x.shape[-1])
        if valid is not None:
            x = x[valid.reshape(-1)]
        # float32 before the product: float16 overflows at inputs of 256, bfloat16 would round every product
        x = x.float()
        finite = x.isfinite().all(dim=1)
        if not finite.all():
            self.dropped += int((~finite).sum())
            x = x[finite]
        self._sum.addmm_(x.T, x)
        self.tokens += x.shape[0]

    def mean(self, where: str) -> Tensor:
        """Return H = 2 X Xᵀ / T, float32 [K, K]; `where` names the layer in errors.

        Raises:
            CalibrationError: no token arrived, or more than 1 % of them were not finite.
        """
        seen = self.tokens + self.dropped
        if self.tokens == 0 or self.dropped > MAX_BAD_TOKENS * seen:
            raise CalibrationError(
                f"{where}: {self.dropped} of {seen} calibration tokens reach it with NaN or infinite values; "
                "run with --dtype float32 (float16 overflows on models trained in bfloat16) or check the weights"
                if seen
                else f"{where}: no calibration token reaches this layer; exclude it with --ignore"
            )
        return self._sum * (2.0 / self.tokens)


@dataclass(frozen=True)
class Factor:
    """``H + λI = R Rᵀ`` with R upper triangular, float32 [K, K], and what it took."""

    r: Tensor
    damp_percent: float
    remedies: tuple[str, ...]


def factorize(h: Tensor, damp_percent: float) -> Factor | None:
    """Return the upper factor R of the damped Hessian, climbing a bounded ladder of remedies.

    λ = `damp_percent` · mean(diag H). R comes from one Cholesky of the matrix read backwards. Scaling the diagonal to
    ones first is not needed: the error of a Cholesky factor is already relative to each channel (Higham, Accuracy and
    Stability of Numerical Algorithms, theorem 10.3). Inputs that never occur (H_jj = 0) get H_jj = 1: uncorrelated
    with everything, hence rounded to nearest. Rungs: float32, float64, then damping ten times stronger each time, up
    to 1, always on the original diagonal.

    Args:
        h: float32 [K, K], symmetric up to rounding.
        damp_percent: share of the mean diagonal, 0 < damp_percent <= 1.

    Returns:
        The factor, or None when no rung holds: `h` is not positive semidefinite.

    Raises:
        SolverError: `h` holds NaN or infinity, or `damp_percent` is out of range.
    """
    if not 0 < damp_percent <= _MAX_DAMP:
        raise SolverError(f"damp_percent is {damp_percent}; use a share of the mean diagonal above 0 and up to 1")
    if not h.isfinite().all():
        raise SolverError("the Hessian holds NaN or infinite entries")
    h = 0.5 * (h + h.T)
    diagonal = h.diagonal().clone()
    if diagonal.min() < 0:
        return None
    mean = diagonal.mean().item()
    dead = diagonal == 0
    remedies: list[str] = []
    for damp, dtype in _rungs(damp_percent):
        if dtype == torch.float64:
            remedies.append(f"float64 factorization, damping {damp:g}")
        damped = h.to(dtype)
        damped.diagonal().copy_(torch.where(dead, 1.0, diagonal).to(dtype) + damp * mean)
        r = _upper_factor(damped)
        if r is not None:
            return Factor(r.float(), damp, tuple(remedies))
    return None


def _rungs(damp_percent: float) -> list[tuple[float, torch.dtype]]:
    """Return the (damping, dtype) of each attempt, mildest first."""
    rungs = [(damp_percent, torch.float32), (damp_percent, torch.float64)]
    while damp_percent < _MAX_DAMP:
        damp_percent = min(damp_percent * 10, _MAX_DAMP)
        rungs.append((damp_percent, torch.float64))
    return rungs


def _upper_factor(h: Tensor) -> Tensor | None:
    """Return upper triangular R with ``h = R Rᵀ``, or None where h is not positive definite in its precision."""
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
    if info.item() or not lower.isfinite().all():
        return None
    return lower.flip(0, 1)
