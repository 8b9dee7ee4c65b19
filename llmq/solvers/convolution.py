"""Convolutions as linear layers, for codebooks of vectors: a kernel [O, I, kh, kw] is a weight [O, I·kh·kw].

The taps of one input channel are neighbouring columns, so vectors lie along the kernel (Stock et al. 2020, "And the bit
goes down", arXiv 1907.05686, section 3.3), and the inputs are the patches that the kernel is laid on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from llmq.errors import SolverError
from llmq.grids.vq import VectorGrid
from llmq.solvers.vectors import VECTOR_SOLVERS
from llmq.types import QuantizedWeight, Solution


def patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return what the kernel of `layer` is multiplied by for images `x` [B, I, H, W]: [B·H'·W', I·kh·kw].

    Raises:
        SolverError: the layer has groups.
    """
    _check(layer)
    if isinstance(layer.padding, str):
        around = [(d * (k - 1)) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        rows, columns = around if layer.padding == "same" else (0, 0)
        before = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    else:
        before = (layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    found: Tensor = unfold(pad(x, before, mode=mode), layer.kernel_size, layer.dilation, stride=layer.stride)
    return found.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def solve_convolution(
    layer: nn.Conv2d, h: Tensor | None, grid: VectorGrid, *, method: str = "gptq", **options: Any
) -> Solution:
    """Return the kernel of `layer` on a codebook, with one scale per output channel.

    Args:
        layer: a convolution without groups.
        h: Hessian float32 [I·kh·kw, I·kh·kw] of its `patches`, as of a linear layer's inputs; None for method rtn.
        grid: number and size of the entries.
        method: a row of `llmq.solvers.vectors.VECTOR_SOLVERS`.
        options: of that solver.

    Raises:
        SolverError: the layer has groups, there is no such method, or the solver refuses.
    """
    _check(layer)
    if method not in VECTOR_SOLVERS:
        raise SolverError(f"method is {method!r}; use {', '.join(VECTOR_SOLVERS)}")
    w = layer.weight.detach().flatten(1)
    if h is None and VECTOR_SOLVERS[method].calibrated:
        raise SolverError(f"method {method} needs the Hessian of the patches; give it, or use rtn")
    return VECTOR_SOLVERS[method].run(w, h, grid, w.shape[1], **options)


def kernel(weight: QuantizedWeight, layer: nn.Conv2d) -> Tensor:
    """Return what the codes of a convolution stand for, float32 [O, I, kh, kw]."""
    return weight.dequantize().view(layer.weight.shape)


def _check(layer: nn.Conv2d) -> None:
    if layer.groups != 1:
        raise SolverError(
            f"the convolution has {layer.groups} groups, which have kernels of their own; give it no groups"
        )
