"""The reference and the prompts: what codes stand for, in plain transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LLAMA, WORDS, make_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen3MoeConfig
from verify_cases import edited, pack

from llmq.convert import convert
from llmq.errors import CheckpointError
from llmq.nn import QuantLinear
from llmq.packed import PackedCheckpoint
from llmq.preflight import model_config
from llmq.verify.prompts import LENGTH, ROWS, fixed_prompts
from llmq.verify.reference import folder_of, logits, original_model, reference_model

MOE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=WORDS, n_embd=64, n_layer=1, n_head=2, n_positions=64),
    "qwen3_moe": Qwen3MoeConfig(**MOE, head_dim=16, num_experts=4, moe_intermediate_size=32),
    "tied": LlamaConfig(**{**LLAMA, "tie_word_embeddings": True}),
}
IDS = torch.randint(1, WORDS, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_reference_is_the_dense_model_of_the_codes(tmp_path: Path, kind: str) -> None:
    packed = pack(make_model(tmp_path / "dense", CONFIGS[kind]), tmp_path / "packed")
    convert(packed, tmp_path / "back", "dense")  # float32, as the original is
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    model = reference_model(PackedCheckpoint(packed))
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert torch.equal(logits(model, IDS), logits(expected, IDS))
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(logits(original_model(folder_of(tmp_path / "dense")), IDS), logits(original, IDS))


def test_a_missing_tensor_is_not_made_up(packed: Path, tmp_path: Path) -> None:
    damaged = edited(packed, tmp_path / "damaged", lambda content: content.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is missing"):
        reference_model(PackedCheckpoint(damaged))


def test_a_packed_folder_is_no_original(packed: Path) -> None:
    with pytest.raises(CheckpointError, match="--against names the model that was quantized"):
        folder_of(packed)


def test_prompts_are_the_same_each_time(dense: Path, tmp_path: Path) -> None:
    first, second = (fixed_prompts(dense, model_config(folder_of(dense))) for _ in range(2))
    assert torch.equal(first.ids, second.ids)
    assert first.ids.shape == (ROWS, LENGTH)
    assert first.text_rows == 2
    assert not first.ids[:2].any()  # the tokenizer knows none of the text's words
    assert first.ids[2:].bool().any(1).all()
    shutil.copytree(dense, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    config = json.loads((tmp_path / "bare/config.json").read_bytes())
    (tmp_path / "bare/config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    bare = fixed_prompts(tmp_path / "bare", model_config(folder_of(tmp_path / "bare")))
    assert bare.text_rows == 0
    assert bare.ids.shape == (ROWS, 32)
    assert bare.ids.min() >= 0
    assert bare.ids.max() < WORDS
    assert len(bare.ids.unique(dim=0)) == ROWS
