"""The layer Hessian ``H = 2 X Xᵀ / T`` of the squared output error, and its triangular factor.

For a linear layer ``y = W x`` the error of a row, e = w - q, costs ``e H eᵀ`` = 2 ‖e X‖² / T over T tokens X [K, T].
Solvers see H only up to scale, so the division by T changes no code; it makes losses of different runs comparable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import CalibrationError, SolverError

MAX_BAD_TOKENS = 0.01  # share of non-finite tokens above which the forward pass itself is broken
_MAX_DAMP = 1.0  # damping by the whole diagonal: the factor of any positive semidefinite H exists well before


class HessianSum:
    """Running sums over tokens of ``g x xᵀ`` and, if `paired`, of ``g (x_ref - x) xᵀ``, float32 [K, K]; all g >= 0.

    `x_ref` is the input that the same token has in the original model: the second sum is what asymmetric calibration
    (GPTAQ, arXiv 2504.02692) shifts the weights by. Both sums run over the same tokens.
    """

    def __init__(self, in_features: int, device: torch.device, *, paired: bool = False) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self._cross = torch.zeros_like(self._sum) if paired else None
        self._weight = 0.0  # Σ g, in float64: exact for the count of unweighted tokens
        self.tokens = 0  # tokens that entered the sums
        self.dropped = 0  # tokens left out because an entry was not finite

    def add_(
        self, x: Tensor, valid: Tensor | None = None, weights: Tensor | None = None, reference: Tensor | None = None
    ) -> None:
        """Add the inputs `x` [..., K] of a layer; a token that is not finite, here or there, is in neither sum.

        Args:
            x: activations, any float dtype; every leading dimension counts tokens.
            valid: bool, one entry per token in the order of `x`; False marks padding. None: all are valid.
            weights: g, float, one entry per token in the order of `x`; a token of weight 0 does not count at all.
                None: all weigh 1.
            reference: the inputs of the same tokens in the original model, as `x`; given always or, unpaired, never.

        Raises:
            CalibrationError: a weight is negative or not finite.
        """
        assert (reference is None) == (self._cross is None), "a paired sum takes a reference with every batch"
        x = x.detach().reshape(-1, x.shape[-1])
        reference = None if reference is None else reference.detach().reshape(x.shape)
        g = None if weights is None else _checked(weights.detach().reshape(-1))
        keep = None if valid is None else valid.reshape(-1)
        if g is not None:
            keep = g > 0 if keep is None else keep & (g > 0)
        if keep is not None:
            x, reference, g = _rows(keep, x, reference, g)
        # float32 before the product: float16 overflows at inputs of 256, bfloat16 would round every product
        x = x.float()
        shift = None if reference is None else reference.float() - x
        finite = x.isfinite().all(dim=1)
        if shift is not None:
            finite &= shift.isfinite().all(dim=1)
        if not finite.all():
            self.dropped += int((~finite).sum())
            x, shift, g = _rows(finite, x, shift, g)
        self.tokens += x.shape[0]
        self._weight += x.shape[0] if g is None else float(g.double().sum())
        if g is not None:  # half of each weight on either side keeps the sum symmetric and positive semidefinite
            root = g.float().sqrt()[:, None]
            x = x * root
            shift = None if shift is None else shift * root
        self._sum.addmm_(x.T, x)
        if self._cross is not None and shift is not None:
            self._cross.addmm_(shift.T, x)

    def absorb_(self, other: HessianSum) -> None:
        """Add the sums and counts of `other`, of the same shape, whose memory is used."""
        if self._weight == 0 and self.dropped == 0:  # 0 + x is x
            self._sum, self._cross = other._sum, other._cross
        else:
            self._sum.add_(other._sum)
            if self._cross is not None and other._cross is not None:
                self._cross.add_(other._cross)
        self._weight += other._weight
        self.tokens += other.tokens
        self.dropped += other.dropped

    def blend_(self, other: HessianSum, tokens: float) -> None:
        """Add the moments of `other`, of the same shape, as if its mean token had come `tokens` times.

        ``H ← (N H + κ H_other) / (N + κ)`` with κ = `tokens`, in units of this sum's mean weight: an estimate of few
        tokens is shrunk towards one of many. The tokens counted stay those of this sum.
        """
        if other._weight == 0:
            return
        unit = self._weight / self.tokens if self.tokens else 1.0
        share = tokens * unit / other._weight
        self._sum.add_(other._sum, alpha=share)
        if self._cross is not None and other._cross is not None:
            self._cross.add_(other._cross, alpha=share)
        self._weight += tokens * unit

    def mean(self, where: str) -> Tensor:
        """Return H = 2 Σ g x xᵀ / Σ g, float32 [K, K]; `where` names the layer in errors.

        Raises:
            CalibrationError: no token arrived, or more than 1 % of them were not finite.
        """
        return self._sum * self._scale(where)

    def cross(self, where: str) -> Tensor:
        """Return D = 2 Σ g (x_ref - x) xᵀ / Σ g, float32 [K, K], of a paired sum; errors as for `mean`."""
        assert self._cross is not None, "only a paired sum has a cross term"
        return self._cross * self._scale(where)

    def state(self) -> tuple[Tensor, dict[str, float]]:
        """Return the sum, float32 [K, K], and the counts that go with it; of a sum that is not paired."""
        assert self._cross is None, "pairs are of one quantized model"
        return self._sum, {"weight": self._weight, "tokens": self.tokens, "dropped": self.dropped}

    @classmethod
    def of_state(cls, total: Tensor, counts: Mapping[str, float]) -> HessianSum:
        """Return the sum whose `state` this was."""
        found = cls(len(total), total.device)
        found._sum, found._weight = total, counts["weight"]
        found.tokens, found.dropped = int(counts["tokens"]), int(counts["dropped"])
        return found

    def _scale(self, where: str) -> float:
        """Return 2 / Σ g once the tokens are enough and sound."""
        seen = self.tokens + self.dropped
        if self._weight == 0 or self.dropped > MAX_BAD_TOKENS * seen:
            raise CalibrationError(
                f"{where}: {self.dropped} of {seen} calibration tokens reach it with NaN or infinite values; "
                "run with --dtype float32 (float16 overflows on models trained in bfloat16) or check the weights"
                if seen
                else f"{where}: no calibration token reaches this layer; exclude it with --ignore"
            )
        return 2.0 / self._weight


def _checked(weights: Tensor) -> Tensor:
    """Return `weights` if all are finite and none is negative."""
    if not ((weights >= 0) & weights.isfinite()).all():
        bad = weights[~((weights >= 0) & weights.isfinite())]
        raise CalibrationError(
            f"{bad.numel()} of {weights.numel()} token weights are negative or not finite (first {bad[0].item():g}); "
            "use numbers from 0 up"
        )
    return weights


def _rows(keep: Tensor, x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the entries of each tensor at which the bool `keep` [T] holds; None stays None."""
    first, second = (None if other is None else other[keep] for other in others)
    return x[keep], first, second


