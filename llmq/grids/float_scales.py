"""Scales that are small floats themselves: powers of two (E8M0), and E4M3 with a scale of the whole weight.

Both keep to what float16 and bfloat16 hold exactly, 2^-17 and more (`llmq.grids.scales`), though E8M0 goes further.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp

import torch
from torch import Tensor

from llmq.grids.scales import MIN_SCALE, half_precision

LARGEST_E4M3 = 448.0
_STEP_E4M3 = 2.0**-9  # between the subnormal ones
_DIGITS = 16  # E4M3 has four significant bits


@dataclass(frozen=True)
class E8M0:
    """Scales that are powers of two, chosen by the exponent of the largest magnitude, as the specification has it.

    The largest magnitude is then 4 to 8 scales, of a table that goes to 6: it may be clipped, by up to a quarter. A
    search also tries the power above and two below.
    """

    factors: tuple[float, ...] = (1.0, 2.0, 0.5, 0.25)

    def spanning(self, extreme: Tensor, top: float) -> Tensor:
        """Return the scale for groups whose largest magnitude is `extreme`, of a table that goes to `top`."""
        _, exponent = torch.frexp(extreme)
        scale = torch.ldexp(torch.ones_like(extreme), exponent - frexp(top)[1])
        return half_precision(torch.where(extreme == 0, 0.0, scale))

    def storable(self, scale: Tensor) -> Tensor:
        """Return `scale` rounded to the nearest power of two; half-way to the larger.

        Raises:
            SolverError: a scale beyond what float16 holds.
        """
        mantissa, exponent = torch.frexp(scale)
        power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa < 0.75).to(exponent.dtype))
        return half_precision(torch.where(scale > 0, power, MIN_SCALE))

    def adapted(self, extreme: float, top: float) -> E8M0:
        """Return itself: groups know nothing of each other."""
        return self


@dataclass(frozen=True)
class E4M3:
    """Scales that are E4M3 numbers, four significant bits up to 448, times a power of two that the weight shares."""

    unit: float | None = None  # that power; None, of rules that have seen no weight yet: exponents have no bounds
    # every E4M3 number down to a fifth of the first: neighbours are a fifteenth apart or more
    factors: tuple[float, ...] = (1.0, 16 / 15, *((15 / 16) ** step for step in range(1, 25)))

    def spanning(self, extreme: Tensor, top: float) -> Tensor:
        """Return the scale for groups whose largest magnitude is `extreme`, of a table that goes to `top`."""
        return self.storable(extreme / top)

    def storable(self, scale: Tensor) -> Tensor:
        """Return `scale` rounded to the nearest that files hold, within their range.

        Raises:
            SolverError: there is no unit, and a scale beyond what float16 holds.
        """
        if self.unit is None:
            mantissa, exponent = torch.frexp(scale)
            return half_precision(torch.ldexp((mantissa * _DIGITS).round() / _DIGITS, exponent))
        stored = (scale / self.unit).clamp(_STEP_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
        return (stored.float() * self.unit).clamp(min=MIN_SCALE)

    def adapted(self, extreme: float, top: float) -> E4M3:
        """Return the rule for a weight whose largest magnitude is `extreme`, and a table that goes to `top`.

        Raises:
            SolverError: its scale is beyond what float16 holds.
        """
        half_precision(torch.tensor(extreme / top))
        return E4M3(shared_unit(extreme / top))


def shared_unit(largest: float) -> float:
    """Return the least power of two that brings scales of up to `largest` within E4M3."""
    mantissa, exponent = frexp(max(largest, MIN_SCALE) / LARGEST_E4M3)
    return 2.0 ** (exponent - (mantissa == 0.5))
