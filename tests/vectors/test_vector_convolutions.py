"""Convolutions on codebooks: patches are what kernels see, and the result is a kernel again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d
from vector_reference import loss

from llmq.errors import SolverError
from llmq.grids.vq import VectorGrid
from llmq.solvers.convolution import kernel, patches, solve_convolution

LAYERS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": (1, 3), "padding": (0, 1)},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "dilation": (2, 1), "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 1},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_a_convolution_is_a_linear_layer_of_its_patches(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 5, bias=False, **options), torch.randn(2, 3, 7, 9)
    expected = layer(x)
    found = patches(layer, x) @ layer.weight.flatten(1).T
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1).flatten(0, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["rtn", "weighted_rtn", "gptq", "descent"])
def test_kernels_are_quantized_for_their_outputs(method: str) -> None:
    torch.manual_seed(1)
    layer, x = nn.Conv2d(4, 40, 3, padding=1, bias=False), torch.randn(6, 4, 8, 8).cumsum(dim=3)
    seen = patches(layer, x)
    h = 2 * seen.T @ seen / len(seen)
    solution = solve_convolution(layer, None if method == "rtn" else h, VectorGrid(1, 4), method=method)
    found = kernel(solution.weight, layer)
    assert found.shape == layer.weight.shape
    error = conv2d(x, layer.weight.detach() - found, padding=1).square().sum() * 2 / len(seen)
    assert float(error) == pytest.approx(loss(layer.weight.detach().flatten(1), found.flatten(1), h), rel=1e-3)
    plain = kernel(solve_convolution(layer, None, VectorGrid(1, 4), method="rtn").weight, layer)
    lost = loss(layer.weight.detach().flatten(1), plain.flatten(1), h)
    assert method == "rtn" or float(error) < 0.7 * lost


def test_what_it_cannot_do_is_refused() -> None:
    grid, h = VectorGrid(1, 4), torch.eye(18)
    with pytest.raises(SolverError, match="2 groups"):
        solve_convolution(nn.Conv2d(4, 4, 3, groups=2), h, grid)
    with pytest.raises(SolverError, match="2 groups"):
        patches(nn.Conv2d(4, 4, 3, groups=2), torch.ones(1, 4, 5, 5))
    with pytest.raises(SolverError, match="method is 'obq'"):
        solve_convolution(nn.Conv2d(2, 4, 3), h, grid, method="obq")
    with pytest.raises(SolverError, match="Hessian of the patches"):
        solve_convolution(nn.Conv2d(2, 4, 3), None, grid)
