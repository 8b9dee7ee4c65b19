"""The logarithmic grid: neighbouring levels have one ratio, so that the error is relative to the weight.

With 8 bits it is the grid of the HiSilicon NNIE. A group is clipped at c, a power of 2^(1/16), and with
``Z = 16 log2 c - 127`` its levels are ``2^((i + Z) / 16)`` for i = 0 … 127, ``-2^((i + Z) / 16)`` for i = 1 … 127, and
0: an even number of codes leaves one level less to the negatives. c itself is a level. Codes of that chip are a sign
and i (`sign_magnitude`); the one that would be "-0" stands for 0.

Fewer bits have fewer and wider steps. To keep the steps would leave 4 bits less than half an octave, to keep the eight
octaves would make them wider than powers of two. Between these, the steps per octave here lose least on normally
distributed groups of 128 with the best clip: a mean squared error of 1.0 % of the variance at 4 bits, where one step
per octave makes 3.2 % and four make 2.9 %.

Weights go to the level that is nearest, as on every other grid. The chip's documentation rounds the logarithm, which
puts the bound between neighbours at their geometric mean, 0.02 % lower with 8 bits and 1.5 % with 4: there that adds
1.2 % to the squared error, and a solver that takes the nearest level for the best would be wrong. Next to 0 it has the
arithmetic mean too. A number of just half the lowest positive level goes to that level, its negative counterpart to 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.grids.scales import half_precision
from llmq.grids.table import TableGrid

_PER_OCTAVE = 16  # clips, at all bits
STEPS = {4: 2, 5: 4, 6: 6, 7: 12, 8: 16}  # levels per octave, by bits


@dataclass(frozen=True)
class Octaves:
    """Scales that are powers of 2^(1/16), to eight significant bits."""

    factors: tuple[float, ...] = tuple(2 ** (-step / _PER_OCTAVE) for step in range(38))

    def spanning(self, extreme: Tensor, top: float) -> Tensor:
        """Return the scale for groups whose largest magnitude is `extreme`, of a table that goes to `top`."""
        return self.storable(extreme / top)

    def storable(self, scale: Tensor) -> Tensor:
        """Return `scale` rounded to the nearest power, on a logarithmic measure.

        Raises:
            SolverError: a scale beyond what float16 holds.
        """
        power = torch.exp2((scale.abs().log2() * _PER_OCTAVE).round() / _PER_OCTAVE)
        return half_precision(torch.where(scale < 0, -power, power))

    def adapted(self, extreme: float, top: float) -> Octaves:
        """Return itself: groups know nothing of each other."""
        return self


def log(bits: int, symmetric: bool = True) -> TableGrid:
    """Return the logarithmic grid of 4 to 8 bits."""
    half, steps = 2 ** (bits - 1), STEPS[bits]
    positive = [2.0 ** ((i - half + 1) / steps) for i in range(half)]
    levels = (*(-level for level in reversed(positive[1:])), 0.0, *positive)
    return TableGrid("log", bits, (levels,), Octaves(), up=(*[True] * half, *[False] * (half - 1)))


def sign_magnitude(codes: Tensor, bits: int) -> Tensor:
    """Return the uint8 `codes` of a `log` grid as the chip has them: the highest bit is the sign, the others are i."""
    half = 2 ** (bits - 1)
    place = codes.int() - half  # i, or -1 - i of negatives, of which -0 is 0
    return torch.where(place >= 0, place, half - 1 - place).to(torch.uint8)


def from_sign_magnitude(stored: Tensor, bits: int) -> Tensor:
    """Return the uint8 codes of a `log` grid of which `sign_magnitude` makes uint8 `stored`."""
    half = 2 ** (bits - 1)
    index = stored.int() % half
    return torch.where(stored < half, half + index, half - 1 - index).to(torch.uint8)
