"""Codes of 1 to 8 bits packed into int32 words, and back.

As a *stream*, code j of a row occupies bits ``bits·j … bits·j + bits - 1`` of the row's bits, which are cut into 32-bit
words, lowest bits first. Where `bits` divides 32 no code crosses a word; 3-bit codes do, and 32 of them fill three
words. *Padded*, every word holds ``32 // bits`` whole codes, and its highest bits stay 0. Where `bits` divides 32 the
two are the same. Every packed format that llmq knows is one of them along one axis or another.

On a GPU either way is one Triton kernel; on a CPU nothing of it is imported.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmq.errors import SpecError
from llmq.gpu import runs_triton

WORD = 32


def word_count(count: int, bits: int, *, padded: bool = False) -> int:
    """Return how many words hold `count` codes of `bits` bits."""
    return -(-count // (WORD // bits)) if padded else -(-count * bits // WORD)


def pack(codes: Tensor, bits: int, *, padded: bool = False) -> Tensor:
    """Return int32 words [..., W] holding the uint8 `codes` [..., C], with zeros after the last code.

    Raises:
        SpecError: a code needs more than `bits` bits.
    """
    count = codes.shape[-1]
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise SpecError(f"code {int(codes.max())} needs more than {bits} bits")
    if runs_triton(codes.device):
        from llmq_kernels import pack_bits

        return pack_bits.pack(codes, bits, word_count(count, bits, padded=padded), padded=padded)
    if 8 % bits == 0:
        return _pack_bytes(codes, bits)
    block, size = _block(bits, padded)
    blocks = -(-count // block)
    lanes = pad(codes, (0, blocks * block - count)).reshape(*codes.shape[:-1], blocks, block).long()
    words = torch.zeros(*lanes.shape[:-1], size, dtype=torch.int64, device=codes.device)
    for lane in range(block):
        word, shift = divmod(lane * bits, WORD)
        words[..., word] |= lanes[..., lane] << shift
        if shift + bits > WORD:
            words[..., word + 1] |= lanes[..., lane] >> (WORD - shift)
    words &= 0xFFFFFFFF
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    whole = signed.reshape(*codes.shape[:-1], blocks * size)
    return whole[..., : word_count(count, bits, padded=padded)].contiguous()


def unpack(words: Tensor, bits: int, count: int, *, padded: bool = False) -> Tensor:
    """Return the `count` uint8 codes [..., C] that int32 `words` [..., W] hold.

    Raises:
        SpecError: so many codes do not fill so many words.
    """
    if words.shape[-1] != word_count(count, bits, padded=padded):
        raise SpecError(f"{words.shape[-1]} words do not hold {count} codes of {bits} bits")
    if runs_triton(words.device):
        from llmq_kernels import pack_bits

        return pack_bits.unpack(words, bits, count, padded=padded)
    if 8 % bits == 0:
        return _unpack_bytes(words, bits, count)
    block, size = _block(bits, padded)
    blocks = -(-count // block)
    packed = pad(words, (0, blocks * size - words.shape[-1])).reshape(*words.shape[:-1], blocks, size)
    packed = packed.long() & 0xFFFFFFFF
    lanes = torch.empty(*packed.shape[:-1], block, dtype=torch.uint8, device=words.device)
    for lane in range(block):
        word, shift = divmod(lane * bits, WORD)
        code = packed[..., word] >> shift
        if shift + bits > WORD:
            code |= packed[..., word + 1] << (WORD - shift)
        lanes[..., lane] = (code & (2**bits - 1)).to(torch.uint8)
    return lanes.reshape(*words.shape[:-1], blocks * block)[..., :count].contiguous()


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Do what `pack` does where every byte holds whole codes: many times faster."""
    share = 8 // bits
    whole = pad(codes, (0, -codes.shape[-1] % (WORD // bits)))
    lanes = whole.reshape(*codes.shape[:-1], whole.shape[-1] // share, share)
    found = lanes[..., 0].clone(memory_format=torch.contiguous_format)
    for lane in range(1, share):
        found |= lanes[..., lane] << (lane * bits)
    return found.view(torch.int32)


def _unpack_bytes(words: Tensor, bits: int, count: int) -> Tensor:
    """Do what `unpack` does where every byte holds whole codes."""
    found = words.contiguous().view(torch.uint8)
    if bits < 8:
        found = torch.stack([(found >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1).flatten(-2)
    return found[..., :count].contiguous()


def _block(bits: int, padded: bool) -> tuple[int, int]:
    """Return the number of codes after which the arrangement repeats, and of their words."""
    return (WORD // bits, 1) if padded else (WORD, bits)
