"""Codes of 2 and 3 bits on the kernels for 4 bits: held as nibbles, exactly.

Every code fits, and where all zeros are the middle code, codes are moved so that it becomes the middle one of 4 bits.
A weight thus takes the bytes and the time of 4 bits, not of its own: 2 bits as eight planes of an int16 would halve
the bytes. 3 bits would need 3/4 of them, and a third word for every two; nobody has built it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq_kernels import w4a16
from llmq_kernels.layout import Packed


@dataclass(frozen=True)
class Narrow:
    """The functions of a kernel module for codes of `bits` bits, 2 or 3."""

    bits: int

    @property
    def shift(self) -> int:
        """What is added to the codes of a weight whose zeros are all the middle code."""
        return 8 - (1 << (self.bits - 1))

    def refuses(self, n: int, k: int, bits: int, group_size: int, dtype: torch.dtype) -> str | None:
        """Return why this cannot multiply with an [n, k] weight of this kind, or None if it can: as `w4a16.refuses`."""
        if bits != self.bits:
            return f"bits {bits}: this row multiplies with {self.bits}-bit codes"
        return w4a16.refuses(n, k, 4, group_size, dtype)

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, dtype: torch.dtype) -> Packed:
        """Return the operands of `matmul`: as `w4a16.pack`; zeros None where all are the middle code of `bits`."""
        largest = int(codes.max()) if codes.numel() else 0
        if largest >> self.bits:
            raise ValueError(f"codes: largest is {largest}, too large for {self.bits} bits")
        if zeros is None:
            codes = codes + self.shift
        return w4a16.pack(codes, scales, zeros, group_size, dtype)

    def unpack(
        self, packed: Sequence[Tensor | None], n: int, k: int, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return codes uint8 [N, K], scales float32 [N, G] and zeros float32 [N, G] or None: the inverse of `pack`."""
        codes, scales, zeros = w4a16.unpack(packed, n, k, group_size)
        return codes - self.shift if zeros is None else codes, scales, zeros
