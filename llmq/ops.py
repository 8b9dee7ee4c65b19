"""The one operator that multiplies by a packed weight, whichever kernel does it.

``torch.ops.llmq.quant_matmul(x, packed, bias, kernel, …)`` runs row `kernel` of `llmq.rows.KERNELS`. Each row stores a
packed weight in its own arrangement, made once at load and exactly reversible, so that a model holds every weight once
and can still be saved as it was read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmq.errors import KernelError
from llmq.grids.vq import VectorWeight
from llmq.kernel import Kernel, Layer
from llmq.rows import KERNELS
from llmq.types import QuantizedWeight

__all__ = ["KERNELS", "Kernel", "Layer", "choose", "matmul", "quant_matmul", "quant_matmul_input_grad", "rounds"]

_SLAB = 2**22  # weights that a gradient dequantizes at a time


def choose(layer: Layer, device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the first kernel that runs `layer` on `device` with activations of `dtype`.

    Raises:
        KernelError: none does; says why each refused.
    """
    reasons = []
    for name, kernel in KERNELS.items():
        reason = kernel.refuses(layer, device, dtype)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise KernelError(f"no kernel runs {layer} on {device} in {dtype} ({'; '.join(reasons)})")


def rounds(kernel: str, scales: Tensor, dtype: torch.dtype) -> bool:
    """Return whether row `kernel` had to round `scales` for activations of `dtype`."""
    return not KERNELS[kernel].as_read and not torch.equal(scales, scales.to(dtype).to(scales.dtype))


def matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, kernel: str, layer: Layer) -> Tensor:
    """Return what `quant_matmul` does, without going through it where nothing but the result is wanted.

    On a CPU the operator itself takes 20 µs, as long as a small layer.
    """
    k, n = layer.in_features, layer.out_features
    if is_watched(x, bias):
        plain = layer.bits, layer.group_size, layer.symmetric, n, layer.grid
        found: Tensor = quant_matmul(x, packed, bias, kernel, *plain)
        return found
    return KERNELS[kernel].matmul(x.reshape(-1, k), packed, bias, layer).reshape(*x.shape[:-1], n)


def is_watched(x: Tensor, bias: Tensor | None) -> bool:
    """Return whether more than the result may be wanted of a product with `x`: a gradient, a graph, another device."""
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return True
    return (
        type(x) is not Tensor
        or x.device.type != "cpu"
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@torch.library.custom_op("llmq::quant_matmul", mutates_args=())
def quant_matmul(  # noqa: PLR0913  operators take plain values only
    x: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    kernel: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    out_features: int,
    grid: str,
) -> Tensor:
    """Return ``x @ Wᵀ + bias`` [..., N] for the weight that `packed` holds in the arrangement of row `kernel`.

    `x` [..., K] of a float dtype; `bias` [N] or None; the rest as in `Layer`.
    """
    layer = Layer(bits, group_size, symmetric, out_features, x.shape[-1], grid)
    rows = x.reshape(-1, x.shape[-1])
    return KERNELS[kernel].matmul(rows, packed, bias, layer).reshape(*x.shape[:-1], out_features)


@quant_matmul.register_fake
def _(  # noqa: PLR0913
    x: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    kernel: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    out_features: int,
    grid: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("llmq::quant_matmul_input_grad", mutates_args=())
def quant_matmul_input_grad(  # noqa: PLR0913
    grad: Tensor,
    packed: list[Tensor],
    kernel: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    in_features: int,
    grid: str,
) -> Tensor:
    """Return ``grad @ W`` [..., K], of the dtype of `grad` [..., N]; the rest as in `quant_matmul`.

    Besides the codes, a byte each, W is there some columns at a time.
    """
    layer = Layer(bits, group_size, symmetric, grad.shape[-1], in_features, grid)
    weight = KERNELS[kernel].unpack(packed, layer)
    rows = grad.reshape(-1, grad.shape[-1])
    found = rows.new_empty(len(rows), in_features)
    for start, columns in _slabs(weight):
        found[:, start : start + columns.shape[1]] = rows @ columns.to(rows.dtype)
    return found.reshape(*grad.shape[:-1], in_features)


@quant_matmul_input_grad.register_fake
def _(  # noqa: PLR0913
    grad: Tensor,
    packed: list[Tensor],
    kernel: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    in_features: int,
    grid: str,
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, kernel, bits, group_size, symmetric, _, grid = inputs
    ctx.save_for_backward(*packed)
    ctx.plain = (kernel, bits, group_size, symmetric, x.shape[-1], grid)
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x_dtype, bias_dtype = ctx.dtypes
    grad_x = grad_bias = None
    packed = list(ctx.saved_tensors)
    if ctx.needs_input_grad[0]:
        grad_x = quant_matmul_input_grad(grad.contiguous(), packed, *ctx.plain).to(x_dtype)
    if bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.flatten(0, -2).sum(0).to(bias_dtype)
    return (grad_x, [None] * len(packed), grad_bias, None, None, None, None, None, None)


quant_matmul.register_autograd(_backward, setup_context=_setup)


def _slabs(weight: QuantizedWeight) -> Iterator[tuple[int, Tensor]]:
    """Yield a weight [N, K] some columns at a time, float32 [N, S], each time with the number of the first."""
    if isinstance(weight, VectorWeight):
        yield from _vector_slabs(weight)
        return
    n, k = weight.codes.shape
    size = weight.group_size
    step = max(1, _SLAB // n)
    if step >= size:
        step -= step % size
    else:  # within a group
        step = next(width for width in range(step, 0, -1) if size % width == 0)
    for start in range(0, k, step):
        stop = min(start + step, k)
        groups = slice(start // size, -(-stop // size))
        codes, scales, zeros = weight.codes[:, start:stop], weight.scales[:, groups], weight.zeros[:, groups]
        levels = None if weight.levels is None else weight.levels[:, groups]
        yield start, replace(weight, codes=codes, scales=scales, zeros=zeros, levels=levels).dequantize()


def _vector_slabs(weight: VectorWeight) -> Iterator[tuple[int, Tensor]]:
    """Yield what `_slabs` does, of whole vectors and whole groups."""
    k, d = weight.in_features, weight.codebook.shape[1]
    unit = weight.group_size if weight.scales.shape[1] > 1 else d
    step = max(unit, _SLAB // len(weight.codes) // unit * unit)
    for start in range(0, k, step):
        stop = min(start + step, k)
        codes = weight.codes[:, start // d : -(-stop // d)]
        groups = slice(start // weight.group_size, -(-stop // weight.group_size))
        part = replace(weight, codes=codes, scales=weight.scales[:, groups], in_features=stop - start)
        yield start, part.dequantize()
