"""Nibbles to levels: the assembly that GPUs run, emulated, for all words, and the tiles around it."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import random_x
from lut_cases import KINDS, random_lut
from tolerance import assert_close_to_float64
from torch import Tensor

from llmq_kernels import launch, lut, lut_levels, lut_tiles
from llmq_kernels.tables import Tile

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


@triton.jit
def byte_of(b_i, b_0, b_1, b_2, b_3):  # type: ignore[no-untyped-def]
    """Return byte b_i of the sixteen of four registers."""
    b_r = tl.where(b_i < 4, b_0, tl.where(b_i < 8, b_1, tl.where(b_i < 12, b_2, b_3)))
    return (b_r >> (b_i & 3) * 8) & 0xFF


@triton.jit
def bytes_twin(t_ptr, o_t):  # type: ignore[no-untyped-def]
    """Return what `table_bytes` does: four registers of the lower bytes of levels, and four of the upper ones."""
    p_t = t_ptr.to(tl.pointer_type(tl.int16)) + o_t
    b_0, b_1, b_2, b_3 = o_t.to(tl.int32) * 0, o_t.to(tl.int32) * 0, o_t.to(tl.int32) * 0, o_t.to(tl.int32) * 0
    b_4, b_5, b_6, b_7 = b_0, b_1, b_2, b_3
    for i in tl.static_range(4):
        b_0 |= (tl.load(p_t + i).to(tl.int32) & 0xFF) << 8 * i
        b_1 |= (tl.load(p_t + i + 4).to(tl.int32) & 0xFF) << 8 * i
        b_2 |= (tl.load(p_t + i + 8).to(tl.int32) & 0xFF) << 8 * i
        b_3 |= (tl.load(p_t + i + 12).to(tl.int32) & 0xFF) << 8 * i
        b_4 |= (tl.load(p_t + i).to(tl.int32) >> 8 & 0xFF) << 8 * i
        b_5 |= (tl.load(p_t + i + 4).to(tl.int32) >> 8 & 0xFF) << 8 * i
        b_6 |= (tl.load(p_t + i + 8).to(tl.int32) >> 8 & 0xFF) << 8 * i
        b_7 |= (tl.load(p_t + i + 12).to(tl.int32) >> 8 & 0xFF) << 8 * i
    return b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7


@triton.jit
def plane_twin(b_i, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7, COMPUTE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the levels of codes b_i."""
    b_w = byte_of(b_i, b_0, b_1, b_2, b_3) | byte_of(b_i, b_4, b_5, b_6, b_7) << 8
    return b_w.to(tl.int16).to(COMPUTE, bitcast=True)


@triton.jit
def asm_twin(b_q, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7, COMPUTE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what `planes_asm` does."""
    b_i = b_q.to(tl.int32)
    b_w0 = plane_twin(b_i & 15, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7, COMPUTE)
    b_w1 = plane_twin(b_i >> 4 & 15, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7, COMPUTE)
    b_w2 = plane_twin(b_i >> 8 & 15, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7, COMPUTE)
    b_w3 = plane_twin(b_i >> 12 & 15, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7, COMPUTE)
    return b_w0, b_w1, b_w2, b_w3


@pytest.mark.skipif(not launch.interpreted(lut_tiles.lut4_kernel), reason="a GPU runs the assembly itself")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "group_size"), [(192, 64), (96, 32), (80, 16), (199, 199)])
def test_tiles_hand_the_assembly_the_tables_of_their_groups(
    kind: str, k: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lut.tile_constants
    monkeypatch.setattr(lut, "tile_constants", lambda *a: real(*a) | {"ASM": True})
    for module in (lut_levels, lut_tiles):
        monkeypatch.setattr(module, "table_bytes", bytes_twin)
        monkeypatch.setattr(module, "planes_asm", asm_twin)
    w, x = random_lut(70, k, 4, group_size, kind), random_x(5, k, torch.float16)
    operands = lut.pack(w.codes, w.scales, w.table, w.picked, 4, group_size, torch.float16)
    y = lut.tiled(x, lut.Weight(operands, 70, k, 4, group_size), None, Tile(512, 16, 64, 4, 3, True), 1)
    assert_close_to_float64(y, w.product(x, None), k)
