"""The operator that multiplies by the packed weights of many experts at once.

``torch.ops.llmq.quant_grouped_matmul(x, packed, bias, routes, kernel, …)``: each row of the result is one token at one
of its experts. Rows of `llmq.rows.KERNELS` that have a way of their own for it take one launch or one call; for the
others, matrices take turns inside the operator. Which experts run is thus no business of a graph around it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmq import ops
from llmq.kernel import Layer
from llmq.rows import KERNELS


class Stack(NamedTuple):
    """Matrices of all experts that read the same input, arranged for a kernel."""

    kernel: str  # row of `llmq.rows.KERNELS`
    layer: Layer  # one of the matrices
    packed: list[Tensor]  # tensors of a matrix each with one more dimension in front, E * P
    bias: Tensor | None  # [E * P, N]
    parts: int  # P matrices of an expert lie together

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.packed[0]) // self.parts


def route(picked: Tensor, stack: Stack) -> list[Tensor]:
    """Return the routes of rows that pick the experts `picked`, whole numbers [R]; those from E up pick none."""
    picked = picked.long().contiguous()
    grouped = KERNELS[stack.kernel].grouped
    if grouped is None or grouped.route is None:
        return [picked]
    return [picked, *grouped.route(picked, stack.experts)]


def matmul(x: Tensor, stack: Stack, routes: list[Tensor]) -> Tensor:
    """Return what `quant_grouped_matmul` does, without going through it where nothing but the result is wanted."""
    kernel, layer, packed, bias, parts = stack
    if ops.is_watched(x, bias):
        plain = layer.bits, layer.group_size, layer.symmetric, layer.out_features, parts, layer.grid
        found: Tensor = quant_grouped_matmul(x, packed, bias, routes, kernel, *plain)
        return found
    return _multiply(x, packed, bias, routes, kernel, layer, parts)


@torch.library.custom_op("llmq::quant_grouped_matmul", mutates_args=())
def quant_grouped_matmul(  # noqa: PLR0913  operators take plain values only
    x: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    routes: list[Tensor],
    kernel: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    out_features: int,
    parts: int,
    grid: str,
) -> Tensor:
    """Return the products of each row with the matrices of its expert, [R, P * N]; zeros for rows without one.

    `x` [R / S, K] of a float dtype, of which S neighbouring rows read the same; `packed` tensors of E * P matrices in
    the arrangement of row `kernel`; `bias` [E * P, N] or None; `routes` what `route` returned; the rest as in `Stack`
    and `Layer`.
    """
    layer = Layer(bits, group_size, symmetric, out_features, x.shape[-1], grid)
    return _multiply(x, packed, bias, routes, kernel, layer, parts)


@quant_grouped_matmul.register_fake
def _(  # noqa: PLR0913
    x: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    routes: list[Tensor],
    kernel: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    out_features: int,
    parts: int,
    grid: str,
) -> Tensor:
    return x.new_empty(routes[0].shape[0], parts * out_features)


@torch.library.custom_op("llmq::quant_grouped_matmul_input_grad", mutates_args=())
def quant_grouped_matmul_input_grad(  # noqa: PLR0913
    grad: Tensor,
    packed: list[Tensor],
    picked: Tensor,
    kernel: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    in_features: int,
    parts: int,
    grid: str,
    tokens: int,
) -> Tensor:
    """Return the gradient of x [`tokens`, K] for that of the rows, `grad` [R, P * N]; the rest as in the operator.

    The weight of one matrix at a time is there as numbers.
    """
    plain = kernel, bits, group_size, symmetric, in_features, grid
    rows = grad.new_zeros(len(picked), in_features)
    slices = grad.unflatten(-1, (parts, -1))
    for expert, mine in _picked(picked, len(packed[0]) // parts):
        for part in range(parts):
            one = [tensor[expert * parts + part] for tensor in packed]
            rows[mine] += ops.quant_matmul_input_grad(slices[mine, part], one, *plain)
    return rows.view(tokens, -1, in_features).sum(1) if len(rows) else grad.new_zeros(tokens, in_features)


@quant_grouped_matmul_input_grad.register_fake
def _(  # noqa: PLR0913
    grad: Tensor,
    packed: list[Tensor],
    picked: Tensor,
    kernel: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    in_features: int,
    parts: int,
    grid: str,
    tokens: int,
) -> Tensor:
    return grad.new_empty(tokens, in_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, routes, kernel, bits, group_size, symmetric, _, parts, grid = inputs
    ctx.save_for_backward(routes[0], *packed)
    ctx.plain = (kernel, bits, group_size, symmetric, x.shape[-1], parts, grid, x.shape[0])
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype
    ctx.counts = len(packed), len(routes)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x_dtype, bias_dtype = ctx.dtypes
    picked, *packed = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = quant_grouped_matmul_input_grad(grad.contiguous(), packed, picked, *ctx.plain).to(x_dtype)
    if bias_dtype is not None and ctx.needs_input_grad[2]:
        parts = ctx.plain[5]
        experts = len(packed[0]) // parts
        there = (picked < experts)[:, None]
        sums = grad.new_zeros(experts, grad.shape[-1])
        sums = sums.index_add(0, picked.clamp(max=experts - 1), torch.where(there, grad, 0))
        grad_bias = sums.unflatten(-1, (parts, -1)).flatten(0, 1).to(bias_dtype)
    nothing = [[None] * count for count in ctx.counts]
    return (grad_x, nothing[0], grad_bias, nothing[1], *[None] * 7)


quant_grouped_matmul.register_autograd(_backward, setup_context=_setup)


def _multiply(
    x: Tensor, packed: list[Tensor], bias: Tensor | None, routes: list[Tensor], kernel: str, layer: Layer, parts: int
) -> Tensor:
    row = KERNELS[kernel]
    if row.grouped is not None:
        return row.grouped.matmul(x, packed, bias, routes, layer, parts)
    picked, (tokens, n) = routes[0], (len(x), layer.out_features)
    y = x.new_zeros(len(picked), parts, n)
    for expert, mine in _picked(picked, len(packed[0]) // parts):
        read = x[mine // (len(picked) // tokens)]
        for part in range(parts):
            number = expert * parts + part
            one = [tensor[number] for tensor in packed]
            y[mine, part] = row.matmul(read, one, None if bias is None else bias[number], layer)
    return y.flatten(1)


def _picked(picked: Tensor, experts: int) -> list[tuple[int, Tensor]]:
    """Return each expert that `picked` [R] has, with its rows."""
    order = picked.argsort(stable=True)
    counts = torch.bincount(picked, minlength=experts)[:experts].tolist()
    parts = order[: sum(counts)].split(counts)
    return [(expert, rows) for expert, rows in enumerate(parts) if len(rows)]
