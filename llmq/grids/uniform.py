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


@dataclass(frozen=True)
class UniformGrid:
    """2^bits equally spaced levels, placed per group by the extremes of its weights."""

    bits: int
    symmetric: bool

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError(f"uniform grid: bits is {self.bits}; use 2 to 8")

    def fit(self, w: Tensor) -> Affine:
        """Return the placement that spans the columns `w` [N, S] of one group.

        Args:
            w: real weights, any float dtype.

        Returns:
            float32 scale [N, 1] (storable, never 0; of either sign if symmetric) and zero [N, 1].

        Raises:
            SolverError: a scale beyond what float16 holds.
        """
        lo, hi = (m.float().unsqueeze(1) for m in torch.aminmax(w, dim=1))
        if self.symmetric:
            half = 2 ** (self.bits - 1)
            # ties take the negative extreme, hence a positive scale
            extreme = torch.where(-lo >= hi, lo, hi)
            return Affine(_storable(extreme / -half), torch.full_like(extreme, half))
        lo, hi, top = lo.clamp(max=0), hi.clamp(min=0), 2**self.bits - 1
        scale = _storable((hi - lo) / top)
        return Affine(scale, torch.round(-lo / scale).clamp_(0, top))

    def encode(self, w: Tensor, at: Affine) -> Tensor:
        """Return uint8 codes [N, S] of the levels nearest to `w` [N, S]; ties go to the even code."""
        return (torch.round(w / at.scale) + at.zero).clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, at: Affine) -> Tensor:
        """Return the float32 values [N, S] of uint8 `codes` [N, S]."""
        return (codes.float() - at.zero) * at.scale


def _storable(scale: Tensor) -> Tensor:
    """Round `scale` to eight significant bits, away from 0 if it would vanish; an exact 0 (a zero group) becomes 1."""
    rounded = scale.bfloat16().float()
    if not (rounded.abs() <= MAX_SCALE).all():
        raise SolverError(
            f"scale {scale.abs().max().item():g} does not fit float16 (largest {MAX_SCALE:g}), the dtype that packed "
            "files store; rescale the weight or leave the layer out with --ignore"
        )
    floor = torch.where(scale < 0, -MIN_SCALE, MIN_SCALE)
    rounded = torch.where(rounded.abs() < MIN_SCALE, floor, rounded)
    return torch.where(scale == 0, torch.ones_like(scale), rounded)
