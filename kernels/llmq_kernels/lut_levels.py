"""Levels of codes, in Triton kernels: what `lut_tiles` and `lut_sums` share.

**Sixteen levels, from registers.** Tiles on tensor cores want 16-bit weights, and a table of sixteen of them is eight
registers: four with the lower bytes of the levels, four with the upper ones. PRMT picks four bytes out of eight by the
nibbles of a selector, and a word of the packed weight, four nibbles, is such a selector. So two PRMT look the four
codes up in the lower and the upper half of the table, and a third one, whose selector has the highest bits of the
codes, takes of each pair the right one: six for both bytes of four weights, and four more put the bytes together. With
what prepares the selectors, two words are 25 instructions, three for each weight. A level fetched from memory would be
as many, and wait.

**More levels, or few tokens.** There a level is a load by its place. Tables are small and stay in the first-level
cache, which serves the 32 threads of a warp at once where their levels lie in one line of 128 bytes: always for 16
levels, of 256 levels a warp needs up to four. Sums are float32, and what a GPU runs is what the interpreter runs.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

# One 32-bit register ($4) carries two neighbouring words, each operand after it one table register twice: $5 to $11 are
# the lower bytes of levels 0 to 15, four each, $13 to $19 the upper ones.
LOOK_UP = tl.constexpr("""{
    .reg .b32 mask, three, s, t, u, v, a, b, c, d, e, f, g, h;
    mov.b32 mask, 0x44444444;
    mov.b32 three, 0x32103210;
    and.b32 s, $4, 0x77777777;
    shr.u32 t, $4, 1;
    lop3.b32 t, t, mask, three, 0xea;
    shr.u32 u, s, 16;
    shr.u32 v, t, 16;
    prmt.b32 a, $5, $7, s;
    prmt.b32 b, $9, $11, s;
    prmt.b32 a, a, b, t;
    prmt.b32 b, $13, $15, s;
    prmt.b32 c, $17, $19, s;
    prmt.b32 b, b, c, t;
    prmt.b32 c, $6, $8, u;
    prmt.b32 d, $10, $12, u;
    prmt.b32 c, c, d, v;
    prmt.b32 d, $14, $16, u;
    prmt.b32 e, $18, $20, u;
    prmt.b32 d, d, e, v;
    prmt.b32 e, a, c, 0x5140;
    prmt.b32 f, a, c, 0x7362;
    prmt.b32 g, b, d, 0x5140;
    prmt.b32 h, b, d, 0x7362;
    prmt.b32 $0, e, g, 0x5140;
    prmt.b32 $1, e, g, 0x7362;
    prmt.b32 $2, f, h, 0x5140;
    prmt.b32 $3, f, h, 0x7362;
}""")
# Eight registers of two levels each, $8 to $15, become the eight of LOOK_UP.
BYTES = tl.constexpr("""{
    prmt.b32 $0, $8, $9, 0x6420;
    prmt.b32 $1, $10, $11, 0x6420;
    prmt.b32 $2, $12, $13, 0x6420;
    prmt.b32 $3, $14, $15, 0x6420;
    prmt.b32 $4, $8, $9, 0x7531;
    prmt.b32 $5, $10, $11, 0x7531;
    prmt.b32 $6, $12, $13, 0x7531;
    prmt.b32 $7, $14, $15, 0x7531;
}""")


@triton.jit
def first_level(g_ptr, o_g, OWN: tl.constexpr, LEVELS: tl.constexpr):
    """Return where the tables of groups o_g begin, [., 1]: one place where there is one table for all."""
    if OWN:
        o_t = o_g.to(tl.int64)[:, None] * LEVELS
    elif g_ptr is not None:
        o_t = tl.load(g_ptr + o_g).to(tl.int32)[:, None] * LEVELS
    else:
        o_t = tl.zeros((1, 1), tl.int32)
    return o_t


@triton.jit
def scale_of(s_ptr, o_g, BLOCK_N: tl.constexpr):
    """Return the scales of groups o_g, float32 [BLOCK_N, 1]."""
    b_s = tl.full((BLOCK_N, 1), 1.0, tl.float32)
    if s_ptr is not None:
        b_s = tl.load(s_ptr + o_g).to(tl.float32)[:, None]
    return b_s


@triton.jit
def group_of(i_c, stride_sg, o_n, plane: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Return the places of scales, for plane 0 to 3 of chunk i_c and outputs o_n: below 2**31 up to 2**36 weights."""
    return (i_c * CHUNK + plane * (CHUNK // 4)) // GROUP * stride_sg + o_n


@triton.jit
def level(t_ptr, o_t, b_q, i: tl.constexpr):
    """Return the level of nibble i of the int32 words b_q, in float32."""
    return tl.load(t_ptr + (o_t + (b_q >> (4 * i) & 0xF))).to(tl.float32)


@triton.jit
def table_bytes(t_ptr, o_t):
    """Return the tables of 16 levels that begin at o_t as the eight operands of LOOK_UP."""
    p_t = t_ptr.to(tl.pointer_type(tl.int32)) + o_t // 2
    b_0, b_1, b_2, b_3 = tl.load(p_t), tl.load(p_t + 1), tl.load(p_t + 2), tl.load(p_t + 3)
    b_4, b_5, b_6, b_7 = tl.load(p_t + 4), tl.load(p_t + 5), tl.load(p_t + 6), tl.load(p_t + 7)
    return tl.inline_asm_elementwise(
        asm=BYTES,
        constraints="=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r",
        args=[b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def planes_asm(b_q, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7, COMPUTE: tl.constexpr):
    """Return the levels of the four planes of the int16 words b_q, as COMPUTE (16-bit)."""
    b_w0, b_w1, b_w2, b_w3 = tl.inline_asm_elementwise(
        asm=LOOK_UP,
        constraints="=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        args=[b_q, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True,
        pack=2,
    )
    b_w0, b_w1 = b_w0.to(COMPUTE, bitcast=True), b_w1.to(COMPUTE, bitcast=True)
    return b_w0, b_w1, b_w2.to(COMPUTE, bitcast=True), b_w3.to(COMPUTE, bitcast=True)


@triton.jit
def planes_twin(t_ptr, o_t, b_q, COMPUTE: tl.constexpr):
    """Return what `planes_asm` does, by loads, from the tables that begin at o_t."""
    b_i = b_q.to(tl.int32)
    b_w0 = level(t_ptr, o_t, b_i, 0).to(COMPUTE)
    b_w1 = level(t_ptr, o_t, b_i, 1).to(COMPUTE)
    b_w2 = level(t_ptr, o_t, b_i, 2).to(COMPUTE)
    b_w3 = level(t_ptr, o_t, b_i, 3).to(COMPUTE)
    return b_w0, b_w1, b_w2, b_w3


@triton.jit
def planes(t_ptr, o_t, b_q, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    """Return the levels of the four planes of the int16 words b_q, from the tables that begin at o_t."""
    if ASM:
        b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7 = table_bytes(t_ptr, o_t)
        b_w0, b_w1, b_w2, b_w3 = planes_asm(b_q, b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7, COMPUTE)
    else:
        b_w0, b_w1, b_w2, b_w3 = planes_twin(t_ptr, o_t, b_q, COMPUTE)
    return b_w0, b_w1, b_w2, b_w3
