"""The few PTX instructions that unpack codes, executed on every word."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WORDS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
Registers = dict[str, Tensor]  # name -> int64 holding 32 bits


def pair(low: Tensor, high: Tensor) -> Tensor:
    """Return 32-bit registers that hold two 16-bit values each."""
    low, high = (t.view(torch.int16).long() & 0xFFFF for t in (low, high))
    return low | high << 16


def halves(register: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return both 16-bit halves of 32-bit registers as `dtype`."""
    low, high = register & 0xFFFF, register >> 16
    low, high = ((h - (h >> 15 << 16)).to(torch.int16).view(dtype) for h in (low, high))
    return low, high


def twice(value: float, dtype: torch.dtype) -> Tensor:
    """Return registers that hold `value` in both halves, one for each word."""
    filled = torch.full(WORDS.shape, value, dtype=dtype)
    return pair(filled, filled)


def run_ptx(asm: str, registers: Registers, dtype: torch.dtype) -> None:
    """Execute the few PTX instructions that kernels unpack with; an unknown one raises KeyError."""

    def value(operand: str) -> Tensor:
        return torch.tensor(int(operand, 0)) if operand[0].isdigit() else registers[operand]

    def by_halves(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
        parts = [halves(o.expand(WORDS.shape), dtype) for o in operands]
        # float64 holds products and sums of 16-bit floats exactly: this rounds once, as the hardware does.
        low, high = (function(*(p[i].double() for p in parts)).to(dtype) for i in (0, 1))
        return pair(low, high)

    def lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
        both = {(0xF0 & 0xCC) | 0xAA: (a & b) | c, (0xF0 & 0xCC) ^ 0xAA: (a & b) ^ c}  # by their truth tables
        return both[int(table)]

    def prmt(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
        found = torch.zeros(WORDS.shape, dtype=torch.int64)
        for i in range(4):
            source = int(selector) >> 4 * i & 15
            assert source < 8  # above: bytes of signs
            found |= ((a if source < 4 else b) >> 8 * (source % 4) & 0xFF) << 8 * i
        return found

    instructions: dict[str, Callable[..., Tensor]] = {
        "mov.b32": lambda a: a,
        "shr.u32": lambda a, b: a >> b,
        "lop3.b32": lop3,
        "prmt.b32": prmt,
        "add.f16x2": lambda a, b: by_halves(lambda p, q: p + q, a, b),
        "sub.f16x2": lambda a, b: by_halves(lambda p, q: p - q, a, b),
        "fma.rn.f16x2": lambda a, b, c: by_halves(lambda p, q, r: p * q + r, a, b, c),
        "fma.rn.bf16x2": lambda a, b, c: by_halves(lambda p, q, r: p * q + r, a, b, c),
    }
    for line in asm.strip("{}").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name and not name.startswith(".reg"):
            target, *sources = (o.strip() for o in operands.split(","))
            registers[target] = instructions[name](*(value(s) for s in sources))
