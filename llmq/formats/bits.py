"""Codes of 1 to 8 bits packed into int32 words as one little-endian bit stream, and back.

Code j of a row occupies bits ``bits·j … bits·j + bits - 1`` of the row's stream, which is cut into 32-bit words.
Where `bits` divides 32 no code crosses a word; 3-bit codes do, and 32 of them fill three words. Every packed format
that llmq knows is this stream along one axis or another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import SpecError

WORD = 32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return int32 words [..., C·bits/32] holding the uint8 `codes` [..., C] as a bit stream.

    Raises:
        SpecError: C is not a multiple of 32, or a code needs more than `bits` bits.
    """
    count = codes.shape[-1]
    if count % WORD:
        raise SpecError(f"{count} codes do not fill whole 32-bit words; pack a multiple of 32")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise SpecError(f"code {int(codes.max())} needs more than {bits} bits")
    lanes = codes.reshape(*codes.shape[:-1], count // WORD, WORD).long()
    words = torch.zeros(*lanes.shape[:-1], bits, dtype=torch.int64, device=codes.device)
    for lane in range(WORD):
        word, shift = divmod(lane * bits, WORD)
        words[..., word] |= lanes[..., lane] << shift
        if shift + bits > WORD:
            words[..., word + 1] |= lanes[..., lane] >> (WORD - shift)
    words &= 0xFFFFFFFF
    signed = torch.where(words >= 2**31, words - 2**32, words)
    return signed.to(torch.int32).reshape(*codes.shape[:-1], count * bits // WORD)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the uint8 codes [..., W·32/bits] that int32 `words` [..., W] hold.

    Raises:
        SpecError: W is not a multiple of `bits`, so that the words do not hold a whole number of 32 codes.
    """
    count = words.shape[-1]
    if count % bits:
        raise SpecError(f"{count} words do not hold a whole number of 32 codes of {bits} bits")
    packed = words.reshape(*words.shape[:-1], count // bits, bits).long() & 0xFFFFFFFF
    lanes = torch.empty(*packed.shape[:-1], WORD, dtype=torch.uint8, device=words.device)
    for lane in range(WORD):
        word, shift = divmod(lane * bits, WORD)
        code = packed[..., word] >> shift
        if shift + bits > WORD:
            code |= packed[..., word + 1] << (WORD - shift)
        lanes[..., lane] = (code & (2**bits - 1)).to(torch.uint8)
    return lanes.reshape(*words.shape[:-1], count * WORD // bits)
