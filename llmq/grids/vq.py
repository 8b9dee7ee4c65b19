"""Vectors of weights on a codebook: d neighbouring columns of a row share one code, ``w = codebook[code] * scale``.

A codebook is learned for each layer, so there is nothing to look up before a layer is solved: a `VectorGrid` says how
many vectors there are and of what size, and `llmq.vectors` finds them. It is no grid of single weights, and what works
weight by weight (`fit`, `encode`, `decode` of `llmq.types.Grid`) refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from torch import Tensor
from torch.nn.functional import pad

from llmq.errors import SpecError
from llmq.types import Affine, QuantizedWeight

MAX_ENTRY = 127  # of a codebook: int8, without -128
_MAX_CODE_BITS = 8
VECTORS: dict[str, int] = {"vq2": 2, "vq4": 4, "vq8": 8}  # columns per code


@dataclass(frozen=True)
class VectorGrid:
    """Codebooks of 2^(bits · columns) vectors."""

    bits: int  # per weight, codebook and scales not counted
    columns: int  # d, that share a code

    @property
    def name(self) -> str:
        """Its row in `VECTORS`."""
        return f"vq{self.columns}"

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return self.bits * self.columns

    @property
    def entries(self) -> int:
        """Vectors in a codebook."""
        return int(2**self.code_bits)

    @property
    def symmetric(self) -> bool:
        """No zeros need to be stored."""
        return True

    @property
    def zeros(self) -> tuple[int, int]:
        """The lowest and the highest zero."""
        return 0, 0

    @property
    def tables(self) -> None:
        """No table of single levels."""
        return

    @property
    def learns(self) -> bool:
        """No group has levels of its own: the layer has a codebook."""
        return False

    def adapted(self, w: Tensor) -> VectorGrid:
        """Return itself: what depends on the weight is the codebook."""
        return self

    def codes_in(self, in_features: int) -> int:
        """Return how many codes a row of `in_features` weights has; the last may reach beyond its end."""
        return -(-in_features // self.columns)

    def fit(self, w: Tensor, weight: Tensor | None = None, *, norm: float = 2.0) -> Affine:
        """Refuse: see `_refuse`."""
        self._refuse()

    def storable(self, scale: Tensor) -> Tensor:
        """Refuse: see `_refuse`."""
        self._refuse()

    def encode(self, w: Tensor, at: Affine) -> Tensor:
        """Refuse: see `_refuse`."""
        self._refuse()

    def nearest(self, w: Tensor, at: Affine) -> Tensor:
        """Refuse: see `_refuse`."""
        self._refuse()

    def decode(self, codes: Tensor, at: Affine) -> Tensor:
        """Refuse: see `_refuse`."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise SpecError(f"the {self.name} grid holds vectors, not single weights; use another grid here")


def vector_grid(name: str, bits: int) -> VectorGrid:
    """Return the grid of row `name` of `VECTORS`.

    Raises:
        SpecError: its codes would have more than 8 bits, or none.
    """
    columns = VECTORS[name]
    if bits not in vector_bits(name):
        raise SpecError(
            f"{name} grid: bits is {bits}; use {', '.join(map(str, vector_bits(name)))}: a code of {columns} weights "
            f"has up to {_MAX_CODE_BITS} bits"
        )
    return VectorGrid(bits, columns)


def vector_bits(name: str) -> range:
    """Return the bits per weight that row `name` of `VECTORS` has, the most first."""
    return range(_MAX_CODE_BITS // VECTORS[name], 0, -1)


@dataclass(frozen=True)
class VectorWeight(QuantizedWeight):
    """A weight whose codes stand for vectors: codes uint8 [N, P], P = ⌈K / d⌉, and zeros that mean nothing.

    `scales` are [N, G]; `group_size` counts columns as ever, and is a multiple of d unless one group is all.
    """

    codebook: Tensor = field(kw_only=True)  # float32 [2^code_bits, d], whole numbers that int8 holds
    in_features: int = field(kw_only=True)  # K: the last code of a row may reach beyond it

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, float32 [N, K]."""
        n, d = len(self.codes), self.codebook.shape[1]
        groups, k = self.scales.shape[1], self.in_features
        if groups == 1:
            return (self.codebook[self.codes.int()] * self.scales[:, :, None]).reshape(n, -1)[:, :k].contiguous()
        scales = self.scales.repeat_interleave(self.group_size // d, dim=1)[:, : self.codes.shape[1], None]
        return (self.codebook[self.codes.int()] * scales).reshape(n, -1)[:, :k].contiguous()


def whole_vectors(w: Tensor, columns: int) -> Tensor:
    """Return `w` [..., K] with zeros after the last column, so that vectors of `columns` fill it."""
    return pad(w, (0, -w.shape[-1] % columns))
