"""Layers that share an input as one product, by every row of kernels that can."""

import pytest
import torch
from fusion_cases import K, Products, exact, fused, random_input, random_layer
from tolerance import assert_close_to_float64

from llmq import fusion, ops

# row -> bits, group size, symmetric, dtype, outputs of the layers
ROWS = [
    *[("cpu_native_float", bits, 64, bits % 2 == 0, torch.float32, (40, 24, 33)) for bits in (2, 3, 4, 5, 6, 8)],
    ("cpu_native", 4, 32, False, torch.bfloat16, (40, 24, 33)),
    ("cpu_native", 3, -1, True, torch.bfloat16, (8, 1)),
    ("cpu_int4pack", 4, 32, False, torch.bfloat16, (64, 128, 64)),
    ("cpu_int8pack", 8, -1, True, torch.bfloat16, (48, 16)),
    ("triton_w4a16", 4, 32, True, torch.float16, (128, 256)),
    ("triton_w4a16", 4, 64, False, torch.float16, (40, 24, 33)),
    ("triton_w8a16", 8, 64, False, torch.float16, (40, 128)),
    ("triton_w3a16", 3, 64, False, torch.float16, (40, 128)),
    ("triton_w2a16", 2, -1, True, torch.float16, (128, 40)),
    *[("reference", bits, 64, bits % 2 == 1, torch.float32, (40, 24, 33)) for bits in (2, 3, 4, 5, 6, 8)],
]


@pytest.mark.parametrize("biases", [(), (0, 2)], ids=str)
@pytest.mark.parametrize(("row", "bits", "group_size", "symmetric", "dtype", "sizes"), ROWS, ids=str)
@torch.no_grad()
def test_one_product_is_what_each_layer_computes(
    row: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    biases: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products = Products(monkeypatch)
    sample = ops.Layer(bits, K if group_size < 0 else group_size, symmetric, sizes[0], K)
    if row.startswith("cpu_native") and (reason := ops.KERNELS[row].refuses(sample, torch.device("cpu"), dtype)):
        pytest.skip(reason)
    monkeypatch.setattr(ops, "choose", lambda *_: row)
    layers = [
        random_layer(n, bits, group_size, symmetric=symmetric, bias=place in biases, seed=place)
        for place, n in enumerate(sizes)
    ]
    whole = fused(layers, dtype)
    assert whole.kernel == row
    for m in (1, 5):
        x = random_input(m, dtype, seed=m)
        products.taken()
        found = [layer(x) for layer in layers]
        assert len(products.taken()) == 1
        for layer, y in zip(layers, found, strict=True):
            assert y.dtype == dtype
            assert y.is_contiguous()
            assert_close_to_float64(y, exact(layer, x), K)
        alone = [layer(x.clone()) for layer in layers[1:]]  # each has a view that multiplies for itself
        assert products.taken() == [layer.out_features for layer in layers[1:]]
        for layer, y in zip(layers[1:], alone, strict=True):
            assert_close_to_float64(y, exact(layer, x), K)
    assert fusion._waiting.x is None, "nothing is left behind"