@dataclass(frozen=True)
class Factor:
    """``H + λI = R Rᵀ`` with R upper triangular, float32 [K, K], and what it took."""

    r: Tensor
    damp_percent: float
    remedies: tuple[str, ...]


def symmetric(h: Tensor) -> Tensor:
    """Return ``(H + Hᵀ) / 2`` of `h` float32 [K, K], in new memory.

    Raises:
        SolverError: `h` holds NaN or infinity.
    """
    if not all_finite(h):
        raise SolverError("the Hessian holds NaN or infinite entries")
    return (h + h.T.contiguous()).mul_(0.5)  # reading h by columns would take three times as long


def all_finite(x: Tensor) -> bool:
    """Return whether `x` holds no NaN or infinity, which a finite sum shows without a second tensor of its size."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def damped(h: Tensor, damp_percent: float, dtype: torch.dtype) -> Tensor:
    """Return ``H + λI`` of the symmetric `h` [K, K] in `dtype`, in new memory; λ = `damp_percent` · mean(diag H).

    Inputs that never occur (H_jj = 0) get H_jj = 1: uncorrelated with everything, hence rounded to nearest.
    """
    diagonal = h.diagonal()
    result = h.to(dtype, copy=True)
    shift = damp_percent * diagonal.mean().item()
    result.diagonal().copy_(torch.where(diagonal == 0, 1.0, diagonal).to(dtype) + shift)
    return result


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
    h = symmetric(h)
    if h.diagonal().min() < 0:
        return None
    remedies: list[str] = []
    for damp, dtype in _rungs(damp_percent):
        if dtype == torch.float64:
            remedies.append(f"float64 factorization, damping {damp:g}")
        r = _upper_factor(damped(h, damp, dtype))
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
    if info.item() or not all_finite(lower):
        return None
    return lower.flip(0, 1)
