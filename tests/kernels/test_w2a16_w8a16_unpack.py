"""Codes of 2 and 8 bits to floats: the assembly that GPUs run, emulated, and its twin, for all words."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, random_weight
from ptx_cases import WORDS, halves, pair, run_ptx, twice
from torch import Tensor

from llmq_kernels import crumbs, nibbles, octets, w2a16, w8a16

SIXTEEN = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
COMPUTE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def codes_of(planes: int) -> Tensor:
    """Return the codes of all words, [planes, 2**16]."""
    bits = 16 // planes
    return torch.stack([WORDS.int() >> bits * i & (1 << bits) - 1 for i in range(planes)])


def assert_planes(registers: dict[str, Tensor], truth: Tensor, dtype: torch.dtype) -> None:
    """Fail unless registers $0, $1, … hold planes of WORDS in their low halves, and of its reverse in the others."""
    for i, plane in enumerate(truth):
        low, high = halves(registers[f"${i}"], dtype)
        assert torch.equal(low.int(), plane)
        assert torch.equal(high.int(), plane.flip(0))


@SIXTEEN
@pytest.mark.parametrize("zero", [0, 1, 2, 4])
def test_assembly_for_two_bits_is_code_minus_zero_for_every_word(dtype: torch.dtype, zero: int) -> None:
    asm = {torch.float16: crumbs.UNPACK_FP16, torch.bfloat16: crumbs.UNPACK_BF16}[dtype].value
    bias, zeros = nibbles.NIBBLE_BIAS[dtype], [(zero + i // 2) % 5 for i in range(8)]  # a group for every two planes
    registers = {"$8": pair(WORDS, WORDS.flip(0))}
    for i, plane_zero in enumerate(zeros):
        addend = -(bias / 4 ** (i % 3) + plane_zero)
        assert float(torch.tensor(addend, dtype=dtype)) == addend
        registers[f"${9 + i}"] = twice(addend, dtype)
    run_ptx(asm, registers, dtype)
    assert_planes(registers, codes_of(8) - torch.tensor(zeros)[:, None], dtype)


@SIXTEEN
@pytest.mark.parametrize("zero", [0, 1, 127, 128, 200, 256])
def test_assembly_for_eight_bits_is_code_minus_zero_for_every_word(dtype: torch.dtype, zero: int) -> None:
    asm = {torch.float16: octets.UNPACK_FP16, torch.bfloat16: octets.UNPACK_BF16}[dtype].value
    made, zeros = {torch.float16: -1024, torch.bfloat16: 128}[dtype], (zero, 256 - zero)
    registers = {"$2": pair(WORDS, WORDS.flip(0))}
    registers |= {f"${3 + i}": twice(made - z, dtype) for i, z in enumerate(zeros)}
    run_ptx(asm, registers, dtype)
    assert_planes(registers, codes_of(2) - torch.tensor(zeros)[:, None], dtype)


def test_assembly_for_eight_bits_knows_the_middle_zero() -> None:
    registers = {"$2": pair(WORDS, WORDS.flip(0))}
    run_ptx(octets.UNPACK_BF16_MIDDLE.value, registers, torch.bfloat16)
    assert_planes(registers, codes_of(2) - 128, torch.bfloat16)


@triton.jit  # type: ignore[untyped-decorator]
def two_bits_kernel(w_ptr, z_ptr, o_ptr, BIAS: tl.constexpr, COUNT: tl.constexpr, COMPUTE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store the eight planes of all words; z holds the zero of each plane, biased."""
    o_w = tl.arange(0, COUNT)
    b_q = tl.load(w_ptr + o_w)
    for i in tl.static_range(8):
        b_add = crumbs.addend(tl.load(z_ptr + i) + tl.zeros((COUNT,), COMPUTE), i, BIAS, COMPUTE)
        tl.store(o_ptr + i * COUNT + o_w, crumbs.unpack_twin(b_q, b_add, i, COMPUTE))


