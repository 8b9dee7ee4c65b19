"""Gradients through the packed product, and LoRA adapters trained on it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from serving_cases import layers
from tolerance import assert_close_to_float64, relative_error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import validate_quantization_for_training

import llmq
from llmq import ops
from llmq.errors import SpecError
from llmq.formats import FORMATS
from llmq.nn import QuantLinear
from llmq.types import QuantSpec

# transformers deprecated an attribute that PEFT asks for
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

ROWS = [
    ("reference", torch.float32, 2, 32, False),
    ("reference", torch.float32, 3, -1, True),
    ("reference", torch.float32, 5, 32, False),
    ("reference", torch.float32, 6, 64, True),
    ("reference", torch.float16, 8, 96, False),
    ("cpu_int4pack", torch.bfloat16, 4, 32, False),
    ("cpu_int4pack", torch.bfloat16, 4, -1, True),
    ("cpu_int8pack", torch.bfloat16, 8, -1, True),
    ("triton_w4a16", torch.float16, 4, 32, False),
    ("triton_w8a16", torch.float16, 8, 64, True),
]


def random_layer(bits: int, group_size: int, sym: bool, *, n: int = 80, k: int = 192, bias: bool = True) -> QuantLinear:
    """Return a layer with random codes and scales near 1/64."""
    spec = QuantSpec(bits, group_size, sym, "compressed-tensors")
    draw = torch.Generator().manual_seed(bits)
    layer = QuantLinear(k, n, spec, bias=bias, device="cpu")
    words = FORMATS["compressed-tensors"].layout(spec, n, k)
    for name, (shape, dtype) in words.items():
        if dtype == torch.int32:  # any bits are codes
            value = torch.randint(-(2**31), 2**31, shape, generator=draw).to(dtype)
        elif name == "weight_shape":
            value = torch.tensor([n, k])
        else:
            value = (torch.rand(shape, generator=draw) / 64 + 1 / 128).bfloat16().to(dtype)
        layer.register_buffer(name, value)
    if layer.bias is not None:
        layer.bias.data.copy_(torch.randn(n, generator=draw))
    return layer


@pytest.mark.parametrize("slab", [2**22, 80 * 64, 80 * 40, 7], ids=["whole", "two groups", "ragged", "columns"])
@pytest.mark.parametrize(("row", "dtype", "bits", "group_size", "sym"), ROWS, ids=str)
def test_the_gradient_is_that_of_the_dequantized_weight(
    row: str, dtype: torch.dtype, bits: int, group_size: int, sym: bool, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_SLAB", slab)
    monkeypatch.setattr(ops, "choose", lambda *_: row)
    layer = random_layer(bits, group_size, sym)
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 192, generator=draw).to(dtype).requires_grad_()
    grad = torch.randn(2, 3, 80, generator=draw).to(dtype)
    layer(x).backward(grad)
    assert layer.kernel == row
    assert x.grad is not None
    assert x.grad.dtype == dtype
    # rounding W to `dtype` is as large as rounding the product, and independent of it: half an eps in all
    assert_close_to_float64(x.grad, grad.double() @ layer.quantized_weight().dequantize().double(), 80)
    assert layer.bias.grad is not None
    assert relative_error(layer.bias.grad, grad.double().sum((0, 1))) <= torch.finfo(dtype).eps
    assert not any(buffer.requires_grad for buffer in layer.buffers())


def test_nothing_is_computed_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("a gradient of inputs that need none")

    monkeypatch.setattr(ops, "quant_matmul_input_grad", never)
    layer = random_layer(4, 32, True)
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    layer(torch.ones(3, 192)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((80,), 3.0))


@pytest.mark.parametrize("bias", [True, False])
def test_operators_are_good_citizens_of_autograd(bias: bool) -> None:
    layer = random_layer(4, 32, False, n=32, k=64, bias=bias)
    layer.prepare_(torch.float32)
    if layer.bias is not None:
        layer.bias.requires_grad_(True)
    x = torch.randn(2, 3, 64, requires_grad=True)
    plain = (*layer.layer[:4], layer.layer.grid)
    torch.library.opcheck(ops.quant_matmul, (x, layer.packed(), layer.bias, "reference", *plain))
    grad = torch.randn(2, 3, 32)
    torch.library.opcheck(ops.quant_matmul_input_grad, (grad, layer.packed(), "reference", *plain[:3], 64, "uniform"))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).backward(grad)
    found, x.grad = x.grad, None
    layer(x).backward(grad)
    assert found is not None
    assert torch.equal(found, x.grad)


def with_adapter(model: nn.Module) -> PeftModel:
    """Return `model` with the same random adapter, each time it is called."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zeros, so that the first gradients of lora_A would be zero
                parameter.data.normal_(std=0.05)
    return adapted


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 128, (4, 24), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids}


def dequantized(dense: Path, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the dense model that `model` stands for."""
    exact = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64)
    for name, layer in layers(model).items():
        exact.get_submodule(name).weight.data.copy_(layer.quantized_weight().dequantize())
    return exact.to(dtype)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model(**batch()).loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("sym", [True, False])
def test_gradients_of_an_adapter_are_those_on_the_dequantized_model(
    sym: bool, checkpointing: bool, dense: Path, packed: Callable[..., Path]
) -> None:
    model = llmq.load(packed(4, 32, sym), dtype=torch.float32)
    exact = with_adapter(dequantized(dense, model, torch.float64)).double()
    rounded = with_adapter(dequantized(dense, model, torch.float32))
    ours = with_adapter(model)
    if checkpointing:
        ours.activation_checkpointing_enable()
        ours.enable_input_require_grads()
    ours.train()
    expected, dense_gradients, found = gradients(exact), gradients(rounded), gradients(ours)
    assert found.keys() == expected.keys()
    assert len(found) == 12
    for name, gradient in found.items():
        # what float32 costs the dense model, twice: sums of products in another order
        allowed = max(2 * relative_error(dense_gradients[name], expected[name]), 16 * torch.finfo(torch.float32).eps)
        assert relative_error(gradient, expected[name]) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_learns_and_comes_back(packed: Callable[..., Path], tmp_path: Path, dtype: torch.dtype) -> None:
    base = llmq.load(packed(), dtype=dtype)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = with_adapter(base)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(**batch()).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llmq.load(packed(), dtype=dtype), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch()).logits, model.eval()(**batch()).logits)
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_merging_is_refused(packed: Callable[..., Path]) -> None:
    model = with_adapter(llmq.load(packed()))
    for merge in (
        model.merge_and_unload,
        model.merge_adapter,
        model.base_model.model.model.layers[0].mlp.down_proj.merge,
    ):
        with pytest.raises(SpecError, match="cannot be merged into packed weights"):
            merge()


def test_trainer_takes_adapters_and_nothing_else(packed: Callable[..., Path], tmp_path: Path) -> None:
    model = llmq.load(packed())
    assert model.hf_quantizer.is_trainable
    assert not model.hf_quantizer.is_qat_trainable
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    adapted = with_adapter(model)
    examples = [{name: tensor[row] for name, tensor in batch().items()} for row in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=0.02, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(adapted, arguments, train_dataset=examples)
    first = copy.deepcopy({n: p for n, p in adapted.named_parameters() if p.requires_grad})
    trainer.train()
    assert all(not torch.equal(first[n], p) for n, p in adapted.named_parameters() if p.requires_grad)
