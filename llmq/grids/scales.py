"""Which scales files hold, and the one that spans a group.

Scales mostly carry eight significant bits, so that float16 (what files store) and bfloat16 (what some engines convert
it to on loading) both hold them exactly: every engine multiplies by the very scale the codes were chosen with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmq.errors import SolverError

# The range in which every bfloat16 value is also a float16 value. Below 2^-17 float16's fixed subnormal step of
# 2^-24 is coarser than eight significant bits; above 65280 (0x477F) the next bfloat16 is float16's infinity.
MIN_SCALE = 2.0**-17
MAX_SCALE = 65280.0
SHRINKS = tuple(0.965**step for step in range(48))  # of a group's span, down to a fifth: low bits clip a lot


def half_precision(scale: Tensor) -> Tensor:
    """Return `scale` rounded to eight significant bits, never 0; an exact 0 (a zero group) becomes 1.

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


def check_finite(values: Tensor) -> None:
    """Check that what was made of a weight shows no NaN or infinity in it.

    Raises:
        SolverError: it does.
    """
    if not bool(values.isfinite().all()):
        raise SolverError("the weight has NaN or infinity; repair it or leave the layer out with --ignore")


class ScaleRule(Protocol):
    """How a grid whose levels stand in a table is scaled."""

    @property
    def factors(self) -> tuple[float, ...]:
        """Of a group's largest magnitude: what a search tries to span in its place, that itself first."""
        ...

    def spanning(self, extreme: Tensor, top: float) -> Tensor:
        """Return the scale for groups whose largest magnitude is `extreme`, of a table that goes to `top`."""
        ...

    def storable(self, scale: Tensor) -> Tensor:
        """Return `scale` rounded to the nearest that files hold."""
        ...

    def adapted(self, extreme: float, top: float) -> ScaleRule:
        """Return the rule for a weight whose largest magnitude is `extreme`, and a table that goes to `top`."""
        ...


@dataclass(frozen=True)
class Half:
    """Scales in float16, one per group; the largest weight of the group lies on the outermost level."""

    factors: tuple[float, ...] = SHRINKS

    def spanning(self, extreme: Tensor, top: float) -> Tensor:
        """Return the scale for groups whose largest magnitude is `extreme`, of a table that goes to `top`."""
        return self.storable(extreme / top)

    def storable(self, scale: Tensor) -> Tensor:
        """Return `scale` rounded to the nearest that files hold.

        Raises:
            SolverError: a scale beyond what float16 holds.
        """
        return half_precision(scale)

    def adapted(self, extreme: float, top: float) -> Half:
        """Return itself: groups know nothing of each other."""
        return self
