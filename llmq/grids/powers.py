"""Powers of two (`pot`) and sums of some of them (`apot`): multiplications that hardware does by shifts.

- *pot*: 0 and ±2^-e for e = 0 … 2^(bits-1) - 2, which are 2^bits - 1 levels. (The set that is often printed goes to e =
  2^(bits-1) - 1 and has 2^bits + 1.) One more bit only divides the innermost interval.
- *apot*: Li et al. 2020 (Additive Powers-of-Two Quantization, arXiv 1909.13144): a magnitude is the sum of n terms of k
  bits each. Term i is 0 or one of 2^-i, 2^-(i+n), 2^-(i+2n), …, so that no two sums are equal and the large levels lie
  closer than powers of two do. One bit of a weight is its sign. An even number of bits leaves an odd one for the
  magnitude, where the authors add a term of a single bit, whose power lies before the last ones of the others. 3 bits
  are those of *pot*.

The largest level is 1. Weights go to the level that is nearest, not to the one whose logarithm is. The scale of a group
is its clipping threshold, which the search chooses; the authors learn it, one for each layer.
"""

from __future__ import annotations

from itertools import product

from llmq.grids.table import TableGrid, signed


def pot(bits: int, symmetric: bool = True) -> TableGrid:
    """Return the grid of powers of two."""
    count = 2 ** (bits - 1) - 1
    magnitudes = (0.0, *(2.0**-exponent for exponent in reversed(range(count))))
    return TableGrid("pot", bits, (signed(magnitudes),))


def apot(bits: int, symmetric: bool = True) -> TableGrid:
    """Return the grid of sums of powers of two, terms of two bits each and, if `bits` is even, one of a single bit."""
    own = bits - 1
    magnitudes = additive(2, own // 2) if own % 2 == 0 else _with_single(own // 2)
    return TableGrid("apot", bits, (signed(magnitudes),))


def additive(k: int, n: int) -> tuple[float, ...]:
    """Return the 2^(k n) sums of `n` terms of `k` bits, rising from 0 to 1: the unsigned levels of k·n bits."""
    return _sums([[i + j * n for j in range(2**k - 1)] for i in range(n)])


def _with_single(n: int) -> tuple[float, ...]:
    """Return the 2^(2n+1) sums of `n` terms of two bits and one of a single bit, rising from 0 to 1."""
    return _sums([*([i, i + n, i + 2 * n + 1] for i in range(n)), [2 * n]])


def _sums(exponents: list[list[int]]) -> tuple[float, ...]:
    """Return the sums of one of 0 and the powers 2^-e from each list, rising, divided by the largest."""
    terms = [[0.0, *(2.0**-exponent for exponent in own)] for own in exponents]
    sums = sorted(sum(choice) for choice in product(*terms))
    return tuple(total / sums[-1] for total in sums)
