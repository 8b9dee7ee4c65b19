"""The operator of grouped experts: each row against dense products in float32, and what PyTorch asks of operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_cases import needs_compiler

from llmq import expert_ops
from llmq.formats import streams
from llmq.grids.uniform import UniformGrid
from llmq.kernel import Layer
from llmq.rows import KERNELS
from llmq.types import QuantizedWeight


def random_stack(kernel: str, bits: int, parts: int, experts: int, sym: bool, dtype: torch.dtype, bias: bool) -> Any:
    """Return a stack of random matrices [32, 64] for a kernel, and these as numbers [E, P, N, K]."""
    draw = torch.Generator().manual_seed(bits)
    group = 64 if kernel == "cpu_int8pack" else 32
    layer, packed, dense = Layer(bits, group, sym, 32, 64), [], []
    for _ in range(experts * parts):
        groups = (32, 64 // group)
        codes = torch.randint(0, 2**bits, (32, 64), generator=draw).to(torch.uint8)
        scales = ((torch.rand(groups, generator=draw) + 0.5) / 64).bfloat16().float()
        zeros = torch.randint(0, 2**bits, groups, generator=draw).float()
        if sym:
            zeros.fill_(2 ** (bits - 1))
        weight = QuantizedWeight(codes, scales, zeros, UniformGrid(bits, sym), group)
        packed.append(KERNELS[kernel].pack(streams.of(weight, bits, symmetric=sym), layer, dtype))
        dense.append(weight.dequantize())
    stacked = [torch.stack(tensors) for tensors in zip(*packed, strict=True)]
    added = torch.randn(experts * parts, 32, generator=draw).to(dtype) if bias else None
    dense = torch.stack(dense).view(experts, parts, 32, 64)
    return expert_ops.Stack(kernel, layer, stacked, added, parts), dense


ROWS = [
    pytest.param("cpu_native", 4, False, torch.bfloat16, marks=needs_compiler),
    pytest.param("cpu_native_float", 3, True, torch.float32, marks=needs_compiler),
    ("cpu_int4pack", 4, False, torch.bfloat16),
    ("cpu_int8pack", 8, True, torch.bfloat16),
    ("reference", 5, False, torch.float32),
]


@pytest.mark.parametrize(("kernel", "bits", "sym", "dtype"), ROWS)
@pytest.mark.parametrize("parts", [1, 2])
def test_every_row_multiplies_and_has_gradients(
    kernel: str, bits: int, sym: bool, dtype: torch.dtype, parts: int
) -> None:
    stack, dense = random_stack(kernel, bits, parts, 3, sym, dtype, bias=parts == 2)
    if stack.bias is not None:
        stack.bias.requires_grad_()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    picked = torch.tensor([0, 2, 2, 3, 0, 0, 2, 0])  # nobody picks 1, one row picks none
    routes = expert_ops.route(picked, stack)
    y = expert_ops.matmul(x, stack, routes)
    rows = torch.cat([dense, torch.zeros(1, parts, 32, 64)])[picked]
    added = 0 if stack.bias is None else torch.cat([stack.bias.view(3, -1), torch.zeros(1, 32 * parts)])[picked].float()
    read = x.detach().float().requires_grad_()
    truth = (rows @ read.repeat_interleave(2, 0)[:, None, :, None]).flatten(1) + added
    loose = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}  # sums of 64 products near 0
    torch.testing.assert_close(y.float(), truth, **loose)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    some = (x,) if stack.bias is None else (x, stack.bias)
    wanted = [torch.autograd.grad(truth, read, grad.float())[0]]
    if stack.bias is not None:
        wanted.append(torch.zeros(4, 64).index_add(0, picked, grad.float())[:3].view(6, 32))
    for found, right in zip(torch.autograd.grad(y, some, grad), wanted, strict=True):
        torch.testing.assert_close(found.float(), right, rtol=4 * loose["rtol"], atol=8 * loose["atol"])
    with torch.no_grad():
        assert torch.equal(expert_ops.matmul(x.detach(), stack, routes), y), "without the operator it is the same"


@pytest.mark.parametrize(("kernel", "bits", "sym", "dtype"), ROWS)
def test_the_operator_is_one_that_pytorch_accepts(kernel: str, bits: int, sym: bool, dtype: torch.dtype) -> None:
    stack, _ = random_stack(kernel, bits, 2, 3, sym, dtype, bias=True)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    routes = [torch.tensor([0, 2, 2, 3, 0, 0, 2, 0])]
    layer = stack.layer
    plain = layer.bits, layer.group_size, layer.symmetric, layer.out_features, 2, layer.grid
    arguments = (x.requires_grad_(), stack.packed, stack.bias, routes, kernel, *plain)
    torch.library.opcheck(torch.ops.llmq.quant_grouped_matmul.default, arguments)
    grad = torch.randn(8, 64).to(dtype)
    of = (kernel, layer.bits, layer.group_size, layer.symmetric, 64, 2, layer.grid, 4)
    torch.library.opcheck(torch.ops.llmq.quant_grouped_matmul_input_grad.default, (grad, stack.packed, routes[0], *of))
