"""Tables of learned levels in few bytes: two ends, and for each level between them how far it is from where it lay if
weights were normal.

The best levels for normal weights lie at known shares of the way from the lowest to the highest (Max 1960, *Quantizing
for minimum distortion*, table I). Those of real rows lie near, so four bits say where. With whole numbers a and b for
the ends and `share` in 256ths, level l of a table is

    2^power · ( 2^shift · ( ⌊(256 a + share_l (b - a)) / (256 · 2^shift) + ½⌋ + offset_l ) ) ,

but not above the highest and not below the level before it: so all tables rise, and levels may repeat. The ends are
2^power · a and 2^power · b. A table of L levels takes L/2 + 2 bytes:

    byte 0    4 (power + 24) + shift      power from -24 to 9, the least that does; shift from 0 to 3
    bytes 1, 2    a and b                 int8, -127 to 127
    then      offsets, -8 to 7            two to a byte, the lower level in the low half, two's complement

All levels are whole numbers up to ±127 times a power of two: exact in float16 and in bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.errors import SolverError, SpecError

_TOP = 127  # the largest whole number of an end
_LOWEST, _HIGHEST = -24, 9  # exponents of the powers of two of which all of them are float16
LARGEST = _TOP * 2.0**_HIGHEST  # level that there can be
_SHIFTS = 4
_OFFSETS = -8, 7
_WHOLE = 256
# by the number of levels: places of those between the ends, in 256ths of the way
_SHARES: dict[int, tuple[int, ...]] = {
    4: (90, 166),
    8: (48, 83, 113, 143, 173, 208),
    16: (31, 52, 69, 84, 97, 110, 122, 134, 146, 159, 172, 187, 204, 225),
}


class _Parts(NamedTuple):
    """What the bytes of tables [...] say."""

    power: Tensor  # int32 [..., 1], the exponent
    shift: Tensor  # int32 [..., 1]
    first: Tensor  # whole float32 [..., 1]
    last: Tensor  # whole float32 [..., 1]
    offsets: Tensor  # whole float32 [..., L - 2]


def power_for(levels: Tensor) -> Tensor:
    """Return the least exponent, int32 [..., 1], with which no whole number for `levels` [..., L] is beyond ±127.

    Raises:
        SolverError: a level is beyond what float16 holds.
    """
    largest = levels.abs().amax(dim=-1, keepdim=True)
    mantissa, exponent = torch.frexp(largest)
    exponent = (exponent - 7 + (torch.round(mantissa * 128) > _TOP).int()).clamp(_LOWEST, _HIGHEST)
    if bool((torch.round(torch.ldexp(largest, -exponent)) > _TOP).any()):
        raise SolverError(
            f"level {float(largest.max()):g} does not fit float16 (largest {LARGEST:g} of a table), the "
            "dtype that kernels look up; rescale the weight or leave the layer out with --ignore"
        )
    return exponent


def nearest_table(levels: Tensor) -> Tensor:
    """Return the tables nearest to rising `levels` [..., L] that bytes hold, rising; what they hold comes back exactly.

    The ends are rounded; of the shifts that is taken with which the levels between, each rounded by itself, are nearest
    by squares.

    Raises:
        SolverError: a level is beyond what float16 holds.
    """
    return _table(_parts(levels))


def to_bytes(levels: Tensor) -> Tensor:
    """Return uint8 [..., L/2 + 2] that stand for tables of `levels` [..., L].

    Raises:
        SpecError: they are none of `nearest_table`.
    """
    parts = _parts(levels)
    if not torch.equal(_table(parts), levels):
        raise SpecError("a table of levels is not one that files hold; round it with nearest_table")
    head = torch.cat([4 * (parts.power - _LOWEST) + parts.shift, parts.first.int(), parts.last.int()], dim=-1)
    low, high = parts.offsets.int().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat([head & 255, (low & 15) | (high & 15) << 4], dim=-1).to(torch.uint8)


def from_bytes(stored: Tensor) -> Tensor:
    """Return the levels, float32 [..., L], of tables in uint8 [..., L/2 + 2].

    Raises:
        SpecError: no table has these bytes.
    """
    head, ends = stored[..., :1].int(), stored[..., 1:3].view(torch.int8).float()
    halves = stored[..., 3:, None].int() >> torch.tensor([0, 4], device=stored.device) & 15
    offsets = (halves - 16 * (halves >> 3)).flatten(-2).float()
    parts = _Parts((head >> 2) + _LOWEST, head & 3, ends[..., :1], ends[..., 1:], offsets)
    damaged = (parts.power > _HIGHEST) | (parts.first > parts.last) | (ends < -_TOP).any(dim=-1, keepdim=True)
    if bool(damaged.any()) or not torch.equal(power_for(torch.ldexp(ends, parts.power)), parts.power):
        raise SpecError(f"levels are not between two ends of -{_TOP} to {_TOP} times the least power of two that does")
    return _table(parts)


def size_of(count: int) -> int:
    """Return the bytes of a table of so many levels."""
    return count // 2 + 2


def _parts(levels: Tensor) -> _Parts:
    """Return what stands for the tables nearest to rising `levels` [..., L]."""
    power = power_for(levels)
    whole = torch.ldexp(levels, -power)
    best, least = _with_shift(whole, power, 0)
    for shift in range(1, _SHIFTS):
        found, loss = _with_shift(whole, power, shift)
        better = loss < least
        best = _Parts(*(torch.where(better, new, old) for new, old in zip(found, best, strict=True)))
        least = torch.minimum(loss, least)
    return best


def _with_shift(whole: Tensor, power: Tensor, shift: int) -> tuple[_Parts, Tensor]:
    """Return the tables of this shift nearest to rising levels `whole` [..., L], and the squared distances [..., 1]."""
    first, inner, last = whole[..., :1].round(), whole[..., 1:-1], whole[..., -1:].round()
    shifts = torch.full_like(power, shift)
    ideal = (inner - _bases(first, last, shifts, inner.shape[-1])) / 2**shift
    # what is nearer to an end, or equal to the level before, goes beyond it: tables take that back to the neighbour
    off = (ideal - ideal.round()).abs() * 2**shift
    below = ((inner - first).abs() <= off) | (inner == whole[..., :-2])
    offsets = torch.where(below, ideal.floor(), ideal.round())
    offsets = torch.where((last - inner).abs() <= off, ideal.ceil(), offsets)
    found = _Parts(power, shifts, first, last, offsets.clamp(*_OFFSETS))
    return found, (_wholes(found)[..., 1:-1] - inner).square().sum(dim=-1, keepdim=True)


def _table(parts: _Parts) -> Tensor:
    """Return the levels [..., L] that `parts` say."""
    return torch.ldexp(_wholes(parts), parts.power) + 0.0  # no -0


def _wholes(parts: _Parts) -> Tensor:
    """Return the whole numbers [..., L] that `parts` say."""
    bases = _bases(parts.first, parts.last, parts.shift, parts.offsets.shape[-1])
    inner = (bases + torch.ldexp(parts.offsets, parts.shift)).minimum(parts.last)
    return torch.cat([parts.first, inner, parts.last], dim=-1).cummax(dim=-1).values


def _bases(first: Tensor, last: Tensor, shift: Tensor, count: int) -> Tensor:
    """Return where the `count` levels between the ends lie without offsets [..., count], multiples of 2^shift."""
    shares = torch.tensor(_SHARES[count + 2], dtype=torch.float32, device=first.device)
    step = torch.ldexp(torch.ones_like(first), shift)
    # products and quotients of whole numbers below 2^24 by powers of two: exact
    return ((first * _WHOLE + shares * (last - first)) / (_WHOLE * step) + 0.5).floor() * step
