"""What every kernel of this package means, in the plainest PyTorch and in float64.

A weight is ``w = (code - zero) * scale``, with one scale and one zero for `group_size` neighbouring columns
of a row. Nothing here is fast, and nothing here knows how a kernel stores its operands: this is the text
that the kernels are compared with.

Letters: N outputs, K inputs, G groups per row, M tokens, B columns of a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmq_kernels.scale_search import Levels


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] in `dtype` that the codes stand for, computed in float64 and rounded once.

    codes [N, K] integers; scales [N, G] real, of either sign; zeros [N, G] whole numbers in code units.
    Column j belongs to group ``j // group_size``. An IndexError means that G groups do not cover K columns.
    """
    group = torch.arange(codes.shape[1], device=codes.device) // group_size
    w = (codes.double() - zeros.double()[:, group]) * scales.double()[:, group]
    return w.to(dtype)


def quant_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """Return ``x @ w.T + bias`` as float64 [M, N], where w is the weight that the codes stand for.

    x [M, K] real; codes [N, K], scales [N, G] and zeros [N, G] as for `dequantize`; bias [N] real, or None.
    """
    y = x.double() @ dequantize(codes, scales, zeros, group_size, torch.float64).T
    return y if bias is None else y + bias.double()


def quantize_tokens(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return codes int8 [M, K] in -127..127 and scales float32 [M] of x [M, K] real.

    The scale of a token is its largest magnitude / 127, at least 2**-100 / 127, or `scale` [1] for all. Codes are
    x * (127 / largest), or x * (1 / scale), to the nearest whole number, the even one in ties, and cut off at the ends.
    Each operation is one of float32. A token that is not finite has codes of 0 and NaN for a scale.
    """
    x = x.float()
    finite = x.isfinite().all(dim=1)
    x = torch.where(finite[:, None], x, 0.0)
    largest = x.abs().amax(dim=1).clamp(min=2.0**-100)
    most = torch.full_like(largest, 127)  # by a plain 127, PyTorch divides in two steps
    scales = largest / most if scale is None else scale.float().view(1).expand(len(x))
    inverse = most / largest if scale is None else scales.reciprocal()
    codes = (x * inverse[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes, torch.where(finite, scales, torch.nan)


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """Return ``x @ w.T + bias`` as float64 [M, N], of tokens and weights that are 8-bit integers times scales.

    x [M, K] real, quantized as `quantize_tokens` does; codes int8 [N, K]; scales [N]; bias [N] or None. The sums of
    products of integers are exact.
    """
    token_codes, token_scales = quantize_tokens(x, scale)
    sums = token_codes.long() @ codes.long().T
    y = sums.double() * token_scales.double()[:, None] * scales.double()
    return y if bias is None else y + bias.double()


def lut_dequantize(
    codes: Tensor, scales: Tensor | None, table: Tensor, picked: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight [N, K] in `dtype`, ``scale * level``, of codes that are places in tables of levels.

    codes [N, K] integers; scales [N, G] real, or None where all are 1; table [T, L] real. A group takes table
    ``picked[n, g]`` if there is `picked` [N, G], else the only one, else one of its own, number ``n * G + g``.
    Computed in float64 and rounded once.
    """
    n, k = codes.shape
    groups = -(-k // group_size)
    which = torch.arange(n * groups, device=codes.device).view(n, groups)
    if picked is not None:
        which = picked.long()
    elif len(table) == 1:
        which = torch.zeros_like(which)
    group = torch.arange(k, device=codes.device) // group_size
    w = table.double()[which[:, group], codes.long()]
    if scales is not None:
        w = w * scales.double()[:, group]
    return w.to(dtype)


def lut_matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    table: Tensor,
    picked: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """Return ``x @ w.T + bias`` as float64 [M, N]: x [M, K] and bias [N] real, the rest as for `lut_dequantize`."""
    y = x.double() @ lut_dequantize(codes, scales, table, picked, group_size, torch.float64).T
    return y if bias is None else y + bias.double()


def grouped_matmul(x: Tensor, weights: Tensor, bias: Tensor | None, picked: Tensor) -> Tensor:
    """Return the products of each row with the matrices of the expert that it picks, as float64 [R, P * N].

    x [R / S, K] real, of which row r reads ``x[r // S]``; weights [E, P, N, K] real, as `dequantize` returns them, P
    matrices for each expert, whose outputs are side by side; bias [E, P, N] or None; picked [R], of which those that
    are not below E pick none, and get zeros.
    """
    slots = len(picked) // max(1, len(x))
    out = torch.zeros(len(picked), *weights.shape[1:3], dtype=torch.float64, device=x.device)
    for row, expert in enumerate(picked.tolist()):
        if expert < len(weights):
            out[row] = weights[expert].double() @ x[row // slots].double()
            if bias is not None:
                out[row] += bias[expert].double()
    return out.flatten(1)


def gptq_block(
    w: Tensor, y: Tensor, r: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, lowest: int, highest: int
) -> tuple[Tensor, Tensor]:
    """Round the columns of a block one after another, each correcting for the errors of those before it.

    Column j is rounded at ``w_j + (y_j + Σ_{i<j} E_i R_ij) / R_jj``, where E is `w` minus the levels chosen (GPTQ,
    arXiv 2210.17323, by a factor ``H = R Rᵀ`` in place of one of its inverse). Everything is K-major, B columns of
    the block by N rows of the weight: w, y [B, N], r [B, B] upper triangular; scales, zeros [G, N], of which column j
    takes row ``groups[j]``. Codes are `lowest` to `highest`; ties go to the even multiple of the scale.

    Returns codes uint8 [B, N] and errors float64 [B, N].
    """
    w, y, r, scales, zeros = (t.double() for t in (w, y, r, scales, zeros))
    codes, errors = torch.empty(w.shape, dtype=torch.uint8, device=w.device), torch.empty_like(w)
    for j, group in enumerate(groups.tolist()):
        target = w[j] + (y[j] + r[:j, j] @ errors[:j]) / r[j, j]
        level = ((target / scales[group]).round() + zeros[group]).clamp(lowest, highest)
        codes[j] = level.to(torch.uint8)
        errors[j] = w[j] - (level - zeros[group]) * scales[group]
    return codes, errors


def scale_search(
    w: Tensor, weight: Tensor, spans: Tensor, levels: Levels, group_size: int, norm: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the placement and the error of every group of `w` [N, K] under every span, [T, N, G] each.

    A span shrinks the extremes of a group towards 0. Placements are float32 operations, each rounded, as they are
    stored: a symmetric scale is the extreme of larger magnitude over `levels.steps`, a positive one its magnitude; an
    asymmetric one the span of 0 and the extremes over `levels.steps`. It is rounded to eight significant bits, and is
    `levels.min_scale` at least. The error is ``Σ_j weight_j |w_j - ŵ_j| ** norm`` over the columns of the group,
    float64. What a search returns is the first of the placements whose error is least.
    """
    placed: list[list[Tensor]] = []
    parts = zip(w.split(group_size, dim=1), weight.double().split(group_size), strict=True)
    for part, share in parts:
        lo, hi = part.amin(1) * spans[:, None], part.amax(1) * spans[:, None]  # [T, N]
        if levels.symmetric:
            extreme = torch.where(-lo >= hi, lo, hi)
            reach = extreme.abs() if levels.steps > 0 else extreme
        else:
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)
            reach = hi - lo
        scale = reach / torch.full_like(reach, levels.steps)
        stored = torch.where(scale < 0, -1.0, 1.0) * scale.bfloat16().float().abs().clamp(min=levels.min_scale)
        stored = torch.where(scale == 0, 1.0, stored)
        zero = torch.full_like(stored, (levels.highest + 1) / 2)
        if not levels.symmetric:
            zero = (-lo / stored).round().clamp(0, levels.highest)
        s, z = stored.double()[..., None], zero.double()[..., None]
        codes = ((part / stored[..., None]).round().double() + z).clamp(levels.lowest, levels.highest)
        errors = ((codes - z) * s - part.double()).abs().pow(norm) @ share
        placed.append([stored, zero, errors])
    scales, zeros, errors = (torch.stack(found, dim=2) for found in zip(*placed, strict=True))
    return scales, zeros, errors


def unpack_bits(words: Tensor, bits: int, count: int, padded: bool) -> Tensor:
    """Return the uint8 codes [..., `count`] of int32 `words` [..., W]: bit i of code j is bit ``bits j + i`` of a row.

    If `padded`, every word holds ``32 // bits`` whole codes instead.
    """
    stream = (words.long()[..., None] >> torch.arange(32, device=words.device) & 1).flatten(-2)
    first = _first_bits(bits, count, padded).to(words.device)
    return sum((stream[..., first + i] << i for i in range(bits)), torch.zeros_like(first)).to(torch.uint8)


def pack_bits(codes: Tensor, bits: int, words: int, padded: bool) -> Tensor:
    """Return int32 words [..., `words`] of the uint8 `codes` [..., C], arranged as for `unpack_bits`; 0 elsewhere."""
    stream = torch.zeros(*codes.shape[:-1], 32 * words, dtype=torch.int64, device=codes.device)
    first = _first_bits(bits, codes.shape[-1], padded).to(codes.device)
    for i in range(bits):
        stream[..., first + i] = codes.long() >> i & 1
    found = (stream.unflatten(-1, (words, 32)) << torch.arange(32, device=codes.device)).sum(-1)
    return torch.where(found < 2**31, found, found - 2**32).to(torch.int32)


def _first_bits(bits: int, count: int, padded: bool) -> Tensor:
    """Return which bit of its row each of `count` codes begins with, int64 [count]."""
    j, each = torch.arange(count), 32 // bits
    return j // each * 32 + j % each * bits if padded else j * bits
