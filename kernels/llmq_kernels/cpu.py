"""PyTorch's own weight-only operators for the CPU, behind the guards that they lack.

Two operators of aten, both bfloat16: 4-bit codes in groups (`int4_*`) and 8-bit codes with one scale per
row (`int8_*`). They read the packed weight once per 4 rows of activations, so they beat a bfloat16 matrix
product for few tokens (2.5 to 3.8 times at M = 1) and lose to it from about 12 tokens on: which to use is
up to the caller. Both accept fp16 and float32 too, but only through scalar code, slower than not quantizing
at all; they are refused.

What aten packs depends on the instruction set of the running machine. Pack at load, never store it.

Letters: N outputs, K inputs, G groups per row, M tokens.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# The group sizes of aten's 4-bit operator, largest first. A longer group is several of these with one scale.
_INT4_GROUPS = (256, 128, 64, 32)
_ROWS = 64  # outputs that aten packs together on processors with AVX-512


def int4_refuses(n: int, k: int, bits: int, group_size: int, dtype: torch.dtype) -> str | None:
    """Return why `int4_matmul` cannot multiply with an [n, k] weight of this kind, or None if it can."""
    if bits != 4:
        return f"bits {bits}: this operator multiplies with 4-bit codes"
    if dtype != torch.bfloat16:
        return f"{dtype} activations: computes in bfloat16 only"
    if n < 1 or n % 16:
        return f"N = {n}: needs a multiple of 16"
    if group_size < 1 or k < 1 or k % group_size:
        return f"group_size {group_size}: does not divide K = {k}"
    if group_size % 32:
        return f"group_size {group_size}: needs a multiple of 32"
    return None


def pack_int4(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the weight uint8 [N, K / 2] and the scales-and-zeros bfloat16 [K / S, N, 2] of `int4_matmul`.

    codes uint8 [N, K] in 0..15; scales [N, G], of either sign, rounded to bfloat16; zeros [N, G] whole
    numbers in 0..16, or None where all are 8. S is the largest of 256, 128, 64, 32 that divides
    `group_size`: a longer group repeats its scale. ValueError says which argument does not fit.
    """
    _check_codes(codes, 4)
    n, k = codes.shape
    both = _int4_scales_and_zeros(scales, zeros, n, k, group_size)
    return _int4_words(codes), both


def pack_int4_stream(words: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> tuple[Tensor, Tensor]:
    """Return what `pack_int4` does, for codes that are packed already: eight neighbouring inputs per word.

    words int32 [N, K / 8], the first input in the lowest bits; the rest as there. On machines whose arrangement is
    known, halves of bytes move directly, in a fifth of the time.
    """
    n, k = words.shape[0], 8 * words.shape[1]
    both = _int4_scales_and_zeros(scales, zeros, n, k, group_size)
    pairs = words.contiguous().view(torch.uint8)
    if n % _ROWS or not _is_known():
        return _int4_words(torch.stack((pairs & 15, pairs >> 4), dim=-1).view(n, k)), both
    return _int4_words_of_pairs(pairs), both


def _int4_scales_and_zeros(scales: Tensor, zeros: Tensor | None, n: int, k: int, group_size: int) -> Tensor:
    """Return the scales-and-zeros bfloat16 [K / S, N, 2] of `int4_matmul`; see `pack_int4`."""
    _raise(int4_refuses(n, k, 4, group_size, torch.bfloat16), n, k)
    groups = (n, k // group_size)
    _check_groups("scales", scales, groups)
    stored = scales.to(torch.bfloat16)
    offsets = torch.zeros_like(stored) if zeros is None else _int4_offsets(stored, zeros, groups)
    repeats = group_size // _int4_group(group_size)
    both = torch.stack((stored, offsets), dim=-1)
    if repeats > 1:
        both = both.repeat_interleave(repeats, dim=1)
    return both.transpose(0, 1).contiguous()


def _int4_offsets(stored: Tensor, zeros: Tensor, groups: tuple[int, int]) -> Tensor:
    """Return what aten adds to each weight of a group, bfloat16 [N, G], for `stored` scales in bfloat16."""
    _check_groups("zeros", zeros, groups)
    if not bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= 16)).all()):
        raise ValueError("zeros: need whole numbers in 0..16")
    # aten's w is (code - 8) * scale + offset. The product is exact in float32, so the offset is rounded
    # once. That rounding costs little: 0.29 eps of relative error in all against 0.25, for Gaussian weights
    # and activations. The worst seen, 0.73 eps, has activations of one sign, so that products cancel and
    # roundings do not.
    return ((8 - zeros.float()) * stored.float()).to(torch.bfloat16)


