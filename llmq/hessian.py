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
_STRIPS = 8  # of rows, in which a symmetric product is taken; more save little, and products get too narrow
_TILES = 16, 512  # rows and columns at least and at most that are looked at together where a matrix is read across


class HessianSum:
    """Running sums over tokens of ``g x xᵀ`` and, if `paired`, of ``g (x_ref - x) xᵀ``, float32 [K, K]; all g >= 0.

    `x_ref` is the input that the same token has in the original model: the second sum is what asymmetric calibration
    (GPTAQ, arXiv 2504.02692) shifts the weights by. Both sums run over the same tokens.

    The first one is symmetric. It is summed in strips of rows, each from its first diagonal entry on, in little more
    than half the time, and what is to the left of them is filled in when it is asked for. There is no memory for sums
    before there is a token.
    """

    def __init__(self, in_features: int, device: torch.device, *, paired: bool = False) -> None:
        self._size = in_features
        self._device = device
        self._paired = paired
        self._sum: Tensor | None = None  # right of the diagonal; whole and scaled once `_closed`
        self._cross: Tensor | None = None
        self._closed = False  # whether what was asked for is on its way, so that nothing can be added
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
        assert (reference is None) != self._paired, "a paired sum takes a reference with every batch"
        assert not self._closed, "what has been handed out stays as it is"
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
        # in place, but never in the caller's memory
        shift = None if reference is None else reference.to(torch.float32, copy=True).sub_(x)
        if not all_finite(x if shift is None else shift):  # a difference is finite where both of its terms are
            finite = (x if shift is None else shift).isfinite().all(dim=1)
            self.dropped += int((~finite).sum())
            x, shift, g = _rows(finite, x, shift, g)
        self.tokens += x.shape[0]
        self._weight += x.shape[0] if g is None else float(g.double().sum())
        if g is not None:  # half of each weight on either side keeps the sum symmetric and positive semidefinite
            root = g.float().sqrt()[:, None]
            x = x * root
            shift = None if shift is None else shift.mul_(root)
        self._begin()
        assert self._sum is not None, "it has begun"
        for strip in _strips(self._size):
            self._sum[strip, strip.start :].addmm_(x[:, strip].T, x[:, strip.start :])
        if self._cross is not None and shift is not None:
            self._cross.addmm_(shift.T, x)

    def absorb_(self, other: HessianSum) -> None:
        """Add the sums and counts of `other`, of the same shape, whose memory is used."""
        self._join_(other, 1.0)
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
        self._begin()
        self._join_(other, tokens * unit / other._weight)
        self._weight += tokens * unit

    def mean(self, where: str) -> Tensor:
        """Return H = 2 Σ g x xᵀ / Σ g, float32 [K, K]; `where` names the layer in errors.

        It is the memory of the sum, to be read only, and nothing can be added any more.

        Raises:
            CalibrationError: no token arrived, or more than 1 % of them were not finite.
        """
        self._close(where)
        assert self._sum is not None, "there are tokens"
        return self._sum

    def cross(self, where: str) -> Tensor:
        """Return D = 2 Σ g (x_ref - x) xᵀ / Σ g, float32 [K, K], of a paired sum; else as `mean`."""
        self._close(where)
        assert self._cross is not None, "only a paired sum has a cross term"
        return self._cross

    def drop_cross(self) -> None:
        """Give the memory of D back."""
        self._cross = None

    def state(self) -> tuple[Tensor, dict[str, float]]:
        """Return the sum, float32 [K, K], and the counts that go with it; of a sum that is not paired."""
        assert not self._paired, "pairs are of one quantized model"
        assert not self._closed, "sums are kept as they are"
        self._begin()
        assert self._sum is not None, "it has begun"
        _mirror_(self._sum)
        return self._sum, {"weight": self._weight, "tokens": self.tokens, "dropped": self.dropped}

    @classmethod
    def of_state(cls, total: Tensor, counts: Mapping[str, float]) -> HessianSum:
        """Return the sum whose `state` this was."""
        found = cls(len(total), total.device)
        found._sum, found._weight = total, counts["weight"]
        found.tokens, found.dropped = int(counts["tokens"]), int(counts["dropped"])
        return found

    def _begin(self) -> None:
        """Make room for the sums."""
        if self._sum is None:
            self._sum = torch.zeros(self._size, self._size, device=self._device)
            self._cross = torch.zeros_like(self._sum) if self._paired else None

    def _join_(self, other: HessianSum, factor: float) -> None:
        """Add `factor` times the sums of `other`."""
        for total in (self, other):
            assert not total._closed, "what has been handed out stays as it is"
        if other._sum is None:
            return
        if self._sum is None:  # 0 + x is x
            assert factor == 1.0, "it has begun"
            self._sum, self._cross = other._sum, other._cross
            return
        for strip in _strips(self._size):
            self._sum[strip, strip.start :].add_(other._sum[strip, strip.start :], alpha=factor)
        if self._cross is not None and other._cross is not None:
            self._cross.add_(other._cross, alpha=factor)

    def _close(self, where: str) -> None:
        """Turn the sums into means, once they are enough and sound."""
        scale = self._scale(where)
        if self._closed:
            return
        assert self._sum is not None, "there are tokens"
        _mirror_(self._sum)
        self._sum.mul_(scale)
        if self._cross is not None:
            self._cross.mul_(scale)
        self._closed = True

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


