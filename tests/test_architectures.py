"""Every architecture that structure is said to suffice for: quantized, packed, loaded, compared, saved again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import llmq
from llmq.calibration import Calibration
from llmq.driver import quantize
from llmq.nn import QuantLinear
from llmq.recipe import Recipe

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
GLU = {**COMMON, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
SPLIT = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
GATED = [*SPLIT, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]

CASES: dict[str, tuple[PretrainedConfig, list[list[str]]]] = {
    "llama": (LlamaConfig(**GLU), GATED),
    "mistral": (MistralConfig(**GLU, sliding_window=8), GATED),
    "qwen2": (Qwen2Config(**GLU), GATED),
    "qwen3": (Qwen3Config(**GLU, head_dim=16), GATED),
    "gemma3": (
        Gemma3TextConfig(**GLU, head_dim=16, layer_types=["sliding_attention", "full_attention"], sliding_window=8),
        GATED,
    ),
    "phi3": (
        Phi3Config(**GLU),
        [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    ),
    "opt": (
        OPTConfig(
            vocab_size=128,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=64,
            max_position_embeddings=64,
            init_std=0.3,
        ),
        [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]],
    ),
    "gpt2": (
        GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
        [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    ),
}
RECIPE = Recipe(bits=4, group_size=32, sym=False)


def windows(seed: int = 0) -> Calibration:
    ids = torch.randint(1, 128, (8, 32), generator=torch.Generator().manual_seed(seed))
    return Calibration(ids, None, "random tokens", "none")


def dequantized(folder: Path, packed: torch.nn.Module) -> torch.nn.Module:
    """Return the dense model in `folder` with the weights that `packed` holds."""
    dense = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            target = dense.get_submodule(name)
            weight = module.quantized_weight().dequantize()
            target.weight.data.copy_(weight if isinstance(target, torch.nn.Linear) else weight.T)
    return dense


@pytest.mark.parametrize("name", CASES)
def test_packed_model_equals_its_dequantized_self(name: str, tmp_path: Path) -> None:
    config, stages = CASES[name]
    source = make_model(tmp_path / "dense", config)
    report = quantize(source, tmp_path / "packed", RECIPE, calibration=windows())
    made = json.loads((tmp_path / "packed/config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert made["modules_in_block_to_quantize"] == stages
    assert len(report.layers) == 2 * sum(map(len, stages))
    # the activations that calibrate are the model's own: every layer does better than chance by far
    assert all(layer.relative_loss is not None and layer.relative_loss < 0.05 for layer in report.layers)

    packed = llmq.load(tmp_path / "packed")
    assert sum(isinstance(m, QuantLinear) for m in packed.modules()) == len(report.layers)
    ids = torch.randint(1, 128, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, dequantized(source, packed)(ids).logits)  # float32: the same numbers
        original = AutoModelForCausalLM.from_pretrained(source)(ids).logits
    assert not torch.equal(packed(ids).logits, original)

    packed.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("packed", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


@pytest.mark.parametrize("name", CASES)
def test_every_source_tensor_is_packed_or_copied(name: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "dense", CASES[name][0])
    recipe = RECIPE.model_copy(update={"method": "rtn"})
    packed = {layer.name for layer in quantize(source, tmp_path / "packed", recipe).layers}
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("dense", "packed"))
    for key, tensor in before.items():
        if key.removesuffix(".weight") in packed:
            assert key not in after
            assert f"{key.removesuffix('weight')}qweight" in after
        else:
            assert torch.equal(tensor, after[key])


def test_names_of_a_checkpoint_without_the_head_models_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2Model(CASES["gpt2"][0]).save_pretrained(tmp_path / "dense")  # keys start with h.0, as on the hub
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "dense/model.safetensors")
    quantize(tmp_path / "dense", tmp_path / "packed", RECIPE, calibration=windows())
    assert "h.0.attn.c_attn.qweight" in load_file(tmp_path / "packed/model.safetensors")
    packed = llmq.load(tmp_path / "packed")
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, dequantized(tmp_path / "dense", packed)(ids).logits)


def test_blocks_of_one_model_get_their_own_arguments(tmp_path: Path) -> None:
    """Gemma's blocks differ in attention mask and rotary table; feeding one block's to all changes the codes."""
    config = CASES["gemma3"][0]
    source = make_model(tmp_path / "dense", config)
    quantize(source, tmp_path / "a", RECIPE, calibration=windows())
    same = Gemma3TextConfig(**{**config.to_dict(), "layer_types": ["full_attention"] * 2})
    other = make_model(tmp_path / "dense2", same)
    quantize(other, tmp_path / "b", RECIPE, calibration=windows())
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in "ab")
    dense = [load_file(tmp_path / d / "model.safetensors") for d in ("dense", "dense2")]
    assert all(torch.equal(dense[0][key], dense[1][key]) for key in dense[0])  # the same weights, other masks
    key = "model.layers.0.self_attn.o_proj.qweight"
    assert not torch.equal(a[key], b[key])
