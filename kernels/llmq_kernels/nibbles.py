"""Four-bit codes to floats, without an instruction that converts.

A word of int16 holds four nibbles, one of each plane (`w4a16` says what a plane is). For tensor cores they become
16-bit floats: 0x6400 | n is the fp16 number 1024 + n, and 0x4300 | n the bf16 number 128 + n, both exact. Zeros are
stored with the same 1024 or 128 added, so that one packed subtraction gives code - zero, exactly, two weights at a
time. Folding scale and zero into one fused multiply-add instead would round (1024 + zero) * scale, which is a hundred
times larger than the weight.

For sums in float32 a nibble stays where it is in the word: 0x4B000000 | n << 4 i is the float32 number
2**23 + n * 2**(4 i), and one multiply-add, of which every step is exact, leaves n - zero.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

# What makes a float of a nibble n: NIBBLE_BIAS + n, exactly. float32 converts, and needs no trick.
NIBBLE_BIAS = {torch.float16: 1024, torch.bfloat16: 128, torch.float32: 0}

# One 32-bit register ($4) carries two neighbouring words; lop3 with 0xea is (a & b) | c. $5 holds two biased
# zeros for planes 0 and 1, $6 for planes 2 and 3: they differ where a chunk has two groups.
UNPACK_FP16 = tl.constexpr("""{
    .reg .b32 mask, bias, y, a, b, c, d;
    mov.b32 mask, 0x000f000f;
    mov.b32 bias, 0x64006400;
    lop3.b32 a, $4, mask, bias, 0xea;
    shr.u32 y, $4, 4;
    lop3.b32 b, y, mask, bias, 0xea;
    shr.u32 y, $4, 8;
    lop3.b32 c, y, mask, bias, 0xea;
    shr.u32 y, $4, 12;
    lop3.b32 d, y, mask, bias, 0xea;
    sub.f16x2 $0, a, $5;
    sub.f16x2 $1, b, $5;
    sub.f16x2 $2, c, $6;
    sub.f16x2 $3, d, $6;
}""")
# sm_80 has no bf16 subtraction: a - z is the fused z * -1 + a, also exact.
UNPACK_BF16 = tl.constexpr("""{
    .reg .b32 mask, bias, minus, y, a, b, c, d;
    mov.b32 mask, 0x000f000f;
    mov.b32 bias, 0x43004300;
    mov.b32 minus, 0xbf80bf80;
    lop3.b32 a, $4, mask, bias, 0xea;
    shr.u32 y, $4, 4;
    lop3.b32 b, y, mask, bias, 0xea;
    shr.u32 y, $4, 8;
    lop3.b32 c, y, mask, bias, 0xea;
    shr.u32 y, $4, 12;
    lop3.b32 d, y, mask, bias, 0xea;
    fma.rn.bf16x2 $0, $5, minus, a;
    fma.rn.bf16x2 $1, $5, minus, b;
    fma.rn.bf16x2 $2, $6, minus, c;
    fma.rn.bf16x2 $3, $6, minus, d;
}""")


@triton.jit
def unpack_asm(b_q, b_zlo, b_zhi, COMPUTE: tl.constexpr):
    """Return code - zero of the four planes of the int16 words b_q, as COMPUTE (16-bit); zeros are biased."""
    if COMPUTE == tl.float16:  # noqa: SIM300
        planes = tl.inline_asm_elementwise(
            asm=UNPACK_FP16,
            constraints="=r,=r,=r,=r,r,r,r",
            args=[b_q, b_zlo, b_zhi],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        planes = tl.inline_asm_elementwise(
            asm=UNPACK_BF16,
            constraints="=r,=r,=r,=r,r,r,r",
            args=[b_q, b_zlo, b_zhi],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return planes


@triton.jit
def biased_nibble(b_q, i: tl.constexpr, BIAS: tl.constexpr, COMPUTE: tl.constexpr):
    """Return BIAS + nibble i of the int16 words b_q, as COMPUTE."""
    b_n = (b_q >> (4 * i)) & 0xF
    if COMPUTE == tl.float16:  # noqa: SIM300
        b_w = (b_n | 0x6400).to(tl.float16, bitcast=True)
    elif COMPUTE == tl.bfloat16:  # noqa: SIM300
        b_w = (b_n | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        b_w = b_n.to(COMPUTE) + BIAS
    return b_w


@triton.jit
def unpack_twin(b_q, b_zlo, b_zhi, BIAS: tl.constexpr, COMPUTE: tl.constexpr):
    """Return what `unpack_asm` returns, by arithmetic that the interpreter and other GPUs can run."""
    b_0 = biased_nibble(b_q, 0, BIAS, COMPUTE) - b_zlo
    b_1 = biased_nibble(b_q, 1, BIAS, COMPUTE) - b_zlo
    b_2 = biased_nibble(b_q, 2, BIAS, COMPUTE) - b_zhi
    b_3 = biased_nibble(b_q, 3, BIAS, COMPUTE) - b_zhi
    return b_0, b_1, b_2, b_3


@triton.jit
def centred_nibble(b_q, b_z, two_23_bits, i: tl.constexpr):
    """Return nibble i of the int32 words b_q minus b_z float32, as float32; exact.

    two_23_bits is `layout.TWO_23_BITS`.
    """
    DOWN: tl.constexpr = 1.0 / (1 << (4 * i))
    b_f = (b_q & (0xF << (4 * i)) | two_23_bits).to(tl.float32, bitcast=True)
    return b_f * DOWN - (b_z + 8388608.0 * DOWN)