@triton.jit  # type: ignore[untyped-decorator]
def eight_bits_kernel(w_ptr, z_ptr, o_ptr, COUNT: tl.constexpr, COMPUTE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store both planes of all words; z holds the zero of each plane."""
    o_w = tl.arange(0, COUNT)
    b_q = tl.load(w_ptr + o_w)
    for i in tl.static_range(2):
        b_add = octets.addend(tl.load(z_ptr + i) + tl.zeros((COUNT,), COMPUTE), COMPUTE)
        tl.store(o_ptr + i * COUNT + o_w, octets.unpack_twin(b_q, b_add, i, COMPUTE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_twins_are_code_minus_zero_for_every_word(dtype: torch.dtype) -> None:
    for first in (0, 2):
        zeros = torch.tensor([(first + i) % 5 for i in range(8)])
        bias = nibbles.NIBBLE_BIAS[dtype]
        out = torch.empty(8, 2**16, dtype=dtype, device=DEVICE)
        biased = (zeros + bias).to(DEVICE, dtype)
        two_bits_kernel[(1,)](WORDS.to(DEVICE), biased, out, BIAS=bias, COUNT=2**16, COMPUTE=COMPUTE[dtype])
        assert torch.equal(out.int().cpu(), codes_of(8) - zeros[:, None])
    for zeros in (torch.tensor([0, 256]), torch.tensor([128, 77])):
        out = torch.empty(2, 2**16, dtype=dtype, device=DEVICE)
        eight_bits_kernel[(1,)](WORDS.to(DEVICE), zeros.to(DEVICE, dtype), out, COUNT=2**16, COMPUTE=COMPUTE[dtype])
        assert torch.equal(out.int().cpu(), codes_of(2) - zeros[:, None])


def test_the_bf16_twins_in_torch() -> None:
    # The interpreter has no bf16; the same expressions, in torch.
    for i in range(8):
        made = ((WORDS >> 6 * (i // 3) & 3 << 2 * (i % 3)) | 0x4300).view(torch.bfloat16)
        for zero in range(5):
            found = made / 4 ** (i % 3) + torch.tensor(-(128 / 4 ** (i % 3) + zero), dtype=torch.bfloat16)
            assert torch.equal(found.int(), codes_of(8)[i] - zero)
    for i in range(2):
        codes = WORDS >> 8 * i & 0xFF
        low, high = ((codes & 0x7F) | 0x4300).view(torch.bfloat16), ((codes & 0x80) ^ -0x3C80).view(torch.bfloat16)
        for zero in (0, 1, 128, 255, 256):
            assert torch.equal((low + high + (128 - zero)).int(), codes_of(2)[i] - zero)


@pytest.mark.parametrize(
    ("k", "group_size", "chunk"), [(128, 32, 128), (256, 64, 256), (192, 96, 128), (300, 300, 256)]
)
def test_a_word_holds_a_code_of_each_of_eight_planes(k: int, group_size: int, chunk: int) -> None:
    w = random_weight(3, k, group_size, 2, symmetric=True)
    words = w2a16.pack(w.codes, w.scales, None, group_size, torch.float16).weight.tolist()
    depth = chunk // 8
    for n in range(3):
        for column in range(k):
            start, inside = column - column % chunk, column % chunk
            assert words[n][start // 8 + inside % depth] >> 2 * (inside // depth) & 3 == w.codes[n, column]


@pytest.mark.parametrize(("k", "group_size", "chunk"), [(96, 32, 64), (256, 64, 128), (192, 96, 64), (200, 200, 128)])
def test_a_word_holds_a_code_of_each_half(k: int, group_size: int, chunk: int) -> None:
    w = random_weight(3, k, group_size, 8, symmetric=True)
    words = w8a16.pack(w.codes, w.scales, None, group_size, torch.float16).weight.tolist()
    for n in range(3):
        for column in range(k):
            start, inside = column - column % chunk, column % chunk
            assert (
                words[n][start // 2 + inside % (chunk // 2)] >> 8 * (inside // (chunk // 2)) & 255 == w.codes[n, column]
            )
