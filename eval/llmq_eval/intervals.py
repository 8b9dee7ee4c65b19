"""Intervals for means of a few dozen windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# 97.5 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom; no dependency of llmq has them.
_T975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
_Z975 = 1.959964


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def interval(values: Sequence[float]) -> Interval | None:
    """Return the 95 % interval of the mean of `values`: mean ± t · sd / √n, with Student's t for n - 1 degrees.

    None for fewer than two values, which say nothing about their spread. Windows of one text are not quite
    independent, so this is a lower bound of the uncertainty about text in general; between two models on
    the same windows it is what it says.
    """
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    margin = t_quantile(n - 1) * math.sqrt(variance / n)
    return Interval(mean - margin, mean + margin)


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t, exact to four digits.

    Above 30 degrees of freedom by the first two terms of its expansion (Abramowitz & Stegun 26.7.5).
    """
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    z = _Z975
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
