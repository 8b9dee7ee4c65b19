"""What every kernel of this package means, in the plainest PyTorch and in float64.

A weight is ``w = (code - zero) * scale``, with one scale and one zero for `group_size` neighbouring columns
of a row. Nothing here is fast, and nothing here knows how a kernel stores its operands: this is the text
that the kernels are compared with.

Letters: N outputs, K inputs, G groups per row, M tokens.
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