def unpack_int4(
    weight: Tensor, scales_and_zeros: Tensor, n: int, k: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 [N, K], scales float32 [N, G] as they are stored, and zeros float32 [N, G].

    The inverse of `pack_int4` on the same machine: codes and zeros are those that were packed, except that
    the zero of a group whose scale is 0 is returned as 8 (all its weights are 0). ValueError if `weight`
    has another shape; RuntimeError if this machine's PyTorch does more to codes than to move them around.
    """
    if weight.shape != (n, k // 2):
        raise ValueError(f"weight {list(weight.shape)}: needs [{n}, {k // 2}]")
    codes = _int4_codes(weight, n, k)
    repeats = group_size // _int4_group(group_size)
    scales, offsets = scales_and_zeros[::repeats].permute(1, 0, 2).float().unbind(-1)
    # offset = (8 - zero) * scale * (1 + e) with |e| <= 2**-8 and |8 - zero| <= 8. So offset / scale is off
    # by at most 2**-5, and rounding finds the zero. (Subnormal scales, below 2**-126, are not covered.)
    zeros = torch.where(scales == 0, 8.0, 8 - offsets / scales).round()
    return codes, scales.contiguous(), zeros


def int4_matmul(
    x: Tensor, weight: Tensor, scales_and_zeros: Tensor, bias: Tensor | None, n: int, k: int, group_size: int
) -> Tensor:
    """Return ``x @ w.T + bias`` as bfloat16 [M, N], accumulated in float32.

    x [M, K] bfloat16, any strides and alignment; weight and scales_and_zeros as `pack_int4` returned them
    on this machine; bias [N] or None. ValueError says which argument does not fit.
    """
    _raise(int4_refuses(n, k, 4, group_size, x.dtype), n, k)
    _check_operands(x, bias, n, k)
    group = _int4_group(group_size)
    if weight.shape != (n, k // 2) or weight.dtype != torch.uint8:
        raise ValueError(f"weight {weight.dtype} {list(weight.shape)}: needs uint8 [{n}, {k // 2}]")
    if scales_and_zeros.shape != (k // group, n, 2) or scales_and_zeros.dtype != torch.bfloat16:
        shape = f"{scales_and_zeros.dtype} {list(scales_and_zeros.shape)}"
        raise ValueError(f"scales_and_zeros {shape}: needs torch.bfloat16 [{k // group}, {n}, 2]")
    y = torch._weight_int4pack_mm_for_cpu(_aligned(x), weight.contiguous(), group, scales_and_zeros.contiguous())
    return y if bias is None else y + bias.to(y.dtype)


def int8_refuses(n: int, k: int, bits: int, group_size: int, dtype: torch.dtype) -> str | None:
    """Return why `int8_matmul` cannot multiply with an [n, k] weight of this kind, or None if it can.

    Zeros other than 128 are refused by `pack_int8`, which sees them.
    """
    if bits != 8:
        return f"bits {bits}: this operator multiplies with 8-bit codes"
    if dtype != torch.bfloat16:
        return f"{dtype} activations: computes in bfloat16 only"
    if n < 1 or k < 1 or k % 16:
        # aten does not check: it reads beyond the end of each row, and crashes or returns garbage.
        return f"K = {k}: needs a multiple of 16"
    if group_size != k:
        return f"group_size {group_size}: needs one group per row, {k} columns"
    return None


def pack_int8(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weight int8 [N, K], which is code - 128, and the scales bfloat16 [N] of `int8_matmul`.

    codes uint8 [N, K]; scales [N, 1], of either sign, rounded to bfloat16; zeros [N, 1] all 128, or None.
    ValueError says which argument does not fit.
    """
    _check_codes(codes, 8)
    n, k = codes.shape
    _raise(int8_refuses(n, k, 8, k, torch.bfloat16), n, k)
    _check_groups("scales", scales, (n, 1))
    if zeros is not None:
        _check_groups("zeros", zeros, (n, 1))
        if not bool((zeros == 128).all()):
            raise ValueError("zeros: this operator has none; all need to be 128")
    return (codes ^ 128).view(torch.int8).contiguous(), scales[:, 0].to(torch.bfloat16).contiguous()


def unpack_int8(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 [N, K], scales float32 [N, 1] as they are stored, zeros float32 [N, 1], all 128.

    The inverse of `pack_int8`: weight int8 [N, K] and scales bfloat16 [N] as it returned them.
    """
    codes = weight.view(torch.uint8) ^ 128
    return codes, scales.float()[:, None], torch.full((weight.shape[0], 1), 128.0)


def int8_matmul(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, n: int, k: int) -> Tensor:
    """Return ``x @ w.T + bias`` as bfloat16 [M, N], accumulated in float32.

    x [M, K] bfloat16, any strides and alignment; weight and scales as `pack_int8` returned them; bias [N]
    or None. ValueError says which argument does not fit.
    """
    _raise(int8_refuses(n, k, 8, k, x.dtype), n, k)
    _check_operands(x, bias, n, k)
    if weight.shape != (n, k) or weight.dtype != torch.int8:
        raise ValueError(f"weight {weight.dtype} {list(weight.shape)}: needs int8 [{n}, {k}]")
    if scales.shape != (n,) or scales.dtype != torch.bfloat16:
        raise ValueError(f"scales {scales.dtype} {list(scales.shape)}: needs torch.bfloat16 [{n}]")
    y = torch._weight_int8pack_mm(_aligned(x), weight.contiguous(), scales.contiguous())
    return y if bias is None else y + bias.to(y.dtype)


def _int4_group(group_size: int) -> int:
    """Return the largest group size of aten's that divides `group_size`, a multiple of 32."""
    return next(size for size in _INT4_GROUPS if group_size % size == 0)


def _int4_words(codes: Tensor) -> Tensor:
    """Return `codes` [N, K] in 0..15 as aten packs them on this machine, uint8 [N, K / 2]."""
    words: Tensor = torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return words


@lru_cache(maxsize=1)
def _is_known() -> bool:
    """Return whether aten packs codes on this machine as `_int4_words_of_pairs` does."""
    pairs = torch.arange(_ROWS * 32, device="cpu").mul(37).bitwise_and(255).to(torch.uint8).view(_ROWS, 32)
    codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).view(_ROWS, 64)
    return torch.equal(_int4_words_of_pairs(pairs), _int4_words(codes))


def _int4_words_of_pairs(pairs: Tensor) -> Tensor:
    """Return codes as processors with AVX-512 have them, uint8 [N, K / 2], from `pairs` of inputs, uint8 [N, K / 2].

    64 outputs are a block. It has 32 bytes per input, and byte j holds the codes of outputs j and j + 32.
    """
    n, half = pairs.shape
    lower, upper = pairs.view(n // _ROWS, 2, 32, half).unbind(1)
    words = torch.empty(n // _ROWS, half, 2, 32, dtype=torch.uint8)
    words[:, :, 0] = ((lower & 15) | (upper << 4)).transpose(1, 2)
    words[:, :, 1] = ((lower >> 4) | (upper & 0xF0)).transpose(1, 2)
    return words.view(n, half)


def _codes_of_words(words: Tensor) -> Tensor:
    """Return the codes uint8 [N, K] that `_int4_words_of_pairs` packed into `words`."""
    n, half = words.shape
    halves = words.view(n // _ROWS, half * 2, 32).transpose(1, 2)
    codes = torch.empty(n // _ROWS, 2, 32, half * 2, dtype=torch.uint8)
    codes[:, 0] = halves & 15
    codes[:, 1] = halves >> 4
    return codes.view(n, half * 2)


def _nibbles(words: Tensor) -> Tensor:
    """Return the low and high halves of all bytes of `words`, flat, in the order of storage."""
    flat = words.flatten()
    return torch.stack((flat & 15, flat >> 4), dim=-1).flatten()


def _int4_codes(words: Tensor, n: int, k: int) -> Tensor:
    """Return the codes uint8 [N, K] that aten packed into `words`, in whatever order this machine keeps them.

    Packing moves codes around, and does the same to all weights of one shape. So pack the hexadecimal
    digits of every position, one digit at a time: the nibbles then spell where each came from. That takes a hundred
    times as long as to go back where the arrangement is known.
    """
    if n % _ROWS == 0 and _is_known():
        return _codes_of_words(words)
    position = torch.arange(n * k, dtype=torch.int32).view(n, k)
    source = torch.zeros(n * k, dtype=torch.int32)
    for shift in range(0, (n * k - 1).bit_length(), 4):
        source |= _nibbles(_int4_words(position >> shift & 15)).int() << shift
    codes = torch.zeros(n * k, dtype=torch.uint8)
    codes[source.long()] = _nibbles(words)
    codes = codes.view(n, k)
    if not torch.equal(_int4_words(codes), words):
        raise RuntimeError(f"weight [{n}, {k}]: PyTorch {torch.__version__} packs codes in an unknown way")
    return codes


def _aligned(x: Tensor) -> Tensor:
    """Return `x` contiguous and at a multiple of 32 bytes, as aten's vector loads assume and do not check."""
    x = x.contiguous()
    return x if x.data_ptr() % 32 == 0 else x.clone()


def _raise(reason: str | None, n: int, k: int) -> None:
    """Raise ValueError if there is a reason to."""
    if reason is not None:
        raise ValueError(f"weight [{n}, {k}]: {reason}")


def _check_codes(codes: Tensor, bits: int) -> None:
    """Raise ValueError unless `codes` are uint8 [N, K] below 2**bits; aten lets others corrupt their neighbours."""
    if codes.ndim != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"codes: {codes.dtype} {list(codes.shape)}; needs uint8 [N, K]")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"codes: largest is {int(codes.max())}; {bits} bits hold 0..{2**bits - 1}")


def _check_groups(name: str, values: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError unless `values` has `shape` and is finite in bfloat16."""
    if values.shape != shape:
        raise ValueError(f"{name} {list(values.shape)}: needs {list(shape)}")
    if not bool(torch.isfinite(values.to(torch.bfloat16)).all()):
        raise ValueError(f"{name}: not all finite in bfloat16")


def _check_operands(x: Tensor, bias: Tensor | None, n: int, k: int) -> None:
    """Raise ValueError unless `x` is [M, k] and `bias` [n], both on the CPU."""
    if x.ndim != 2 or x.shape[1] != k or x.device.type != "cpu":
        raise ValueError(f"x {list(x.shape)} on {x.device}: needs [M, {k}] on cpu")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias {list(bias.shape)}: needs [{n}]")
