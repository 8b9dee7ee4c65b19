"""Grids of four bits whose levels are small floats, or the quantiles of a normal distribution.

- *nf4*: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314, appendix E): 16 quantiles of N(0, 1), the outermost at ±1, 0
  among them. They are not symmetric: there are eight above 0 and seven below.
- *fp4*: E2M1, a sign, two bits of exponent and one of mantissa: 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives. +0 and -0
  are one level here, so that a code is left over. Ties go to the even mantissa, as IEEE 754 rounds.
- *mxfp4*: the levels of fp4 in groups of 32, scaled by powers of two (OCP Microscaling Formats 1.0).
- *nvfp4*: the levels of fp4 in groups of 16, whose scales are E4M3 times a scale of the whole tensor (NVIDIA). That one
  is a power of two here, which other programs allow but do not ask for: scales stay exact in half precision.
"""

from __future__ import annotations

from llmq.grids.float_scales import E4M3, E8M0
from llmq.grids.scales import Half, ScaleRule
from llmq.grids.table import TableGrid, signed

# the quantiles to the digits that the paper prints
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_ODD = (0.5, 1.5, 3.0, 6.0)  # mantissa 1: a tie between such a level and its neighbour goes to the neighbour


def nf4(bits: int, symmetric: bool = True) -> TableGrid:
    """Return the nf4 grid."""
    return TableGrid("nf4", bits, (NF4,))


def fp4(bits: int, symmetric: bool = True) -> TableGrid:
    """Return the fp4 grid, scaled per group in float16."""
    return _e2m1("fp4", bits, Half())


def mxfp4(bits: int, symmetric: bool = True) -> TableGrid:
    """Return the mxfp4 grid, scaled per group by powers of two."""
    return _e2m1("mxfp4", bits, E8M0())


def nvfp4(bits: int, symmetric: bool = True) -> TableGrid:
    """Return the nvfp4 grid, scaled per group in E4M3."""
    return _e2m1("nvfp4", bits, E4M3())


def _e2m1(name: str, bits: int, rule: ScaleRule) -> TableGrid:
    levels = signed(E2M1)
    return TableGrid(name, bits, (levels,), rule, up=tuple(abs(level) in _ODD for level in levels[:-1]))
