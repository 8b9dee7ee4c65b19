"""The uniform grid: equally spaced levels, ``w = (code - zero) * scale`` with codes 0 … 2^bits - 1.

Asymmetric groups span [min(w, 0), max(w, 0)], so that 0 is a level and every zero is a code (Jacob et
al. 2018, eq. 3). Symmetric groups have zero = 2^(bits-1) and are *full-range*: the entry of largest magnitude, with
its sign, lands on the lowest code, which makes the scale negative where that entry is positive. The entry that
``scale = 2 max|w| / (2^bits - 1)`` would clip is then exact; one of nearly that size and the other sign is clipped by
up to one step. The format is the same (Cheng et al., "SignRound", use it too).

Scales carry eight significant bits, so that float16 (what files store) and bfloat16 (what some engines convert it
to on loading) both hold them exactly: every engine multiplies by the very scale the codes were chosen with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import SolverError, SpecError
from llmq.types import Affine

# The range in which every bfloat16 value is also a float16 value. Below 2^-17 float16's fixed subnormal step of
# 2^-24 is coarser than eight significant bits; above 65280 (0x477F) the next bfloat16 is float16's infinity.
MIN_SCALE = 2.0**-17
MAX_SCALE = 65280.0

_SHRINK = 0.02  # of the span, per step of the search
_SHRINK_STEPS = 35


@dataclass(frozen=True)
class UniformGrid:
    """2^bits equally spaced levels, placed per group by the extremes of its weights."""

    bits: int
    symmetric: bool

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError(f"uniform grid: bits is {self.bits}; use 2 to 8")

    def fit(self, w: Tensor, weight: Tensor | None = None) -> Affine:
        """Return the placement for the columns `w` [N, S] of one group.

        It spans the group, unless `weight` is given: then the span is shrunk towards 0 as far as that lowers the
        weighted error ``Σ_j weight_j (w_j - ŵ_j)²`` of the row, in steps of 2 % of it.

        Args:
            w: real weights, any float dtype.
            weight: importance of each column, [S], not negative.

        Returns:
            float32 scale [N, 1] (storable, never 0; of either sign if symmetric) and zero [N, 1].

        Raises:
            SolverError: a scale beyond what float16 holds.
        """
        w = w.float()
        lo, hi = (m.unsqueeze(1) for m in torch.aminmax(w, dim=1))
        best = self._span(lo, hi)
        if weight is None:
            return best
        least = self._error(w, best, weight)
        for step in range(1, _SHRINK_STEPS):
            tried = self._span(*(m * (1 - _SHRINK * step) for m in (lo, hi)))
            error = self._error(w, tried, weight)
            better = error < least
            least = torch.where(better, error, least)
            best = Affine(*(torch.where(better[:, None], new, old) for new, old in zip(tried, best, strict=True)))
        return best

    def _error(self, w: Tensor, at: Affine, weight: Tensor) -> Tensor:
        """Return the weighted squared error of each row, [N]."""
        return (self.decode(self.encode(w, at), at) - w).square() @ weight

    def _span(self, lo: Tensor, hi: Tensor) -> Affine:
        """Return the placement for groups with these extremes, [N, 1] each."""
        if self.symmetric:
            half = 2 ** (self.bits - 1)
            # ties take the negative extreme, hence a positive scale
            extreme = torch.where(-lo >= hi, lo, hi)
            return Affine(self.storable(extreme / -half), torch.full_like(extreme, half))
        lo, hi, top = lo.clamp(max=0), hi.clamp(min=0), 2**self.bits - 1
        scale = self.storable((hi - lo) / top)
        return Affine(scale, torch.round(-lo / scale).clamp_(0, top))

    def encode(self, w: Tensor, at: Affine) -> Tensor:
        """Return uint8 codes [N, S] of the levels nearest to `w` [N, S]; ties go to the even code."""
        return (torch.round(w / at.scale) + at.zero).clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, at: Affine) -> Tensor:
        """Return the float32 values [N, S] of uint8 `codes` [N, S]."""
        return (codes.float() - at.zero) * at.scale

    def storable(self, scale: Tensor) -> Tensor:
        """Return `scale` as files hold it: eight significant bits, never 0; an exact 0 (a zero group) becomes 1.

        Raises:
            SolverError: a scale beyond what float16 holds.
        """
        rounded = scale.bfloat16().float()
        if not (rounded.abs() <= MAX_SCALE).all():
            raise SolverError(
                f"scale {scale.abs().max().item():g} does not fit float16 (largest {MAX_SCALE:g}), the dtype that "
                "packed files store; rescale the weight or leave the layer out with --ignore"
            )
        floor = torch.where(scale < 0, -MIN_SCALE, MIN_SCALE)
        rounded = torch.where(rounded.abs() < MIN_SCALE, floor, rounded)
        return torch.where(scale == 0, torch.ones_like(scale), rounded)
