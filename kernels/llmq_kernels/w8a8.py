"""8-bit weights times activations that become 8-bit integers on the way (W8A8), in Triton.

y = (xq @ wqᵀ) * token scale * weight scale + bias. Weights have one scale per output and codes in -127..127; tokens get
scales of their own, max|x| / 127, or share one that is given. Products are integers and exact: no sum of K products of
127 * 127 leaves int32 up to `MAX_K` inputs.

**Rounding without conversion.** From 2**23 on float32 numbers are whole: x * inverse + 1.5 * 2**23 is rounded to the
nearest whole number, the even one in ties, and its last byte is the code. Nothing may fuse the two operations, or codes
would differ from those of `naive` and of the CPU; so these kernels are compiled without fusing.

**Where tokens are quantized.** Each program of the product can do it for itself: it looks for the largest number of its
tokens, then quantizes as it walks along K. That is one launch, and reads activations three bytes more per number and
tile of outputs than a product that finds them quantized, all of it from the second-level cache. A kernel before the
product is a second launch, about 2 µs even in a CUDA graph, in which such a cache delivers some 8 MiB. `fuses` compares
the two: 8 tokens of 4096 inputs are fused up to N = 5440, one token up to N = 43648. For more tokens the same codes
would be made again by every tile of outputs, with more instructions than the tensor cores take.

**No split of K.** It would cost a launch; tiles of 32 outputs fill a GPU from N = 4096 on, and narrower layers wait.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels import launch
from llmq_kernels.layout import ACTIVATIONS, TILE_N

MAX_CODE = 127  # -128 is no code: products and sums are symmetric, and MAX_K is the larger for it
MAX_K = (2**31 - 1) // MAX_CODE**2  # 133144

BLOCK_K = 128
FUSED_M = 8  # tokens of the fused tile: half of its instructions are there to quantize them, so no more than needed
FUSED_BYTES = 2**23
SWEEP = 512  # inputs of FUSED_M tokens that are looked at together
QUANTIZE_BLOCK = 4096  # inputs of one token
QUANTIZE_WARPS = 4

ROUNDER: tl.constexpr = tl.constexpr(1.5 * 2**23)
NOT_FINITE: tl.constexpr = tl.constexpr(0x7F800000)  # the bits of infinity; those of every NaN are above
LEAST: tl.constexpr = tl.constexpr(2.0**-100)  # 127 / less may overflow; such tokens count as zero

# Products are rounded before 1.5 * 2**23 is added: see above.
COMPILE_OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Tile:
    """Tile sizes of the product, for one range of M."""

    max_m: int  # the last M that it is for; the last row takes any M
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Tokens that are quantized: 96 KiB in three stages is what sm_86 and sm_89 have.
TILES = (
    Tile(16, 16, 64, 4, 5),
    Tile(32, 32, 64, 4, 4),
    Tile(64, 64, 128, 4, 3),
    Tile(512, 128, 128, 8, 3),
)
# Tokens that are not yet: for few outputs, and for many.
FUSED = (Tile(FUSED_M, FUSED_M, 32, 4, 4), Tile(FUSED_M, FUSED_M, 64, 4, 4))


@triton.jit
def magnitude(b_x):
    """Return the bits of |x| of b_x float32: ordered as the numbers are, NaN above all."""
    return b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_and_inverse(b_top, a_ptr):
    """Return the scales of tokens, and what to multiply with, float32; b_top has the bits of their largest numbers.

    With a_ptr the scale there is that of all. A token that is not finite gets NaN for a scale.
    """
    b_bad = b_top >= NOT_FINITE
    if a_ptr is not None:
        b_scale = tl.load(a_ptr) + tl.zeros(b_top.shape, tl.float32)
        b_inverse = tl.div_rn(tl.full(b_top.shape, 1.0, tl.float32), b_scale)
    else:
        b_largest = tl.where(b_bad, 1.0, b_top.to(tl.float32, bitcast=True))
        b_largest = tl.maximum(b_largest, LEAST)
        b_scale = tl.div_rn(b_largest, tl.full(b_top.shape, 127.0, tl.float32))
        b_inverse = tl.div_rn(tl.full(b_top.shape, 127.0, tl.float32), b_largest)
    return tl.where(b_bad, float("nan"), b_scale), b_inverse


@triton.jit
def codes_of(b_x, b_inverse, CLAMP: tl.constexpr):
    """Return the int8 codes of b_x float32."""
    b_x = b_x * b_inverse
    if CLAMP:
        b_x = tl.minimum(tl.maximum(b_x, -127.0), 127.0)
    return (b_x + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def quantize_tokens_kernel(x_ptr, a_ptr, q_ptr, s_ptr, K, stride_xm, stride_qm, BLOCK: tl.constexpr):
    """Store the codes of x [M, K] in q int8 [M, Kp], 0 beyond K, and scales in s float32 [M]; grid (M,).

    a float32 [1] is a scale for all tokens, or None.
    """
    i_m = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK)
    p_x = x_ptr + i_m * stride_xm
    b_top = tl.zeros((BLOCK,), tl.int32)
    for i in range(0, K, BLOCK):
        b_x = tl.load(p_x + i + o_k, mask=i + o_k < K, other=0.0).to(tl.float32)
        b_top = tl.maximum(b_top, magnitude(b_x))
    b_scale, b_inverse = scale_and_inverse(tl.max(b_top, axis=0, keep_dims=True), a_ptr)
    for i in range(0, stride_qm, BLOCK):
        b_x = tl.load(p_x + i + o_k, mask=i + o_k < K, other=0.0).to(tl.float32)
        b_q = codes_of(b_x, b_inverse, a_ptr is not None)
        tl.store(q_ptr + i_m * stride_qm + i + o_k, b_q, mask=i + o_k < stride_qm)
    tl.store(s_ptr + i_m + tl.arange(0, 1), b_scale)


@triton.jit
def largest_of_tokens(x_ptr, o_m, mask_m, K, stride_xm, SWEEP: tl.constexpr):
    """Return the bits of the largest |x| of the tokens o_m int64."""
    o_k = tl.arange(0, SWEEP)[:, None]
    p_x = x_ptr + o_m[None, :] * stride_xm + o_k
    b_top = tl.zeros((SWEEP, o_m.shape[0]), tl.int32)
    for i in range(0, K, SWEEP):
        b_x = tl.load(p_x, mask=mask_m & (i + o_k < K), other=0.0).to(tl.float32)
        b_top = tl.maximum(b_top, magnitude(b_x))
        p_x += SWEEP
    return tl.max(b_top, axis=0)


@triton.jit
def w8a8_kernel(
    x_ptr,
    a_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    o_ptr,
    M,
    N,
    K,
    steps,
    stride_xm,
    stride_wn,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWEEP: tl.constexpr,
):
    """Store a tile of y [M, N]; grid (N tiles, M tiles).

    w int8 [Np, Kp] and s float32 [Np], as `pack` made them; b [N] or None. x is int8 [M, Kp] with a float32 [M], or as
    it came [M, K], with a float32 [1] as a scale for all tokens, or None.
    """
    IS_QUANTIZED: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    i_n, i_m = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    mask_m = (o_m < M)[None, :]

    if IS_QUANTIZED:
        b_scale = tl.load(a_ptr + o_m, mask=o_m < M, other=0.0)
    else:
        b_top = largest_of_tokens(x_ptr, o_m, mask_m, K, stride_xm, SWEEP)
        b_scale, b_inverse = scale_and_inverse(b_top, a_ptr)

    p_w = w_ptr + o_n.to(tl.int64)[:, None] * stride_wn + o_k[None, :]
    p_x = x_ptr + o_m[None, :] * stride_xm + o_k[:, None]
    b_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for i in range(steps):
        b_w = tl.load(p_w)
        mask = mask_m
        if not (EVEN_K or IS_QUANTIZED):
            mask = mask_m & ((i * BLOCK_K + o_k)[:, None] < K)
        b_x = tl.load(p_x, mask=mask, other=0)
        if not IS_QUANTIZED:
            b_x = codes_of(b_x.to(tl.float32), b_inverse[None, :], a_ptr is not None)
        b_acc = tl.dot(b_w, b_x, b_acc, out_dtype=tl.int32)
        p_w += BLOCK_K
        p_x += BLOCK_K

    b_y = b_acc.to(tl.float32) * b_scale[None, :] * tl.load(s_ptr + o_n)[:, None]
    if b_ptr is not None:
        b_y += tl.load(b_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
    p_o = o_ptr + o_m[None, :] * N + o_n[:, None]
    tl.store(p_o, b_y.to(o_ptr.dtype.element_ty), mask=mask_m & (o_n < N)[:, None])


def refuses(n: int, k: int, dtype: torch.dtype) -> str | None:
    """Return why `matmul` cannot multiply with an [n, k] weight and activations of `dtype`, or None if it can."""
    if n < 1 or k < 1:
        return f"weight [{n}, {k}]: is empty"
    if k > MAX_K:
        return f"K = {k}: sums of more than {MAX_K} products leave int32"
    if dtype not in ACTIVATIONS:
        return f"{dtype}: needs float16, bfloat16 or float32 activations"
    return None


def pack(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight int8 [Np, Kp] and the scales float32 [Np] of `matmul`, padded with zeros.

    codes int8 [N, K] in -127..127; scales [N], finite. ValueError says which argument does not fit.
    """
    if codes.ndim != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes: {codes.dtype} {list(codes.shape)}; needs int8 [N, K]")
    n, k = codes.shape
    reason = refuses(n, k, torch.float32)
    if reason is not None:
        raise ValueError(f"codes [{n}, {k}]: {reason}")
    if int(codes.min()) < -MAX_CODE:
        raise ValueError(f"codes: smallest is {int(codes.min())}; needs -{MAX_CODE}..{MAX_CODE}")
    if scales.shape != (n,) or not bool(torch.isfinite(scales.float()).all()):
        raise ValueError(f"scales {list(scales.shape)}: needs [{n}], all finite in float32")
    padded = torch.nn.functional.pad(codes, (0, -k % BLOCK_K, 0, -n % TILE_N)).contiguous()
    return padded, torch.nn.functional.pad(scales.float(), (0, -n % TILE_N))


