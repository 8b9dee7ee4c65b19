"""Entries of a codebook of vectors, in Triton kernels: what `vector_tiles` and `vector_sums` share.

**Looked up in shared memory.** A program holds the codebook in registers; `tl.gather` moves it to shared memory and
takes one 32-bit word for each code. The 32 banks serve 32 threads at once unless two want different words of one bank,
which for random codes makes a load 3.2 times as long. The same load from the first-level cache would wait for every
line of 128 bytes that some thread wants, eight where there are 256 words. (Entries of 16-bit numbers would need no
conversion, and twice the banks.)

**How an entry lies.** Numbers are int8, held as bytes of number + 128, and four of them are a word: columns 0, 2, 1, 3,
from the lowest byte on. So the even bytes are a pair of neighbours, a 16-bit number apart, and the odd ones the next
pair. Of two columns the even bytes alone are used; eight columns are two words, in tables one after the other.

**How bytes become floats** says `octets`: pairs of 16 bits in assembly, with a twin, and float32 without assembly.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from llmq_kernels.octets import centred_octet

# A word ($4) becomes four 16-bit numbers, in the order of their columns: $0 and $1 from the even bytes, then the odd.
# -1152 undoes the 1024 of 0x64 and the 128; products with 1 because sm_80 has no bf16 addition.
NUMBERS_FP16 = tl.constexpr("""{
    .reg .b32 k, c, a, b;
    mov.b32 k, 0x64646464;
    mov.b32 c, 0xe480e480;
    prmt.b32 a, $4, k, 0x4240;
    prmt.b32 b, $4, k, 0x4341;
    add.f16x2 a, a, c;
    add.f16x2 b, b, c;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
}""")
NUMBERS_BF16 = tl.constexpr("""{
    .reg .b32 seven, eighth, bias, high, one, y, a, b, c, d;
    mov.b32 seven, 0x007f007f;
    mov.b32 eighth, 0x00800080;
    mov.b32 bias, 0x43004300;
    mov.b32 high, 0xc380c380;
    mov.b32 one, 0x3f803f80;
    lop3.b32 a, $4, seven, bias, 0xea;
    lop3.b32 b, $4, eighth, high, 0x6a;
    shr.u32 y, $4, 8;
    lop3.b32 c, y, seven, bias, 0xea;
    lop3.b32 d, y, eighth, high, 0x6a;
    fma.rn.bf16x2 a, a, one, b;
    fma.rn.bf16x2 c, c, one, d;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, c;
}""")


@triton.jit
def words_of(t_ptr, i: tl.constexpr, ENTRIES: tl.constexpr):
    """Return word i of every entry of the codebook t [., ENTRIES], int32 [ENTRIES]."""
    return tl.load(t_ptr + i * ENTRIES + tl.arange(0, ENTRIES))


@triton.jit
def look_up(b_t, b_q):
    """Return the words of b_t [ENTRIES] that the int32 codes b_q [., .] name."""
    flat = tl.reshape(b_q, (b_q.shape[0] * b_q.shape[1],))
    return tl.reshape(tl.gather(b_t, flat, 0), b_q.shape)


@triton.jit
def floats(b_v, two_23_bits):
    """Return the four numbers of the words b_v, in the order of their columns, as float32; exact.

    two_23_bits is `layout.TWO_23_BITS`. Of two columns only the first two numbers mean anything.
    """
    b_h = b_v >> 16
    b_0, b_1 = centred_octet(b_v, 128.0, two_23_bits, 0), centred_octet(b_h, 128.0, two_23_bits, 0)
    b_2, b_3 = centred_octet(b_v, 128.0, two_23_bits, 1), centred_octet(b_h, 128.0, two_23_bits, 1)
    return b_0, b_1, b_2, b_3


@triton.jit
def numbers(b_v, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    """Return what `floats` does as COMPUTE, with ASM by assembly (16-bit)."""
    if ASM:
        b_0, b_1, b_2, b_3 = tl.inline_asm_elementwise(
            asm=NUMBERS_FP16 if COMPUTE == tl.float16 else NUMBERS_BF16,  # noqa: SIM300
            constraints="=h,=h,=h,=h,r",
            args=[b_v],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
        b_0, b_1 = b_0.to(COMPUTE, bitcast=True), b_1.to(COMPUTE, bitcast=True)
        b_2, b_3 = b_2.to(COMPUTE, bitcast=True), b_3.to(COMPUTE, bitcast=True)
    else:
        b_0, b_1 = ((b_v & 0xFF) - 128).to(COMPUTE), ((b_v >> 16 & 0xFF) - 128).to(COMPUTE)
        b_2, b_3 = ((b_v >> 8 & 0xFF) - 128).to(COMPUTE), ((b_v >> 24 & 0xFF) - 128).to(COMPUTE)
    return b_0, b_1, b_2, b_3


@triton.jit
def joined(a_0, a_1, a_2, a_3, b_0, b_1, b_2, b_3, D: tl.constexpr):
    """Return the columns of entries [., P] side by side, [., D * P]: a are the first four, b the next."""
    if D == 2:
        b_w = tl.join(a_0, a_1)
    elif D == 4:
        b_w = tl.join(tl.join(a_0, a_2), tl.join(a_1, a_3))
    else:
        b_even = tl.join(tl.join(a_0, b_0), tl.join(a_2, b_2))
        b_w = tl.join(b_even, tl.join(tl.join(a_1, b_1), tl.join(a_3, b_3)))
    return tl.reshape(b_w, (a_0.shape[0], D * a_0.shape[1]))
