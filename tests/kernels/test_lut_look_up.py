"""Nibbles to levels: the assembly that GPUs run, emulated, for all words."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmq_kernels import lut_levels

WORDS = torch.arange(2**16)
Registers = dict[str, Tensor]  # name -> int64 holding 32 bits


def prmt(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    """Return four bytes of the eight of b and a, by the lowest four digits of `selector`; 8 and above repeat a sign."""
    both, found = a | b << 32, torch.zeros_like(a | b | selector)
    for i in range(4):
        digit = selector >> 4 * i & 15
        assert bool((digit < 8).all()), "repeats a sign"
        found |= (both >> 8 * digit & 0xFF) << 8 * i
    return found


def run_ptx(asm: str, registers: Registers) -> None:
    """Execute the few PTX instructions that the kernels use; an unknown one raises KeyError."""

    def value(operand: str) -> Tensor:
        return torch.tensor(int(operand, 0)) if operand[0].isdigit() else registers[operand]

    def lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
        assert int(table) == (0xF0 & 0xCC) | 0xAA  # the truth table of (a & b) | c
        return (a & b) | c

    instructions: dict[str, Callable[..., Tensor]] = {
        "mov.b32": lambda a: a,
        "and.b32": lambda a, b: a & b,
        "shr.u32": lambda a, b: a >> b,
        "lop3.b32": lop3,
        "prmt.b32": prmt,
    }
    for line in asm.strip("{}").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name and not name.startswith(".reg"):
            target, *sources = (o.strip() for o in operands.split(","))
            registers[target] = instructions[name](*(value(s) for s in sources))


@pytest.mark.parametrize("seed", range(3))
def test_assembly_is_the_level_of_every_code(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    table = torch.randint(0, 2**16, (16,), generator=draw)
    halves: Registers = {f"${8 + i}": (table[2 * i] | table[2 * i + 1] << 16)[None] for i in range(8)}
    run_ptx(lut_levels.BYTES.value, halves)
    other = WORDS[torch.randperm(2**16, generator=draw)]  # the neighbour of each word
    registers: Registers = {"$4": WORDS | other << 16}
    for i in range(8):
        registers[f"${5 + 2 * i}"] = registers[f"${6 + 2 * i}"] = halves[f"${i}"]
    run_ptx(lut_levels.LOOK_UP.value, registers)
    for plane in range(4):
        assert torch.equal(registers[f"${plane}"] & 0xFFFF, table[WORDS >> 4 * plane & 15])
        assert torch.equal(registers[f"${plane}"] >> 16, table[other >> 4 * plane & 15])


def test_neighbouring_words_may_have_tables_of_their_own() -> None:
    tables = torch.randint(0, 2**16, (2, 16), generator=torch.Generator().manual_seed(5))
    registers: Registers = {"$4": WORDS | WORDS.flip(0) << 16}
    for own, table in enumerate(tables):
        halves: Registers = {f"${8 + i}": (table[2 * i] | table[2 * i + 1] << 16)[None] for i in range(8)}
        run_ptx(lut_levels.BYTES.value, halves)
        registers |= {f"${5 + own + 2 * i}": halves[f"${i}"] for i in range(8)}
    run_ptx(lut_levels.LOOK_UP.value, registers)
    for plane in range(4):
        assert torch.equal(registers[f"${plane}"] & 0xFFFF, tables[0][WORDS >> 4 * plane & 15])
        assert torch.equal(registers[f"${plane}"] >> 16, tables[1][WORDS.flip(0) >> 4 * plane & 15])
