"""Random packed layers that share an input, what they stand for, and who multiplies for them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmq import fusion, ops
from llmq.formats import FORMATS
from llmq.fusion import Fused
from llmq.grids.uniform import UniformGrid
from llmq.nn import QuantLinear
from llmq.types import QuantizedWeight, QuantSpec

K = 128


def random_layer(
    n: int,
    bits: int = 4,
    group_size: int = 64,
    *,
    symmetric: bool = True,
    bias: bool = False,
    columns: Tensor | None = None,
    seed: int = 0,
) -> QuantLinear:
    """Return a layer of N = `n` outputs and 128 inputs with the tensors of a file."""
    draw = torch.Generator().manual_seed(1000 * n + seed)
    form = "gptq" if columns is not None else "llmq"
    spec = QuantSpec(bits, group_size, symmetric, form)
    groups = (n, K // spec.group_columns(K))
    zeros = torch.full(groups, 2.0 ** (bits - 1))
    if not symmetric:
        zeros += torch.randint(-(2 ** (bits - 2)), 2 ** (bits - 2), groups, generator=draw)
    codes = torch.randint(0, 2**bits, (n, K), generator=draw).to(torch.uint8)
    scales = (torch.rand(groups, generator=draw) / 64 + 1 / 128).bfloat16().float()
    weight = QuantizedWeight(codes, scales, zeros, UniformGrid(bits, symmetric), spec.group_columns(K))
    tensors = FORMATS[form].pack(weight, spec, columns)
    layout = FORMATS[form].layout(spec, n, K)
    layer = QuantLinear(K, n, spec, bias=bias, device=None)
    layer.fill_({name: tensors[name].to(dtype) for name, (_, dtype) in layout.items()})
    if bias:
        layer.bias = nn.Parameter(torch.randn(n, generator=draw), requires_grad=False)
    return layer


def exact(layer: QuantLinear, x: Tensor) -> Tensor:
    """Return in float64 what a layer computes."""
    weight = layer.quantized_weight().dequantize().double()
    if (columns := layer.columns()) is not None:
        weight = weight[:, columns.argsort()]
    return x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())


def fused(layers: Sequence[QuantLinear], dtype: torch.dtype = torch.float32) -> Fused:
    """Return the layers as one, prepared for activations of `dtype`."""
    for layer in layers:
        layer.prepare_(dtype)
    return Fused(layers)


class Products:
    """Counts products by how many outputs they have, and lets a CPU fuse up to `tokens` tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int = 64) -> None:
        self.outputs: list[int] = []
        inner = ops.matmul

        def counted(x: Tensor, packed: Any, bias: Any, kernel: str, layer: ops.Layer) -> Tensor:
            self.outputs.append(layer.out_features)
            return inner(x, packed, bias, kernel, layer)

        monkeypatch.setattr(ops, "matmul", counted)
        monkeypatch.setattr(fusion, "TOKENS", {"cpu": tokens})

    def taken(self) -> list[int]:
        """Return the outputs of all products since the last time."""
        found, self.outputs = self.outputs, []
        return found


def random_input(m: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
