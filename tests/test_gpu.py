"""What only a GPU can show: ``TRITON_INTERPRET=0 scripts/test -m gpu``, which also runs tests/kernels on it."""

from pathlib import Path

import pytest
import torch
from tiny_models import make_llama
from tolerance import assert_close_to_float64

import llmq
from llmq.calibration import Calibration
from llmq.driver import quantize
from llmq.nn import QuantLinear
from llmq.recipe import Recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (8, True), (8, False), (3, False)])
def test_quantizing_and_serving_on_a_gpu(tmp_path: Path, bits: int, sym: bool, dtype: torch.dtype) -> None:
    source = make_llama(tmp_path / "dense")
    ids = torch.randint(1, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(bits=bits, group_size=32, sym=sym)
    report = quantize(source, tmp_path / "packed", recipe, calibration=Calibration(ids, None, "x", "y"), device="cuda")
    assert all(layer.relative_loss is not None and layer.relative_loss < 0.3 for layer in report.layers)
    assert report.peak_memory_bytes["device"] > 0

    model = llmq.load(tmp_path / "packed", dtype=dtype, device="cuda")
    rows = {2: "reference", 3: "reference", 4: "triton_w4a16", 8: "triton_w8a16"}
    expected_row = "reference" if dtype == torch.float32 else rows[bits]

    def compare(layer: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        assert isinstance(layer, QuantLinear)
        assert layer.kernel == expected_row
        expected = args[0].double() @ layer.quantized_weight().dequantize().double().T
        assert_close_to_float64(out, expected, layer.in_features)

    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.register_forward_hook(compare)
    with torch.no_grad():
        model(ids[:1, :17].cuda())
    stored = {key: tensor.cpu() for key, tensor in model.state_dict().items() if "proj" in key}
    moved = model.cpu().state_dict()
    assert all(torch.equal(moved[key], tensor) for key, tensor in stored.items())
