"""Products of tokens with the experts that each picks, in C, in one call and one parallel region."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq_kernels import native
from llmq_kernels.native import build


def matmul(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    picked: Tensor,
    bits: int,
    group_size: int,
    *,
    parts: int = 1,
) -> Tensor:
    """Return the products of each row with the matrices of the expert that it picks, [R, parts * N], as of `x`.

    Args:
        x: [R / S, K] float32, bfloat16 or float16; S neighbouring rows read the same of it.
        weight: words int32 [E * parts, N, W], scales [E * parts, N, G], zeros or None: matrices as `native.matmul`
            takes them, one behind the other, those of an expert together.
        bias: [E * parts, N] or None.
        picked: int64 [R]; numbers that are none of 0 to E - 1 pick none, and get zeros.
        bits: of a code.
        group_size: columns per group, a multiple of 8 or at least K.
        parts: matrices of an expert.

    Each row is what `native.matmul` computes of all rows of its expert.

    Raises:
        ValueError: a tensor does not fit.
        build.BuildError: there are no native kernels.
    """
    (tokens, k), rows = x.shape, len(picked)
    matrices, n = weight[0].shape[:2]
    experts, slots = matrices // parts, rows // max(1, tokens)
    if experts * parts != matrices or not matrices or slots * tokens != rows:
        raise ValueError(f"{matrices} matrices and {rows} rows of {tokens} tokens: needs {parts} times E, and S times")
    if bias is not None and bias.shape != (matrices, n):
        raise ValueError(f"bias {list(bias.shape)}: needs [{matrices}, {n}]")
    native._check_tensor("picked", picked, (rows,), (torch.int64,))  # type: ignore[arg-type]
    flat = native.Weight(*(None if tensor is None else tensor.flatten(0, 1) for tensor in weight))  # type: ignore[arg-type]
    packed, kernels = native._packed(flat, bits, k, group_size)
    packed.n = n
    in_pairs = x.dtype == torch.bfloat16 and native._in_steps(group_size, k) and build.has_pairs(kernels)
    if native._is_slow(rows, in_pairs, x.dtype, kernels):
        return _one_by_one(x, weight, bias, picked, bits, group_size, parts)
    dtype = torch.bfloat16 if in_pairs else torch.float32
    read = x if x.dtype == dtype else x.to(dtype)
    read = read if read.stride(-1) == 1 else read.contiguous()
    added = None if bias is None else bias.detach().float().contiguous()
    y = torch.empty(rows, parts * n, dtype=dtype)
    if rows:
        product = kernels.llmq_grouped_pairs if in_pairs else kernels.llmq_grouped_float
        threads = native._threads(parts * n * k * (4 * min(rows, experts) + rows))
        pointers = picked.data_ptr(), rows, None if added is None else added.data_ptr(), y.data_ptr(), build.parallel()
        native._check(product(packed, experts, parts, read.data_ptr(), read.stride(0), slots, *pointers, threads))
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _one_by_one(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    picked: Tensor,
    bits: int,
    group_size: int,
    parts: int,
) -> Tensor:
    """Return the same by a product for each matrix: where PyTorch is faster from some number of tokens on."""
    n, slots = weight[0].shape[1], max(1, len(picked) // max(1, len(x)))
    y = torch.zeros(len(picked), parts, n, dtype=x.dtype)
    for expert in range(len(weight[0]) // parts):
        rows = (picked == expert).nonzero().flatten()
        if not len(rows):
            continue
        mine = x[rows // slots]
        for part in range(parts):
            number = expert * parts + part
            words, scales, zeros = (None if tensor is None else tensor[number] for tensor in weight)
            assert words is not None
            one = native.Weight(words, scales, zeros)
            y[rows, part] = native.matmul(mine, one, None if bias is None else bias[number], bits, group_size)
    return y.flatten(1)
