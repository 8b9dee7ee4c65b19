"""Addresses beyond 2**31 elements: weights whose rows lie that far apart, of which only a few pages are touched."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from kernel_cases import DEVICE, random_weight, random_x
from tolerance import assert_close_to_float64
from torch import Tensor

from llmq_kernels import few, layout, many, naive, tables, tiling, w2a16, w4a16, w8a16
from llmq_kernels.tables import Few

N, K, GROUP = 64, 96, 32
modules = pytest.mark.parametrize(
    ("module", "bits"), [(w2a16, 2), (w4a16, 4), (w8a16, 8)], ids=["w2a16", "w4a16", "w8a16"]
)


def far(rows: Tensor) -> Tensor:
    """Return `rows` with strides for which the last row begins beyond 2**31 elements."""
    count, width = rows.shape
    stride = 2**31 // (count - 1) // 16 * 16 + 16
    # Uninitialized, so that the system lends pages only for what is written.
    spread = torch.empty((count - 1) * stride + width, dtype=rows.dtype, device=DEVICE)
    spread = spread.as_strided((count, width), (stride, 1))
    assert (count - 1) * stride >= 2**31
    return spread.copy_(rows)


@modules
@pytest.mark.parametrize("what", ["few", "tiles", "dequantize"])
def test_a_weight_of_more_than_2_31_elements(module: ModuleType, bits: int, what: str) -> None:
    w = random_weight(N, K, GROUP, bits, symmetric=False)
    packed = module.pack(w.codes, w.scales, w.zeros, GROUP, torch.float16)
    weight = layout.Weight(module.LAYOUT, packed._replace(weight=far(packed.weight[:N])), N, K, GROUP)
    if what == "dequantize":
        truth = naive.dequantize(w.codes, w.scales, w.zeros, GROUP, torch.float16)
        assert torch.equal(many.dequantize(weight, 0, N), truth)
        return
    x = random_x(2, K, torch.float16)
    tile = replace(tables.read("default", module.LAYOUT.name).tiles[0], block_n=N)  # there are no more rows
    y = few.matmul(x, weight, None, Few(4, 32, 2)) if what == "few" else tiling.matmul(x, weight, None, tile)
    assert_close_to_float64(y, naive.quant_matmul(x, w.codes, w.scales, w.zeros, None, GROUP), K)


@modules
@pytest.mark.parametrize("what", ["few", "tiles"])
def test_activations_of_more_than_2_31_elements(module: ModuleType, bits: int, what: str) -> None:
    w = random_weight(N, K, GROUP, bits, symmetric=True)
    packed = module.pack(w.codes, w.scales, None, GROUP, torch.float16)
    weight = layout.Weight(module.LAYOUT, packed, N, K, GROUP)
    x = far(random_x(4, K, torch.float16))
    tile = tables.read("default", module.LAYOUT.name).tiles[0]
    y = few.matmul(x, weight, None, Few(4, 32, 2)) if what == "few" else tiling.matmul(x, weight, None, tile)
    assert_close_to_float64(y, naive.quant_matmul(x, w.codes, w.scales, w.zeros, None, GROUP), K)
