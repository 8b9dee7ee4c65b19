"""3-bit weights times 16-bit activations, on the kernels for 4 bits: codes are held as nibbles, exactly.

Every code fits, and where all zeros are the middle code, codes are moved so that it becomes the middle one of 4 bits.
A weight thus takes the bytes and the time of 4 bits, not of its own. A word of 2-bit planes and one of third bits would
take three quarters of the bytes and more instructions; docs/kernels.md has the count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq_kernels import w4a16
from llmq_kernels.layout import Packed

_SHIFT = 4  # what is added to the codes of a weight whose zeros are all the middle code

matmul = w4a16.matmul


def refuses(n: int, k: int, bits: int, group_size: int, dtype: torch.dtype) -> str | None:
    """Return why this cannot multiply with an [n, k] weight of this kind, or None if it can: as `w4a16.refuses`."""
    if bits != 3:
        return f"bits {bits}: this row multiplies with 3-bit codes"
    return w4a16.refuses(n, k, 4, group_size, dtype)


def pack(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, dtype: torch.dtype) -> Packed:
    """Return the operands of `matmul`: as `w4a16.pack`, with codes in 0..7; zeros None where all are 4."""
    largest = int(codes.max()) if codes.numel() else 0
    if largest >> 3:
        raise ValueError(f"codes: largest is {largest}, too large for 3 bits")
    if zeros is None:
        codes = codes + _SHIFT
    return w4a16.pack(codes, scales, zeros, group_size, dtype)


def unpack(packed: Sequence[Tensor | None], n: int, k: int, group_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes uint8 [N, K], scales float32 [N, G] and zeros float32 [N, G] or None: the inverse of `pack`."""
    codes, scales, zeros = w4a16.unpack(packed, n, k, group_size)
    return codes - _SHIFT if zeros is None else codes, scales, zeros
