"""Eight-bit codes to floats, as `nibbles` does it for four bits.

A word of int16 holds two codes, one of each plane. 0x6400 | code is the fp16 number 1024 + code, which one permutation
of bytes makes for both codes of a register, and one addition centres. bf16 has 7 bits after the point, one too few. So
the lower seven make 128 + (code & 127), and the highest makes -128 or, without it, -256, being the last bit of an
exponent; their sum is code - 128, exactly, and where zeros are not 128 a second addition makes code - zero of it,
exactly too.

For sums in float32, 2**23 + code * 256**i are exact, as for nibbles.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

# One 32-bit register ($2) carries two neighbouring words; $3 and $4 what to add to each plane, twice. lop3 with 0xea is
# (a & b) | c, with 0x6a (a & b) ^ c. Products with 1 because sm_80 has no bf16 addition.
UNPACK_FP16 = tl.constexpr("""{
    .reg .b32 k, a, b;
    mov.b32 k, 0x64646464;
    prmt.b32 a, $2, k, 0x4240;
    prmt.b32 b, $2, k, 0x4341;
    add.f16x2 $0, a, $3;
    add.f16x2 $1, b, $4;
}""")
_BF16 = """{
    .reg .b32 seven, eighth, bias, high, one, y, a, b, c, d;
    mov.b32 seven, 0x007f007f;
    mov.b32 eighth, 0x00800080;
    mov.b32 bias, 0x43004300;
    mov.b32 high, 0xc380c380;
    mov.b32 one, 0x3f803f80;
    lop3.b32 a, $2, seven, bias, 0xea;
    lop3.b32 b, $2, eighth, high, 0x6a;
    shr.u32 y, $2, 8;
    lop3.b32 c, y, seven, bias, 0xea;
    lop3.b32 d, y, eighth, high, 0x6a;
"""
UNPACK_BF16 = tl.constexpr(
    _BF16
    + """    fma.rn.bf16x2 a, a, one, b;
    fma.rn.bf16x2 c, c, one, d;
    fma.rn.bf16x2 $0, a, one, $3;
    fma.rn.bf16x2 $1, c, one, $4;
}"""
)
UNPACK_BF16_MIDDLE = tl.constexpr(
    _BF16
    + """    fma.rn.bf16x2 $0, a, one, b;
    fma.rn.bf16x2 $1, c, one, d;
}"""
)


@triton.jit
def addend(b_z, COMPUTE: tl.constexpr):
    """Return what to add to what bits make of a code, as COMPUTE, for zeros b_z; exact."""
    MADE: tl.constexpr = -1024.0 if COMPUTE == tl.float16 else (128.0 if COMPUTE == tl.bfloat16 else 0.0)  # noqa: SIM300
    return (MADE - b_z.to(tl.float32)).to(COMPUTE)


@triton.jit
def unpack_asm(b_q, b_lo, b_hi, MIDDLE: tl.constexpr, COMPUTE: tl.constexpr):
    """Return code - zero of both planes of the int16 words b_q, as COMPUTE (16-bit), given their addends.

    MIDDLE: all zeros are 128.
    """
    if COMPUTE == tl.float16:  # noqa: SIM300
        planes = tl.inline_asm_elementwise(
            asm=UNPACK_FP16,
            constraints="=r,=r,r,r,r",
            args=[b_q, b_lo, b_hi],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif MIDDLE:
        planes = tl.inline_asm_elementwise(
            asm=UNPACK_BF16_MIDDLE,
            constraints="=r,=r,r",
            args=[b_q],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        planes = tl.inline_asm_elementwise(
            asm=UNPACK_BF16,
            constraints="=r,=r,r,r,r",
            args=[b_q, b_lo, b_hi],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return planes


@triton.jit
def unpack_twin(b_q, b_add, i: tl.constexpr, COMPUTE: tl.constexpr):
    """Return plane i of what `unpack_asm` returns, by arithmetic that the interpreter and other GPUs can run."""
    b_n = (b_q >> (8 * i)) & 0xFF
    if COMPUTE == tl.float16:  # noqa: SIM300
        b_w = (b_n | 0x6400).to(tl.float16, bitcast=True)
    elif COMPUTE == tl.bfloat16:  # noqa: SIM300
        b_low = ((b_n & 0x7F) | 0x4300).to(tl.bfloat16, bitcast=True)
        b_w = b_low + ((b_n & 0x80) ^ -0x3C80).to(tl.bfloat16, bitcast=True)  # 0xC380 as int16
    else:
        b_w = b_n.to(COMPUTE)
    return b_w + b_add


@triton.jit
def centred_octet(b_q, b_z, two_23_bits, i: tl.constexpr):
    """Return plane i of the int32 words b_q minus b_z float32, as float32; exact.

    two_23_bits is `layout.TWO_23_BITS`.
    """
    DOWN: tl.constexpr = 1.0 / (1 << (8 * i))
    b_f = (b_q & (0xFF << (8 * i)) | two_23_bits).to(tl.float32, bitcast=True)
    return b_f * DOWN - (b_z + 8388608.0 * DOWN)