def unpack(weight: Tensor, scales: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Return codes int8 [N, K] and scales float32 [N]: the inverse of `pack`."""
    return weight[:n, :k].contiguous(), scales[:n].clone()


def fuses(m: int, n: int, k: int) -> bool:
    """Return whether a product with m tokens quantizes them itself, in one launch; the module says why."""
    return m <= FUSED_M and 3 * m * k * -(-n // FUSED[-1].block_n) <= FUSED_BYTES


def pick(m: int, n: int, k: int, processors: int) -> tuple[bool, Tile]:
    """Return whether the product quantizes tokens itself, and its tile, on a GPU of so many SMs."""
    if fuses(m, n, k):
        return True, FUSED[-(-n // FUSED[-1].block_n) >= processors]
    return False, next((tile for tile in TILES if m <= tile.max_m), TILES[-1])


def quantize_tokens(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return codes int8 [M, Kp], padded with zeros, and scales float32 [M] of x [M, K], rows contiguous."""
    m, k = x.shape
    codes = torch.empty((m, k + -k % BLOCK_K), dtype=torch.int8, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    with launch.on(x.device):
        quantize_tokens_kernel[(m,)](
            x_ptr=x,
            a_ptr=scale,
            q_ptr=codes,
            s_ptr=scales,
            K=k,
            stride_xm=x.stride(0),
            stride_qm=codes.stride(0),
            BLOCK=QUANTIZE_BLOCK,
            num_warps=QUANTIZE_WARPS,
            **COMPILE_OPTIONS,
        )
    return codes, scales


def matmul(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, k: int, *, scale: Tensor | None = None
) -> Tensor:
    """Return what `naive.int8_linear` does, [M, N] in the dtype of x, with sums that are exact.

    A token with a NaN or an infinity becomes NaN throughout, and no other. Tokens below 2**-100 count as zero.

    Args:
        x: [M, K] float16, bfloat16 or float32, of any strides.
        weight: int8 [Np, Kp], from `pack`, as are the scales float32 [Np].
        scales: see `weight`.
        bias: [N], any real dtype, or None.
        n: outputs.
        k: inputs.
        scale: for all tokens, float32 with one entry, positive; values beyond 127 of it are cut off. None: each token
            has its own.

    Raises:
        ValueError: an argument does not fit; the message says which.
    """
    _check(x, weight, scales, bias, n, k, scale)
    m = len(x)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if not m:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    fused, tile = pick(m, n, k, launch.processors(x.device))
    operands = (x, scale) if fused else quantize_tokens(x, scale)
    _multiply(*operands, tile, weight, scales, bias, out)
    return out


def _multiply(
    x: Tensor, scale: Tensor | None, tile: Tile, weight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Store the product of x [M, K], quantized or not, in out [M, N]."""
    (m, n), width = out.shape, weight.shape[1]
    with launch.on(x.device):
        w8a8_kernel[(-(-n // tile.block_n), -(-m // tile.block_m))](
            x_ptr=x,
            a_ptr=scale,
            w_ptr=weight,
            s_ptr=scales,
            b_ptr=bias,
            o_ptr=out,
            M=m,
            N=n,
            K=x.shape[1],
            steps=width // BLOCK_K,
            stride_xm=x.stride(0),
            stride_wn=weight.stride(0),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **COMPILE_OPTIONS,
            **constants(tile, x.shape[1]),
        )


def constants(tile: Tile, k: int) -> dict[str, int | bool]:
    """Return the compile-time arguments of the product: for the launcher and for the report on machine code."""
    sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": BLOCK_K, "SWEEP": SWEEP}
    return {**sizes, "EVEN_K": k % BLOCK_K == 0}


def _check(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, k: int, scale: Tensor | None
) -> None:
    """Raise ValueError unless the kernels may assume all shapes, dtypes, strides and devices."""
    reason = refuses(n, k, x.dtype)
    if reason is not None:
        raise ValueError(f"weight [{n}, {k}]: {reason}")
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x {list(x.shape)}: needs [M, {k}]")
    rows, width = n + -n % TILE_N, k + -k % BLOCK_K
    needs = [
        ("weight", weight, (rows, width), torch.int8),
        ("scales", scales, (rows,), torch.float32),
        ("bias", bias, (n,), None),
        ("scale", None if scale is None else scale.view(-1), (1,), torch.float32),
    ]
    for name, tensor, shape, dtype in needs:
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != (dtype or tensor.dtype) or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)}; needs contiguous {dtype or 'numbers'} {list(shape)}"
                f" for an [{n}, {k}] weight"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, but x is on {x.device}")
    if x.device.type == "cpu" and not launch.interpreted(w8a8_kernel):
        raise ValueError("x: on cpu; Triton kernels need a GPU, or TRITON_INTERPRET=1 set before they are imported")
