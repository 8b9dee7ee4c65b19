"""Where tensors went: each kind of account is planted and found, and nothing else."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LLAMA, WORDS, make_model
from transformers import LlamaConfig, Qwen3MoeConfig
from verify_cases import edited, pack

from llmq.checkpoint import CheckpointReader
from llmq.packed import PackedCheckpoint
from llmq.verify.account import Account, settle

EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def account(original: Path, packed: Path) -> Account:
    return settle(CheckpointReader(original), PackedCheckpoint(packed))


def without(found: Account, *kinds: str) -> dict[str, Any]:
    return {kind: names for kind, names in asdict(found).items() if names and kind not in kinds}


def test_every_tensor_is_packed_or_copied(dense: Path, packed: Path) -> None:
    found = account(dense, packed)
    assert list(found.packed) == ["4 bits, groups of 32, asymmetric, gptq_v2"]
    assert without(found, "packed", "copied") == {}
    names = [name for kind in found.packed.values() for name in kind] + found.copied
    assert sorted(names) == sorted(CheckpointReader(dense))
    assert len(PackedCheckpoint(packed).layers) == len(next(iter(found.packed.values())))
    assert found.faults == []


@pytest.mark.parametrize(
    ("change", "kind", "name"),
    [
        (lambda content: content[NORM].view(torch.int32)[3:4].bitwise_xor_(1), "changed", NORM),
        (lambda content: content.update({NORM: content[NORM].half()}), "changed", NORM),
        (lambda content: content.update({NORM: content[NORM].view(torch.int32)}), "changed", NORM),
        (lambda content: content.pop(NORM), "missing", NORM),
        (lambda content: content.update(more=torch.zeros(3)), "added", "more"),
    ],
    ids=["bit", "dtype", "same bits", "missing", "added"],
)
def test_what_nobody_accounts_for_is_a_fault(
    dense: Path, packed: Path, tmp_path: Path, change: Any, kind: str, name: str
) -> None:
    found = account(dense, edited(packed, tmp_path / "edited", change))
    assert without(found, "packed", "copied") == {kind: [name]}
    [fault] = found.faults
    assert fault.startswith(f"tensor {name} ")


def test_what_the_report_says_was_rewritten_is_no_fault(dense: Path, packed: Path, tmp_path: Path) -> None:
    folder = edited(packed, tmp_path / "edited", lambda content: content[NORM].mul_(2))
    report = json.loads((folder / "report.json").read_bytes())
    report["dense"]["rewritten"] = [NORM]
    (folder / "report.json").write_text(json.dumps(report))
    found = account(dense, folder)
    assert found.rewritten == [NORM]
    assert found.faults == []
    (folder / "report.json").write_text("{}")
    assert account(dense, folder).changed == [NORM]


def tied(folder: Path) -> Path:
    return make_model(folder, LlamaConfig(**{**LLAMA, "num_hidden_layers": 1, "tie_word_embeddings": True}))


def test_a_tied_head_may_be_left_out(tmp_path: Path) -> None:
    dense = tied(tmp_path / "dense")
    packed = pack(dense, tmp_path / "packed")
    twice = edited(dense, tmp_path / "twice", lambda content: content.update({HEAD: content[EMBEDDINGS].clone()}))
    assert without(account(twice, packed), "packed", "copied") == {"tied": [HEAD]}


def test_a_head_of_its_own_needs_rewritten_embeddings(tmp_path: Path) -> None:
    dense = tied(tmp_path / "dense")
    untied = edited(
        pack(dense, tmp_path / "packed"),
        tmp_path / "untied",
        lambda content: content.update({HEAD: content[EMBEDDINGS].clone()}),
    )
    config = json.loads((untied / "config.json").read_bytes())
    (untied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert without(account(dense, untied), "packed", "copied") == {"added": [HEAD]}
    report = json.loads((untied / "report.json").read_bytes())
    report["dense"]["rewritten"] = [EMBEDDINGS]
    (untied / "report.json").write_text(json.dumps(report))
    assert without(account(dense, untied), "packed", "copied") == {"rewritten": [HEAD]}


def test_fused_experts_go_by_their_parts(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    apart = make_model(tmp_path / "apart", config)

    def fuse(content: dict[str, torch.Tensor]) -> None:
        base = "model.layers.0.mlp.experts"
        parts = {
            part: torch.stack([content.pop(f"{base}.{i}.{part}_proj.weight") for i in range(4)])
            for part in ("gate", "up", "down")
        }
        content[f"{base}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        content[f"{base}.down_proj"] = parts["down"]

    found = account(edited(apart, tmp_path / "fused", fuse), pack(apart, tmp_path / "packed"))
    assert found == account(apart, tmp_path / "packed")
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in next(iter(found.packed.values()))
    assert found.faults == []
