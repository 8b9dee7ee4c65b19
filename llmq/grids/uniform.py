"""The uniform grid: equally spaced levels, ``w = (code - zero) * scale`` with codes 0 … 2^bits - 1.

Asymmetric groups span [min(w, 0), max(w, 0)], so that 0 is a level and every zero is a code (Jacob et
al. 2018, eq. 3). Symmetric groups have zero P = 2^(bits-1); formats and kernels do not see which of three ranges they
follow, with A = max|w|:

- *full*: the entry of largest magnitude, with its sign, lands on the lowest code: ``scale = ∓A / P``, negative where
  that entry is positive. It is exact; one of nearly that size and the other sign is clipped by up to one step (Cheng et
  al., "SignRound", arXiv 2309.05516, use it too). The most accurate of the three.
- *gptq*: ``scale = 2A / (2^bits - 1)``, as the GPTQ code of Frantar et al. has it, save that groups without negative
  entries are no exception here (there, all above 7/15 A is lost at 4 bits). A and -A are half a step off the levels.
- *restricted*: ``scale = A / (P - 1)``, code 0 unused: A and -A are both levels, and int8 dot products cannot overflow.

Scales carry eight significant bits (`llmq.grids.scales`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from llmq.errors import SpecError
from llmq.grids.scales import half_precision
from llmq.types import Affine

SymRange = Literal["full", "gptq", "restricted"]

SPANS = tuple(1 - 0.02 * step for step in range(35))  # of a group's extremes, that a search tries
_CHUNK = 2**16  # weights that are searched together: three buffers of them stay in a core's cache


@dataclass(frozen=True)
class UniformGrid:
    """2^bits equally spaced levels, placed per group by the extremes of its weights."""

    bits: int
    symmetric: bool
    sym_range: SymRange = "full"  # of symmetric groups; asymmetric ones have no choice

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError(f"uniform grid: bits is {self.bits}; use 2 to 8")
        if self.sym_range not in get_args(SymRange):
            raise SpecError(f"uniform grid: sym_range is {self.sym_range!r}; use {', '.join(get_args(SymRange))}")

    def fit(self, w: Tensor, weight: Tensor | None = None, *, norm: float = 2.0) -> Affine:
        """Return the placement for the columns `w` [N, S] of one group.

        It spans the group, unless `weight` is given: then the span is shrunk towards 0 as far as that lowers the
        weighted error ``Σ_j weight_j |w_j - ŵ_j|^norm`` of the row, in steps of 2 % of it.

        Args:
            w: real weights, any float dtype.
            weight: importance of each column, [S], not negative.
            norm: power of the error that `weight` weighs; above 2 it spares the large entries.

        Returns:
            float32 scale [N, 1] (storable, never 0; of either sign if symmetric) and zero [N, 1].

        Raises:
            SolverError: a scale beyond what float16 holds.
        """
        w = w.float()
        lo, hi = torch.aminmax(w, dim=1)
        if weight is None:
            return self._span(lo[:, None], hi[:, None])
        spans = torch.tensor(SPANS, device=w.device)[:, None]
        tried = self._span(lo * spans, hi * spans)  # [spans, N]
        rows = max(1, _CHUNK // w.shape[1])
        errors = [
            self._errors(part, _columns(tried, slice(start, start + rows)), weight, norm)
            for start, part in zip(range(0, len(w), rows), w.split(rows), strict=True)
        ]
        best = torch.cat(errors, dim=1).argmin(dim=0, keepdim=True)  # the first, hence widest, of equals
        return Affine(tried.scale.gather(0, best).T, tried.zero.gather(0, best).T)

    def _errors(self, w: Tensor, tried: Affine, weight: Tensor, norm: float) -> Tensor:
        """Return the weighted errors [spans, N] of `w` [N, S] under each of the placements `tried` [spans, N]."""
        negative, error = -w, torch.empty_like(w)
        errors = torch.empty_like(tried.scale)
        for scale, zero, out in zip(tried.scale[:, :, None], tried.zero[:, :, None], errors, strict=True):
            # `nearest` in place; clamping at [-zero, top - zero] in one operation is slower than these three
            torch.div(w, scale, out=error).round_().add_(zero).clamp_(self.lowest, 2**self.bits - 1).sub_(zero)
            torch.addcmul(negative, error, scale, out=error)
            powers = error.square_() if norm == 2 else error.abs_().pow_(norm)
            torch.mv(powers, weight, out=out)
        return errors

    def _span(self, lo: Tensor, hi: Tensor) -> Affine:
        """Return the placement for groups with these extremes, of any one shape."""
        if self.symmetric:
            half = 2 ** (self.bits - 1)
            # ties take the negative extreme, hence a positive scale
            extreme = torch.where(-lo >= hi, lo, hi)
            scale = (extreme if self.sym_range == "full" else extreme.abs()) / self.steps
            return Affine(self.storable(scale), torch.full_like(extreme, half))
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        scale = self.storable((hi - lo) / self.steps)
        return Affine(scale, torch.round(-lo / scale).clamp_(0, 2**self.bits - 1))

    @property
    def steps(self) -> float:
        """How many scales the span is; negative: a symmetric scale has the opposite sign of the extreme."""
        half, top = 2.0 ** (self.bits - 1), 2.0**self.bits - 1
        return {"full": -half, "gptq": top / 2, "restricted": half - 1}[self.sym_range] if self.symmetric else top

    @property
    def name(self) -> str:
        """Its row in `llmq.grids.GRIDS`."""
        return "uniform"

    @property
    def zeros(self) -> tuple[int, int]:
        """The lowest and the highest zero."""
        half = 2 ** (self.bits - 1)
        return (half, half) if self.symmetric else (0, 2**self.bits - 1)

    @property
    def tables(self) -> None:
        """No table: levels are computed."""
        return

    @property
    def learns(self) -> bool:
        """No levels are learned."""
        return False

    def adapted(self, w: Tensor) -> UniformGrid:
        """Return itself: groups know nothing of each other."""
        return self

    @property
    def lowest(self) -> int:
        """The lowest code in use."""
        return int(self.symmetric and self.sym_range == "restricted")

    def encode(self, w: Tensor, at: Affine) -> Tensor:
        """Return uint8 codes [N, S] of the levels nearest to `w` [N, S]; ties go to the even code."""
        return (torch.round(w / at.scale) + at.zero).clamp_(self.lowest, 2**self.bits - 1).to(torch.uint8)

    def nearest(self, w: Tensor, at: Affine) -> Tensor:
        """Return ``decode(encode(w, at), at)``, float32 of the shape of `w`, without the codes in between."""
        steps = torch.div(w, at.scale).round_().add_(at.zero)
        return steps.clamp_(self.lowest, 2**self.bits - 1).sub_(at.zero).mul_(at.scale)

    def decode(self, codes: Tensor, at: Affine) -> Tensor:
        """Return the float32 values [N, S] of uint8 `codes` [N, S]."""
        return (codes.float() - at.zero) * at.scale

    def storable(self, scale: Tensor) -> Tensor:
        """Return `scale` as files hold it: eight significant bits, never 0; an exact 0 (a zero group) becomes 1.

        Raises:
            SolverError: a scale beyond what float16 holds.
        """
        return half_precision(scale)


def _columns(tried: Affine, rows: slice) -> Affine:
    """Return placements [spans, N] of some rows."""
    return Affine(tried.scale[:, rows], tried.zero[:, rows])
