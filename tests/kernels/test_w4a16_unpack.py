"""Nibbles to floats: the assembly that GPUs run, emulated, and its twin that the interpreter runs, for all words."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE
from ptx_cases import WORDS, halves, pair, run_ptx
from torch import Tensor

from llmq_kernels import nibbles


@triton.jit  # type: ignore[untyped-decorator]
def twin_kernel(w_ptr, z_ptr, o_ptr, BIAS: tl.constexpr, COUNT: tl.constexpr, COMPUTE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store the four planes of all words; z holds the zeros of planes 0 and 1, and of planes 2 and 3."""
    o_w = tl.arange(0, COUNT)
    b_zlo = tl.load(z_ptr) + tl.zeros((COUNT,), COMPUTE)
    b_zhi = tl.load(z_ptr + 1) + tl.zeros((COUNT,), COMPUTE)
    b_0, b_1, b_2, b_3 = nibbles.unpack_twin(tl.load(w_ptr + o_w), b_zlo, b_zhi, BIAS, COMPUTE)
    tl.store(o_ptr + o_w, b_0)
    tl.store(o_ptr + COUNT + o_w, b_1)
    tl.store(o_ptr + 2 * COUNT + o_w, b_2)
    tl.store(o_ptr + 3 * COUNT + o_w, b_3)


def true_planes(zero_low: int, zero_high: int) -> Tensor:
    """Return code - zero of the four planes [4, 2**16], as integers."""
    zeros = (zero_low, zero_low, zero_high, zero_high)
    return torch.stack([(WORDS.int() >> 4 * i & 15) - zero for i, zero in enumerate(zeros)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, 6, 8, 13])  # and 16 less each, for planes 2 and 3
def test_assembly_is_code_minus_zero_for_every_word(dtype: torch.dtype, zero: int) -> None:
    asm = {torch.float16: nibbles.UNPACK_FP16, torch.bfloat16: nibbles.UNPACK_BF16}[dtype].value
    zeros = (zero, 16 - zero)
    biased = [torch.full(WORDS.shape, nibbles.NIBBLE_BIAS[dtype] + z, dtype=dtype) for z in zeros]
    registers = {"$4": pair(WORDS, WORDS.flip(0)), "$5": pair(biased[0], biased[0]), "$6": pair(biased[1], biased[1])}
    run_ptx(asm, registers, dtype)
    truth = true_planes(*zeros)
    for i in range(4):
        low, high = halves(registers[f"${i}"], dtype)
        assert torch.equal(low.int(), truth[i])
        assert torch.equal(high.int(), truth[i].flip(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_twin_is_code_minus_zero_for_every_word(dtype: torch.dtype) -> None:
    compute = {torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    out = torch.empty(4, 2**16, dtype=dtype, device=DEVICE)
    for zero in (0, 7, 8, 16):
        biased = torch.tensor([zero, 16 - zero], dtype=dtype, device=DEVICE) + nibbles.NIBBLE_BIAS[dtype]
        twin_kernel[(1,)](WORDS.to(DEVICE), biased, out, BIAS=nibbles.NIBBLE_BIAS[dtype], COUNT=2**16, COMPUTE=compute)
        assert torch.equal(out.int().cpu(), true_planes(zero, 16 - zero))


def test_the_bf16_twin_in_torch() -> None:
    # The interpreter has no bf16; the same expression, in torch.
    for zero in range(17):
        for i in range(4):
            biased = ((WORDS >> 4 * i & 0xF) | 0x4300).view(torch.bfloat16)
            twin = biased - torch.tensor(128 + zero, dtype=torch.bfloat16)
            assert torch.equal(twin.int(), true_planes(zero, zero)[i])
