"""A packed weight times activations: which of the three kernels runs for how many tokens.

A handful of tokens is a sum (`few`), a medium number tiles on tensor cores (`tiling`), many a dense product (`many`);
`tables` says from where to where. The packed weight is the same for all three.
"""

from __future__ import annotations

from torch import Tensor

from llmq_kernels import few, many, tables, tiling
from llmq_kernels.layout import Weight, check_operands
from llmq_kernels.tables import Few


def matmul(x: Tensor, weight: Weight, bias: Tensor | None, *, splits: int | None = None) -> Tensor:
    """Return ``x @ w.T + bias`` as [M, N] in the dtype of x; accumulation is in float32.

    x [M, K] of any strides, in the dtype that the weight was packed for; bias [N], any real dtype, or None. `splits`
    sets over how many programs K is split, where a kernel does; by default enough to fill the GPU. ValueError says
    which argument does not fit.
    """
    check_operands(weight, x, bias)
    if not len(x):
        return x.new_empty((0, weight.n))
    x = x if x.stride(1) == 1 else x.contiguous()
    row = tables.for_device(weight.layout.name, x.device).pick(len(x), x.dtype)
    if row is None:
        return many.matmul(x, weight, bias)
    if isinstance(row, Few):
        return few.matmul(x, weight, bias, row, splits)
    return tiling.matmul(x, weight, bias, row, splits)
