"""What every kernel of this package means, in the plainest PyTorch and in float64.

A weight is ``w = (code - zero) * scale``, with one scale and one zero for `group_size` neighbouring columns
of a row. Nothing here is fast, and nothing here knows how a kernel stores its operands: this is the text
that the kernels are compared with.

Letters: N outputs, K inputs, G groups per row, M tokens, B columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
