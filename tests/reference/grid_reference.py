"""Placing a group on the uniform grid, in float64, from the definitions (written without looking at llmq.grids).

Besides the placement it returns a *margin*: by how many steps every weight of the group may move before any decision
(which extreme, which eight-bit scale, which zero) comes out differently. Float32 code may be compared with float64
code exactly wherever its error is below the margin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Placed(NamedTuple):
    """``w = (code - zero) * scale`` for one group of each row; all [N] float64."""

    scale: Tensor
    zero: Tensor
    margin: Tensor


def place(w: Tensor, bits: int, symmetric: bool) -> Placed:
    """Return the placement of the columns `w` [N, S]; scales between 2^-17 and 65280 only, no group all zero."""
    top, half = 2**bits - 1, 2 ** (bits - 1)
    low, high = w.amin(1), w.amax(1)
    if symmetric:
        ideal = torch.where(-low >= high, low, high) / -half
        scale, distance = eight_bits(ideal)
        switch = (-low - high).abs() / ideal.abs() / 2
        return Placed(scale, torch.full_like(scale, half), torch.minimum(distance * half, switch))
    low, high = low.clamp(max=0), high.clamp(min=0)
    ideal = (high - low) / top
    scale, distance = eight_bits(ideal)
    position = -low / scale
    to_tie = (position - position.floor() - 0.5).abs()
    margin = torch.minimum(distance * top / 2, to_tie / 2)
    return Placed(scale, position.round().clamp(0, top), margin)


def eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` rounded to eight significant bits, and how far, relatively, it is from rounding otherwise."""
    mantissa, exponent = torch.frexp(x.double())  # 0.5 <= |mantissa| < 1
    units = mantissa * 2**8
    distance = (units.abs() - units.abs().floor() - 0.5).abs() / units.abs()
    return torch.ldexp(units.round() / 2**8, exponent), distance


def encode(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the whole numbers, float64, of the levels nearest to `w`; all arguments of one shape."""
    return (torch.round(w / scale) + zero).clamp(0, 2**bits - 1)


def steps_to_tie(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return by how many steps each entry of `w` may move before its code changes."""
    position = w / scale + zero
    inside = (position - position.floor() - 0.5).abs()
    # beyond the outermost ties nothing is left to cross but the outermost tie itself
    below, above = 0.5 - position, position - (2**bits - 1.5)
    return torch.where(below > 0, below, torch.where(above > 0, above, inside))
