"""Two-bit codes to floats, as `nibbles` does it for four bits, with fewer shifts.

A word of int16 holds eight codes, one of each plane. 0x6400 | code << 2 j is the fp16 number 1024 + code * 4**j, and
0x4300 | code << 2 j the bf16 number 128 + code * 4**j, exactly, for j = 0, 1, 2. So three planes stay where they are,
three more are there after one shift by 6, and the last two after one by 12. A multiply-add, of which every step is
exact, moves them down and takes the zero away: code - zero = number * 4**-j - (bias * 4**-j + zero).

For sums in float32 no plane is shifted, since its mantissa has room for all of the word.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

_UNPACK = """{{
    .reg .b32 m0, m1, m2, bias, one, quarter, sixteenth, y, a;
    mov.b32 m0, 0x00030003;
    mov.b32 m1, 0x000c000c;
    mov.b32 m2, 0x00300030;
    mov.b32 bias, {bias};
    mov.b32 one, {one};
    mov.b32 quarter, {quarter};
    mov.b32 sixteenth, {sixteenth};
    lop3.b32 a, $8, m0, bias, 0xea;
    fma.rn.{type} $0, a, one, $9;
    lop3.b32 a, $8, m1, bias, 0xea;
    fma.rn.{type} $1, a, quarter, $10;
    lop3.b32 a, $8, m2, bias, 0xea;
    fma.rn.{type} $2, a, sixteenth, $11;
    shr.u32 y, $8, 6;
    lop3.b32 a, y, m0, bias, 0xea;
    fma.rn.{type} $3, a, one, $12;
    lop3.b32 a, y, m1, bias, 0xea;
    fma.rn.{type} $4, a, quarter, $13;
    lop3.b32 a, y, m2, bias, 0xea;
    fma.rn.{type} $5, a, sixteenth, $14;
    shr.u32 y, $8, 12;
    lop3.b32 a, y, m0, bias, 0xea;
    fma.rn.{type} $6, a, one, $15;
    lop3.b32 a, y, m1, bias, 0xea;
    fma.rn.{type} $7, a, quarter, $16;
}}"""
# One 32-bit register ($8) carries two neighbouring words; lop3 with 0xea is (a & b) | c. $9 to $16: what to add to each
# plane, twice. The first products are with 1 because sm_80 has no bf16 addition.
UNPACK_FP16 = tl.constexpr(
    _UNPACK.format(type="f16x2", bias="0x64006400", one="0x3c003c00", quarter="0x34003400", sixteenth="0x2c002c00")
)
UNPACK_BF16 = tl.constexpr(
    _UNPACK.format(type="bf16x2", bias="0x43004300", one="0x3f803f80", quarter="0x3e803e80", sixteenth="0x3d803d80")
)


@triton.jit
def addend(b_z, i: tl.constexpr, BIAS: tl.constexpr, COMPUTE: tl.constexpr):
    """Return what to add to the numbers of plane i, as COMPUTE, for zeros b_z with BIAS added; exact."""
    IN_PLACE: tl.constexpr = BIAS / (1 << (2 * (i % 3))) if COMPUTE != tl.float32 else 0.0  # noqa: SIM300
    return (BIAS - IN_PLACE - b_z.to(tl.float32)).to(COMPUTE)


@triton.jit
def unpack_asm(b_q, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7, COMPUTE: tl.constexpr):
    """Return code - zero of the eight planes of the int16 words b_q, as COMPUTE (16-bit), given their addends."""
    if COMPUTE == tl.float16:  # noqa: SIM300
        planes = tl.inline_asm_elementwise(
            asm=UNPACK_FP16,
            constraints="=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            args=[b_q, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=2,
        )
    else:
        planes = tl.inline_asm_elementwise(
            asm=UNPACK_BF16,
            constraints="=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r",
            args=[b_q, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=2,
        )
    return planes


@triton.jit
def unpack_twin(b_q, b_add, i: tl.constexpr, COMPUTE: tl.constexpr):
    """Return plane i of what `unpack_asm` returns, by arithmetic that the interpreter and other GPUs can run."""
    DOWN: tl.constexpr = 1.0 / (1 << (2 * (i % 3)))
    b_n = (b_q >> (6 * (i // 3))) & (3 << (2 * (i % 3)))
    if COMPUTE == tl.float16:  # noqa: SIM300
        b_w = (b_n | 0x6400).to(tl.float16, bitcast=True)
    elif COMPUTE == tl.bfloat16:  # noqa: SIM300
        b_w = (b_n | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        b_w = b_n.to(COMPUTE)
    return b_w * DOWN + b_add


@triton.jit
def centred_crumb(b_q, b_z, two_23_bits, i: tl.constexpr):
    """Return plane i of the int32 words b_q minus b_z float32, as float32; exact.

    two_23_bits is `layout.TWO_23_BITS`.
    """
    DOWN: tl.constexpr = 1.0 / (1 << (2 * i))
    b_f = (b_q & (3 << (2 * i)) | two_23_bits).to(tl.float32, bitcast=True)
    return b_f * DOWN - (b_z + 8388608.0 * DOWN)
