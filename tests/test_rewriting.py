"""Transforms on their way through the driver: the packed model computes what the original does, in another basis."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SMALL, assert_fails, assert_nothing_finished, llmq
from safetensors.torch import load_file
from tiny_models import LLAMA, make_llama, make_model, make_text
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

import llmq as package


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.txt", 2000)


def quantize(source: Path, text: Path, *options: object) -> Path:
    output = source.with_name("packed")
    result = llmq("quantize", source, "--output", output, *SMALL, "--calibration", text, "--asym", *options)
    assert result.exit_code == 0, result.stderr
    return output


def logits(model: Any) -> Tensor:
    ids = torch.randint(1, 128, (2, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).logits


def original(source: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def distance(packed: Path, source: Path) -> float:
    exact = logits(original(source))
    return float((logits(package.load(packed)) - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_model_computes_the_same(tmp_path: Path, text: Path, kind: str, tied: bool) -> None:
    source = make_llama(tmp_path / "model", tie_word_embeddings=tied)
    packed = quantize(source, text, "--bits", 8, "--rotation", kind)
    plain = quantize(make_llama(tmp_path / "other" / "model", tie_word_embeddings=tied), text, "--bits", 8)
    # the rounding of eight bits, amplified by a random model; in a wrong basis the logits would be others altogether
    assert distance(packed, source) < 3 * distance(plain, tmp_path / "other" / "model") < 0.2
    assert not torch.equal(
        load_file(packed / "model.safetensors")["model.embed_tokens.weight"],
        load_file(plain / "model.safetensors")["model.embed_tokens.weight"],
    )
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False
    report = json.loads((packed / "report.json").read_text(encoding="utf-8"))
    assert any("residual stream rotated" in note for note in report["transforms"])
    assert sum("heads rotated" in note for note in report["transforms"]) == 2


def test_every_norm_of_a_rotated_model_has_gain_one(tmp_path: Path, text: Path) -> None:
    packed = quantize(make_llama(tmp_path / "model"), text, "--rotation", "hadamard")
    norms = [t for name, t in load_file(packed / "model.safetensors").items() if "norm" in name]
    assert len(norms) == 5
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in norms)


def outlier_model(folder: Path) -> Path:
    """Write a Llama in which two channels of every normed input are 60 times as large, and their columns as small."""
    make_llama(folder)
    model = original(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            readers = {
                layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
                layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
            }
            for norm, linears in readers.items():
                norm.weight[[3, 40]] *= 60
                for linear in linears:
                    linear.weight[:, [3, 40]] /= 60
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scaling", ["smooth", "awq"])
def test_scaling_undoes_planted_outliers(tmp_path: Path, text: Path, scaling: str) -> None:
    source = outlier_model(tmp_path / "model")
    assert torch.allclose(logits(original(source)), logits(original(make_llama(tmp_path / "x" / "model"))), atol=1e-3)
    without = distance(quantize(source, text, "--bits", 4), source)
    (tmp_path / "packed").rename(tmp_path / "without")
    packed = quantize(source, text, "--bits", 4, "--scaling", scaling)
    assert distance(packed, source) < 0.8 * without
    report = json.loads((packed / "report.json").read_text(encoding="utf-8"))
    kept = [note for note in report["transforms"] if f"scaled ({scaling})" in note]
    assert any("input_layernorm" in note for note in kept)
    assert "model.layers.0.input_layernorm.weight" in report["dense"]["rewritten"]


def test_a_scaling_that_does_not_pay_is_left(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.rewriting._WORTHWHILE", 0.0)
    source = outlier_model(tmp_path / "model")
    packed = quantize(source, text, "--scaling", "smooth")
    norms = load_file(source / "model.safetensors")
    after = load_file(packed / "model.safetensors")
    assert all(torch.equal(t, after[name]) for name, t in norms.items() if "norm" in name)


def test_transforms_of_a_bfloat16_model_are_calibrated_as_they_are_stored(tmp_path: Path, text: Path) -> None:
    source = make_model(tmp_path / "model", LlamaConfig(**LLAMA), dtype=torch.bfloat16)
    packed = quantize(source, text, "--bits", 8, "--rotation", "hadamard")
    tensors = load_file(packed / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == tensors["lm_head.weight"].dtype == torch.bfloat16
    assert distance(packed, source) < 0.2  # as above


def test_a_model_that_cannot_be_rotated_says_which_module_is_in_the_way(tmp_path: Path, text: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key not in ("tie_word_embeddings",)}
    source = make_model(tmp_path / "model", Gemma2Config(**config, head_dim=16))
    options = (*SMALL, "--calibration", text, "--rotation", "hadamard")
    result = llmq("quantize", source, "--output", tmp_path / "out", *options)
    assert_fails(result.exit_code, result.stdout, result.stderr, "layernorm", "rotated", expected=2)
    assert_nothing_finished(tmp_path / "out")


@pytest.mark.parametrize("transform", ["--rotation=random", "--scaling=smooth"])
def test_transforms_refuse_to_work_in_half_precision(tmp_path: Path, text: Path, transform: str) -> None:
    source = make_llama(tmp_path / "model")
    options = (*SMALL, "--calibration", text, transform, "--dtype", "bfloat16")
    result = llmq("quantize", source, "--output", tmp_path / "out", *options)
    assert_fails(result.exit_code, result.stdout, result.stderr, "float32", "bfloat16", expected=2)


@pytest.mark.parametrize("stage", ["--tune-steps=2", "--tune-epochs=1", "--guidance-groups=1"])
def test_gradient_stages_need_calibration(tmp_path: Path, stage: str) -> None:
    source = make_llama(tmp_path / "model")
    result = llmq("quantize", source, "--output", tmp_path / "out", "--group-size", 32, "--method", "rtn", stage)
    assert_fails(result.exit_code, result.stdout, result.stderr, "needs calibration", "rtn", expected=2)
