"""Packed folders that are not exported, and why; a file is whole or not there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import EXPERTS, SIZES, Packed, make_folder, pack_linears, random_weight, rewrite
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from llmq.errors import CheckpointError, SpecError
from llmq.exports import gguf as gguf_export
from llmq.exports.gguf import export


def test_codes_that_no_type_holds_are_refused_before_anything_is_written(llama: Packed, tmp_path: Path) -> None:
    module = "model.layers.1.mlp.up_proj"
    llama._weights[module] = random_weight(96, 64, 8, 32, symmetric=False)
    with pytest.raises(
        SpecError, match=f"{module}: no GGUF .* not even Q8_0: code - zero is .*; quantize symmetrically or"
    ):
        export(llama, tmp_path / "m.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_columns_out_of_order_are_refused(llama: Packed, tmp_path: Path) -> None:
    llama.order = torch.arange(64).flip(0)
    with pytest.raises(SpecError, match=r"model\.layers.*: its groups are not contiguous columns \(desc_act\)"):
        export(llama, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), CheckpointError, "lm_head.weight is missing, and tie_word_embeddings is f"),
        (lambda t: t.update(extra=torch.ones(3)), SpecError, "GGUF has no place for tensor extra in this architecture"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.float64)}),
            SpecError,
            "model.norm.weight is torch.float64; GGUF export keeps dense tensors in F32, F16, BF16",
        ),
    ],
)
def test_tensors_that_are_missing_or_too_many(
    tmp_path: Path, change: Any, error: type[Exception], message: str
) -> None:
    folder = make_folder(tmp_path / "m", LlamaConfig(**SIZES))
    weights = pack_linears(folder)._weights
    rewrite(folder, change)
    with pytest.raises(error, match=message):
        export(Packed(folder, weights), tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act is 'gelu', llama.cpp has 'silu'"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type is 'dynamic', llmq exports 'default', 'linear' and 'llama3'",
        ),
        (
            LlamaConfig(
                **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            ),
            "partial_rotary_factor is 0.5, llama.cpp has 1",
        ),
        (
            Qwen2Config(**SIZES, use_sliding_window=True),
            "use_sliding_window is true, and llama.cpp attends to everything",
        ),
        (Qwen3MoeConfig(**SIZES, **{**EXPERTS, "norm_topk_prob": False}), "norm_topk_prob is false"),
        (Qwen3MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[1]), "some layers have no experts"),
        (Qwen3MoeConfig(**SIZES, **EXPERTS, decoder_sparse_step=2), "some layers have no experts"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(
    tmp_path: Path, config: PretrainedConfig, message: str
) -> None:
    packed = pack_linears(make_folder(tmp_path / "m", config))
    with pytest.raises(SpecError, match=f"in GGUF: {message}.*; llama.cpp would compute another function"):
        export(packed, tmp_path / "m.gguf")


def test_other_architectures_are_refused_by_name(llama: Packed, tmp_path: Path) -> None:
    config = llama.path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForTokenClassification"))
    with pytest.raises(
        SpecError, match=r"GGUF export knows LlamaForCausalLM, .*, not LlamaForTokenClassification; convert"
    ):
        export(llama, tmp_path / "m.gguf")


def test_an_output_that_exists_is_not_touched(llama: Packed, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("precious")
    with pytest.raises(CheckpointError, match=r"m\.gguf: exists; choose another --output"):
        export(llama, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "precious"
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No such file"):
        export(llama, tmp_path / "nowhere" / "m.gguf")


def test_a_file_is_whole_or_not_there(llama: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf.llmq-partial").write_text("of a run that was killed")
    pieces = gguf_export._bytes_of

    def full(packed: Any, part: Any) -> Any:
        if part.name == "blk.1.attn_q.weight":
            assert (tmp_path / "m.gguf.llmq-partial").stat().st_size > 50_000
            raise OSError(28, "No space left on device")
        yield from pieces(packed, part)

    monkeypatch.setattr(gguf_export, "_bytes_of", full)
    with pytest.raises(CheckpointError, match=r"m\.gguf: cannot be written: .*the disk is full"):
        export(llama, tmp_path / "m.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_codes_are_read_back_before_the_file_gets_its_name(
    llama: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = gguf_export.blocks.pack

    def wrong(name: str, weight: Any) -> Any:
        yield from pack(name, replace(weight, codes=weight.codes ^ 1))

    monkeypatch.setattr(gguf_export.blocks, "pack", wrong)
    with pytest.raises(CheckpointError, match=r"read back is not model\.layers\.0.*; the disk or llmq is at fault"):
        export(llama, tmp_path / "m.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_without_the_gguf_package(llama: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_export, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"with the package gguf: pip install 'llmq\[gguf\]'"):
        export(llama, tmp_path / "m.gguf")
