"""Heads that somebody has packed, in models that tie them to the embedding and in others."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_cases import layers
from tolerance import assert_close_to_float64
from transformers import AutoModelForCausalLM

import llmq.hf
from llmq.formats import FORMATS
from llmq.packed import PackedCheckpoint
from llmq.types import QuantSpec


def with_packed_head(source: Path, folder: Path, spec: QuantSpec, *, tied: bool) -> torch.Tensor:
    """Write `source` with a packed head to `folder`, and return what the head stands for."""
    checkpoint = PackedCheckpoint(source)
    content = load_file(source / "model.safetensors")
    stored = FORMATS[spec.format]
    weight = checkpoint.weight("model.layers.0.mlp.up_proj")  # [128, 64], as is the head
    content |= {f"lm_head.{name}": tensor for name, tensor in stored.pack(weight, spec).items()}
    del content["lm_head.weight"]
    folder.mkdir()
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    specs = {**checkpoint.specs, "lm_head": spec}
    config = {**checkpoint.config, "quantization_config": stored.config(specs, []), "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return weight.dequantize()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("device_map", [None, "auto"])
@pytest.mark.parametrize(
    ("format", "bits", "sym"), [("gptq", 4, True), ("gptq_v2", 3, False), ("compressed-tensors", 4, True)]
)
def test_packed_heads_load_and_save(
    format: str, bits: int, sym: bool, device_map: str | None, tied: bool, packed: Callable[..., Path], tmp_path: Path
) -> None:
    source = packed(bits, 32, sym, format.removesuffix("_v2"))
    folder, saved = tmp_path / "packed", tmp_path / "saved"
    head = with_packed_head(source, folder, QuantSpec(bits, 32, sym, format), tied=tied)
    quantization = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    if format != "compressed-tensors":
        assert quantization["lm_head"] is True
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device_map)
    assert "lm_head" in layers(model)
    ids = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        assert_close_to_float64(model(ids).logits, hidden.double() @ head.double().T, 64)
        plain = llmq.load(source, dtype=torch.float32)
        assert torch.equal(plain.model(ids).last_hidden_state, hidden)  # the embedding is what it was
    model.save_pretrained(saved)
    before, after = load_file(folder / "model.safetensors"), load_file(saved / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    with torch.no_grad():
        assert torch.equal(llmq.load(saved, dtype=torch.float32)(ids).logits, model(ids).logits)
