"""Adapters for packed models, end to end: what is measured, and what peft makes of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import RANK, SQUARE
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import make_llama, make_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

import llmq
from llmq import lora
from llmq.adapter import Adapter, compensate, open_pair, save
from llmq.calibration import Calibration
from llmq.driver import quantize
from llmq.errors import SpecError
from llmq.nn import QuantLinear
from llmq.recipe import Recipe

# transformers deprecated an attribute that PEFT asks for
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=ids).logits
    assert isinstance(found, Tensor)
    return found


def kl(original: Tensor, other: Tensor) -> float:
    p, q = original.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def heldout(calibration: Calibration) -> Tensor:
    return calibration.input_ids.flip(0, 1)[:4]


@pytest.mark.parametrize("settings", [{}, {"sym": True}, {"bits": 3}], ids=["version 2", "version 1", "3 bits"])
def test_peft_brings_a_packed_model_closer_to_the_original(
    dense: Path, packed: Callable[..., Path], calibration: Calibration, tmp_path: Path, settings: dict[str, Any]
) -> None:
    ids = heldout(calibration)
    before, original = llmq.load(packed(**settings)), logits(llmq.load(dense), ids)
    without = logits(before, ids)
    adapter = compensate(open_pair(packed(**settings), dense), calibration, RANK)
    save(adapter, tmp_path / "adapter")
    after = PeftModel.from_pretrained(before, str(tmp_path / "adapter"))
    assert kl(original, logits(after, ids)) < 0.8 * kl(original, without)
    assert all(layer.loss_after < 0.9 * layer.loss_before for layer in adapter.layers)
    with after.disable_adapter():
        torch.testing.assert_close(logits(after, ids), without, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_full_rank_gives_the_original_back(kind: str, calibration: Calibration, tmp_path: Path) -> None:
    if kind == "llama":
        make_llama(tmp_path / "dense", **SQUARE)
    else:  # keeps its weights as [K, N], and its biases count
        sizes = {"vocab_size": 128, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2}
        config = GPT2Config(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
        make_model(tmp_path / "dense", config)
    quantize(tmp_path / "dense", tmp_path / "packed", Recipe(bits=2, group_size=32, sym=False), calibration=calibration)
    adapter = compensate(open_pair(tmp_path / "packed", tmp_path / "dense"), calibration, 64)
    save(adapter, tmp_path / "adapter")
    ids = heldout(calibration)
    original = logits(llmq.load(tmp_path / "dense"), ids)
    restored = logits(llmq.load(tmp_path / "packed", adapter=tmp_path / "adapter"), ids)
    # weights are off by eps of float32, which 2 blocks and sums over 256 inputs make about 100 times that
    torch.testing.assert_close(restored, original, rtol=1e-3, atol=1e-4 * float(original.abs().max()))


def test_losses_are_those_of_inputs_in_the_packed_model(
    dense: Path, packed: Callable[..., Path], calibration: Calibration, adapter: Adapter
) -> None:
    model = llmq.load(packed())
    originals = load_file(dense / "model.safetensors")
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            module.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0].flatten(0, 1).double()}))
    logits(model, calibration.input_ids)
    assert [layer.name for layer in adapter.layers[:3]] == [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    assert {layer.name for layer in adapter.layers} == inputs.keys()
    for layer in adapter.layers:
        x, module = inputs[layer.name], model.get_submodule(layer.name)
        w = originals[f"{layer.name}.weight"].double()
        error = w - module.quantized_weight().dequantize().double()
        a, b = (adapter.tensors[f"base_model.model.{layer.name}.lora_{part}.weight"].double() for part in "AB")
        found = [float(2 * (e @ x.T).square().sum() / len(x)) for e in (error, error - b @ a, w)]
        # sums over 1024 tokens in float32
        assert [layer.loss_before, layer.loss_after, layer.energy] == pytest.approx(found, rel=1e-3)


def test_an_adapter_is_for_dense_layers_too(
    folder: Path, packed: Callable[..., Path], calibration: Calibration
) -> None:
    ids = heldout(calibration)
    ours = llmq.load(packed())
    weights = {n: m.quantized_weight().dequantize() for n, m in ours.named_modules() if isinstance(m, QuantLinear)}
    config = ours.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config).eval()
    dense_tensors = {name: tensor for name, tensor in ours.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(dense_tensors | {f"{name}.weight": weight for name, weight in weights.items()})
    merged = PeftModel.from_pretrained(plain, str(folder)).merge_and_unload()
    expected = logits(merged, ids)
    found = logits(llmq.load(packed(), adapter=folder), ids)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_folder_is_what_peft_writes(adapter: Adapter, folder: Path, packed: Callable[..., Path]) -> None:
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = LoraConfig.from_pretrained(str(folder))
    assert (config.r, config.lora_alpha, config.task_type) == (RANK, RANK, "CAUSAL_LM")
    assert config.base_model_name_or_path == str(packed().resolve())
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    model = get_peft_model(llmq.load(packed()), config)
    model.save_pretrained(folder.parent / "theirs")
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (folder.parent / "theirs", folder))
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
    weights = sum(layer.out_features * layer.in_features for layer in adapter.layers)
    assert adapter.bits_per_weight == 32 * sum(x.numel() for x in ours.values()) / weights


def test_factors_have_the_dtype_of_what_is_not_packed(calibration: Calibration, tmp_path: Path) -> None:
    make_llama(tmp_path / "float32", **SQUARE)
    AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    quantize(tmp_path / "dense", tmp_path / "packed", Recipe(method="rtn", group_size=32))
    adapter = compensate(open_pair(tmp_path / "packed", tmp_path / "dense", "float32"), calibration, RANK)
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.bfloat16}
    save(adapter, tmp_path / "adapter")
    ids = heldout(calibration)
    original = logits(llmq.load(tmp_path / "dense"), ids)
    found = [logits(llmq.load(tmp_path / "packed", adapter=x), ids) for x in (None, tmp_path / "adapter")]
    assert found[1].dtype == torch.bfloat16
    assert kl(original, found[1]) < kl(original, found[0])


def test_layers_that_stayed_dense_get_no_adapter(
    dense: Path, packed: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    folder = packed(ignore=("layers.0.mlp.down_proj",))
    adapter = compensate(open_pair(folder, dense), calibration, RANK)
    assert "model.layers.0.mlp.down_proj" not in adapter.modules
    assert "model.layers.1.mlp.down_proj" in adapter.modules
    save(adapter, tmp_path / "adapter")
    model = llmq.load(folder, adapter=tmp_path / "adapter")
    wrapped = {name for name, module in model.named_modules() if isinstance(module, lora.PackedLoraLinear)}
    assert wrapped == set(adapter.modules)
    assert len(wrapped) == 13


def test_one_block_is_in_memory_at_a_time(dense: Path, packed: Callable[..., Path], calibration: Calibration) -> None:
    pair = open_pair(packed(), dense)
    seen = []

    def look(layer: Any) -> None:
        blocks = pair.packed.structure.blocks
        seen.append([not next(block.parameters()).is_meta for block in blocks])

    compensate(pair, calibration, 1, progress=look)
    assert seen == [[True, False]] * 7 + [[False, True]] * 7
    assert all(p.is_meta for block in pair.packed.structure.blocks for p in block.parameters())


def test_padding_counts_for_nothing(
    dense: Path, packed: Callable[..., Path], calibration: Calibration, adapter: Adapter
) -> None:
    ids = torch.cat([calibration.input_ids, torch.ones(16, 8, dtype=torch.int64)], dim=1)
    mask = torch.arange(72).expand(16, -1) < 64
    found = compensate(open_pair(packed(), dense), Calibration(ids, mask, "x", "y"), RANK)
    before = [[layer.loss_before for layer in x.layers] for x in (adapter, found)]
    assert before[1] == pytest.approx(before[0], rel=1e-3)


def test_packed_layers_do_not_merge(folder: Path, packed: Callable[..., Path]) -> None:
    model = PeftModel.from_pretrained(llmq.load(packed()), str(folder))
    with pytest.raises(SpecError, match="cannot be merged"):
        model.merge_adapter()


def test_disabled_peft_does_not_know_packed_layers(folder: Path, packed: Callable[..., Path]) -> None:
    model = llmq.load(packed())
    lora.disable()
    try:
        with pytest.raises(ValueError, match="not supported"):
            PeftModel.from_pretrained(model, str(folder))
    finally:
        lora.enable()
