"""Orthogonal matrices that spread outliers: Hadamard matrices of every size, and random rotations.

A Hadamard matrix has entries ±1 and orthogonal rows. Sizes are put together from the power of two 2 and from Paley's
matrices of size q + 1 (prime power q = 3 mod 4) and 2 (q + 1) (q = 1 mod 4) by Kronecker products, all computed here:
no table. Prime powers go up to cubes. Of the multiples of 4 below 1000 that leaves out 92, 116, 156, 172 and some
others that are known, but hardly a size that models have, since a matrix twice as large often exists (43 · 8 = 7³ + 1).

What has no Hadamard matrix gets the Kronecker product of the largest one that divides it with a random rotation of
the rest. It mixes all channels and is orthogonal as well, which blocks on the diagonal would do only within a block.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from llmq.errors import SpecError

Kind = Literal["hadamard", "random"]


def rotation_matrix(size: int, kind: Kind, seed: int) -> Tensor:
    """Return an orthogonal matrix, float64 [size, size], the same for the same arguments.

    "hadamard": random signs times a Hadamard matrix, ``diag(±1) H / √n`` (Ashkboos et al. 2024, QuaRot, arXiv
    2404.00456, section 3), or the product of the module's docstring. "random": uniform over all rotations.

    Raises:
        SpecError: another `kind`, or a size below 1.
    """
    if size < 1:
        raise SpecError(f"rotation: size is {size}; use at least 1")
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return _random(size, generator)
    if kind != "hadamard":
        raise SpecError(f"rotation: kind is {kind!r}; use hadamard or random")
    largest = max(d for d in range(1, size + 1) if size % d == 0 and _plan(d) is not None)
    q = hadamard(largest) / largest**0.5
    if largest < size:
        q = torch.kron(q, _random(size // largest, generator))
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    rotated: Tensor = signs * q
    return rotated


def rotation_fixing_mean(size: int, seed: int) -> Tensor:
    """Return a random orthogonal Q, float64 [size, size], with ``Q 1 = 1``: it leaves the mean of a vector alone.

    It is what LayerNorm allows: ``mean(x Q) = mean(x)`` and ``|x Q| = |x|``, so that normalizing commutes with it. Q
    is U diag(1, R) U with the reflection U that takes the first axis to 1/√n, and a random rotation R of the rest.
    """
    inner = torch.eye(size, dtype=torch.float64)
    if size > 1:
        inner[1:, 1:] = _random(size - 1, torch.Generator().manual_seed(seed))
    axis = torch.full((size, 1), -(size**-0.5), dtype=torch.float64)
    axis[0] += 1
    if size > 1:  # at size 1 the axis is the ones already
        axis /= axis.norm()
    reflect = torch.eye(size, dtype=torch.float64) - 2 * axis @ axis.T
    return reflect @ inner @ reflect


def hadamard(size: int) -> Tensor:
    """Return a Hadamard matrix, float64 [size, size] of ±1 with ``H Hᵀ = size · I``.

    Raises:
        SpecError: none is known to the constructions of this module.
    """
    plan = _plan(size)
    if plan is None:
        raise SpecError(f"no construction for a Hadamard matrix of size {size}; use a multiple of 4, or kind random")
    h = torch.ones(1, 1, dtype=torch.float64)
    for part in plan:
        h = torch.kron(h, _base(part))
    return h


@cache
def _plan(size: int) -> tuple[int, ...] | None:
    """Return base sizes whose product is `size`, as many factors 2 as possible first, or None."""
    if size == 1:
        return ()
    if size % 2:
        return None
    rest = _plan(size // 2)
    if rest is not None:
        return (2, *rest)
    if size % 4 == 0 and (_prime_power(size - 1) or (size % 8 == 4 and _prime_power(size // 2 - 1))):
        return (size,)
    for base in range(12, int(size**0.5) + 1, 4):
        if size % base == 0:
            parts = _plan(base), _plan(size // base)
            if parts[0] is not None and parts[1] is not None:
                return parts[0] + parts[1]
    return None


def _base(size: int) -> Tensor:
    """Return the matrix of size 2, or Paley's of `size` (Paley 1933, J. Math. Phys. 12, lemmas 2 and 3)."""
    if size == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    power = _prime_power(size - 1)
    if power is not None:
        core = _bordered(*power, corner_sign=-1.0)
        return core + torch.eye(size, dtype=torch.float64)
    power = _prime_power(size // 2 - 1)
    assert power is not None, "planned"
    core = _bordered(*power, corner_sign=1.0)
    on = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    off = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, on) + torch.kron(torch.eye(size // 2, dtype=torch.float64), off)


def _bordered(p: int, k: int, corner_sign: float) -> Tensor:
    """Return the matrix of quadratic characters χ(a - b) over GF(p^k), with a row and a column of ±1 before it."""
    elements = list(product(range(p), repeat=k))
    modulus = _irreducible(p, k)
    squares = {_square(a, p, modulus) for a in elements} - {elements[0]}
    index = {a: i for i, a in enumerate(elements)}
    character = torch.full((len(elements),), -1.0, dtype=torch.float64)
    character[[index[a] for a in squares]] = 1.0
    character[0] = 0.0
    table = torch.tensor(elements)
    weights = torch.tensor([p ** (k - 1 - i) for i in range(k)])
    differences = ((table[:, None] - table[None]) % p * weights).sum(dim=2)  # index of a - b, as `product` counts
    core = torch.zeros(len(elements) + 1, len(elements) + 1, dtype=torch.float64)
    core[0, 1:] = 1.0
    core[1:, 0] = corner_sign
    core[1:, 1:] = character[differences]
    return core


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with ``q = p^k``, p an odd prime and k at most 3, or None."""
    for k in (1, 2, 3):
        p = round(q ** (1 / k))
        if p**k == q and p > 2 and all(p % d for d in range(2, int(p**0.5) + 1)):
            return p, k
    return None


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """Return c with ``x^k = c_0 x^(k-1) + … + c_(k-1)`` irreducible over GF(p): up to degree 3, without a root."""
    if k == 1:
        return (0,)
    return next(
        c
        for c in product(range(p), repeat=k)
        if all((x**k - sum(ci * x ** (k - 1 - i) for i, ci in enumerate(c))) % p for x in range(p))
    )


def _square(a: tuple[int, ...], p: int, modulus: tuple[int, ...]) -> tuple[int, ...]:
    """Return a² in GF(p^k); coefficients from the highest power down."""
    k = len(a)
    full = [0] * (2 * k - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(a):
            full[i + j] += x * y
    for i in range(k - 1):  # replace x^(2k-2-i) by the lower powers it equals
        for j, c in enumerate(modulus):
            full[i + 1 + j] += full[i] * c
    return tuple(value % p for value in full[k - 1 :])


def _random(size: int, generator: torch.Generator) -> Tensor:
    """Return a rotation drawn uniformly: the QR factor of a Gaussian matrix with the signs of R's diagonal made 1."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    drawn: Tensor = q * r.diagonal().sign()
    return drawn.contiguous()  # column-major as it comes, which torch.kron refuses