def _strips(k: int) -> list[slice]:
    """Return the rows of each strip of a sum over `k` inputs."""
    return _slices(k, -(-k // _STRIPS))


def _tiles(k: int) -> list[slice]:
    """Return the rows of each tile of a matrix of `k`; what a tile takes besides is little next to the matrix."""
    least, most = _TILES
    return _slices(k, max(least, min(most, k // 8)))


def _slices(size: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def _mirror_(h: Tensor) -> None:
    """Let what is below the diagonal of `h` [K, K] equal what is above it."""
    tiles = _tiles(len(h))
    for i, rows in enumerate(tiles):
        upper = h[rows, rows].triu()
        h[rows, rows] = upper + upper.triu(1).T
        for columns in tiles[i + 1 :]:
            h[columns, rows] = h[rows, columns].T


@dataclass(frozen=True)
class Factor:
    """``H + λI = R Rᵀ`` with R upper triangular, float32 [K, K], and what it took."""

    r: Tensor
    damp_percent: float
    remedies: tuple[str, ...]


def checked(h: Tensor) -> Tensor:
    """Return `h`.

    Raises:
        SolverError: it holds NaN or infinity.
    """
    if not all_finite(h):
        raise SolverError("the Hessian holds NaN or infinite entries")
    return h


def symmetric(h: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``(H + Hᵀ) / 2`` of `h` [K, K] in `dtype`, in new memory; errors as for `checked`."""
    result = checked(h).to(dtype, copy=True)
    _average_(result)
    _mirror_(result)
    return result


def all_finite(x: Tensor) -> bool:
    """Return whether `x` holds no NaN or infinity, which a finite sum shows without a second tensor of its size."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def damped(h: Tensor, damp_percent: float, dtype: torch.dtype) -> Tensor:
    """Return ``H + λI`` of the symmetric `h` [K, K] in `dtype`, in new memory; λ = `damp_percent` · mean(diag H).

    Inputs that never occur (H_jj = 0) get H_jj = 1: uncorrelated with everything, hence rounded to nearest.
    """
    return damp_(h.to(dtype, copy=True), damp_percent)


def damp_(h: Tensor, damp_percent: float) -> Tensor:
    """Do to `h` what `damped` does, and return it."""
    diagonal = h.diagonal()
    shift = damp_percent * diagonal.mean().item()
    diagonal.copy_(torch.where(diagonal == 0, 1.0, diagonal) + shift)
    return h


def factorize(h: Tensor, damp_percent: float, order: Tensor | None = None) -> Factor | None:
    """Return the upper factor R of the damped Hessian, climbing a bounded ladder of remedies.

    λ = `damp_percent` · mean(diag H). R comes from one Cholesky of the matrix read backwards. Scaling the diagonal to
    ones first is not needed: the error of a Cholesky factor is already relative to each channel (Higham, Accuracy and
    Stability of Numerical Algorithms, theorem 10.3). Inputs that never occur (H_jj = 0) get H_jj = 1: uncorrelated
    with everything, hence rounded to nearest. Rungs: float32, float64, then damping ten times stronger each time, up
    to 1, always on the original diagonal. A float32 rung holds no second matrix.

    Args:
        h: float32 [K, K], symmetric up to rounding.
        damp_percent: share of the mean diagonal, 0 < damp_percent <= 1.
        order: int64 [K], for the factor of ``h[order][:, order]``; None: as it is.

    Returns:
        The factor, or None when no rung holds: `h` is not positive semidefinite.

    Raises:
        SolverError: `h` holds NaN or infinity, or `damp_percent` is out of range.
    """
    if not 0 < damp_percent <= _MAX_DAMP:
        raise SolverError(f"damp_percent is {damp_percent}; use a share of the mean diagonal above 0 and up to 1")
    if checked(h).diagonal().min() < 0:
        return None
    order = torch.arange(len(h), device=h.device) if order is None else order
    remedies: list[str] = []
    for damp, dtype in _rungs(damp_percent):
        if dtype == torch.float64:
            remedies.append(f"float64 factorization, damping {damp:g}")
        r = _upper_factor_(damp_(_backwards(h, order, dtype), damp))
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


def _backwards(h: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``h[order][:, order]`` with both axes reversed, in `dtype`; of meaning on and above the diagonal only."""
    result = torch.empty(h.shape, dtype=dtype, device=h.device)
    order = order.flip(0)
    for rows in _tiles(len(h)):
        result[rows] = h.index_select(0, order[rows]).index_select(1, order)
    _average_(result)
    return result


def _upper_factor_(h: Tensor) -> Tensor | None:
    """Return upper triangular R with ``R Rᵀ`` = `h` with both axes reversed; None where `h` is not positive definite.

    What is above the diagonal of `h`, contiguous [K, K], is read, and its memory is the factor's.
    """
    lower = cholesky_(h.T)
    if lower is None or not all_finite(lower):
        return None
    _turn_(h)
    return h.T


def cholesky_(h: Tensor) -> Tensor | None:
    """Return the lower Cholesky factor of `h` [K, K], column-major, in its memory; None where there is none.

    Only what is on and below the diagonal of `h` is read.
    """
    info = torch.empty((), dtype=torch.int32, device=h.device)
    torch.linalg.cholesky_ex(h, out=(h, info))
    return None if info.item() else h


def _turn_(h: Tensor) -> None:
    """Reverse both axes of `h` [K, K]: rows change places with those at the other end, both turned around."""
    k = len(h)
    for rows in _tiles(k // 2):
        other = slice(k - rows.stop, k - rows.start)
        held = h[rows].flip(0, 1)
        h[rows] = h[other].flip(0, 1)
        h[other] = held
    if k % 2:
        h[k // 2] = h[k // 2].flip(0)


def _average_(h: Tensor) -> None:
    """Let what is above the diagonal of `h` [K, K] be the mean of itself and what is below."""
    tiles = _tiles(len(h))
    for i, rows in enumerate(tiles):
        for columns in tiles[i:]:
            h[rows, columns].add_(h[columns, rows].T.clone()).mul_(0.5)
