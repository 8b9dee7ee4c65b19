"""Whole folders in our own layout: odd sizes, act-order of others, and what other versions of llmq have to refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, make_llama
from torch import Tensor

import llmq
import llmq.hf
from llmq.calibration import Calibration
from llmq.convert import convert
from llmq.doctor import NOTE, diagnose
from llmq.driver import quantize
from llmq.errors import CheckpointError
from llmq.packed import PackedCheckpoint
from llmq.recipe import Recipe
from llmq.verify.reference import reference_model

IDS = torch.randint(1, WORDS, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model: Any = llmq.load(folder, dtype=torch.float32)
    found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(
    ("bits", "sym", "group_size"), [(5, False, 48), (3, True, 7), (8, False, 128), (6, True, -1)], ids=str
)
def test_layers_of_any_size_in_groups_of_any_size(tmp_path: Path, bits: int, sym: bool, group_size: int) -> None:
    dense = make_llama(tmp_path / "dense", hidden_size=60, intermediate_size=101, head_dim=14, vocab_size=131)
    ids = torch.randint(1, WORDS, (8, 24), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(bits=bits, sym=sym, group_size=group_size, format="llmq")
    quantize(dense, tmp_path / "packed", recipe, calibration=Calibration(ids, None, "random", "none"))
    packed = PackedCheckpoint(tmp_path / "packed")
    with torch.no_grad():
        expected = reference_model(packed)(IDS).logits
    # float32 sums of at most 101 products in another order, through two blocks
    assert (logits(packed.path) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert [f.line() for f in diagnose(packed.path) if f.severity != NOTE] == []
    model: Any = llmq.load(packed.path)
    model.save_pretrained(tmp_path / "saved")
    saved = PackedCheckpoint(tmp_path / "saved")
    assert all(torch.equal(saved.read(key), packed.read(key)) for key in packed)


@pytest.mark.parametrize("format", ["gptq_v2", "compressed-tensors"])
def test_act_order_of_others_is_kept_and_computed(tmp_path: Path, format: str) -> None:
    quantize(
        make_llama(tmp_path / "dense"),
        tmp_path / "theirs",
        Recipe(method="rtn", sym=False, group_size=16, format=format),
    )
    content = load_file(tmp_path / "theirs/model.safetensors")
    index = {"gptq_v2": "g_idx", "compressed-tensors": "weight_g_idx"}[format]
    for module, layer in PackedCheckpoint(tmp_path / "theirs").layers.items():
        k = layer.shape[1]
        order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
        content[f"{module}.{index}"] = (torch.arange(k) // 16)[order].int()
    save_file(content, tmp_path / "theirs/model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "theirs", tmp_path / "ours", "llmq")
    assert any(key.endswith(".permutation") for key in PackedCheckpoint(tmp_path / "ours"))
    assert torch.equal(logits(tmp_path / "ours"), logits(tmp_path / "theirs"))
    assert [f.line() for f in diagnose(tmp_path / "ours") if f.severity != NOTE] == []
    model: Any = llmq.load(tmp_path / "ours")
    model.save_pretrained(tmp_path / "saved")
    saved, ours = PackedCheckpoint(tmp_path / "saved"), PackedCheckpoint(tmp_path / "ours")
    assert all(torch.equal(saved.read(key), ours.read(key)) for key in ours)
    convert(tmp_path / "saved", tmp_path / "back", format)
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == content.keys()
    assert all(torch.equal(back[key], content[key]) for key in content if key.rpartition(".")[2] != "weight")


def test_an_index_that_moves_nothing_is_no_order(tmp_path: Path) -> None:
    recipe = Recipe(method="rtn", group_size=32, format="compressed-tensors")
    quantize(make_llama(tmp_path / "dense"), tmp_path / "ct", recipe)
    content = load_file(tmp_path / "ct/model.safetensors")
    for module, layer in PackedCheckpoint(tmp_path / "ct").layers.items():
        content[f"{module}.weight_g_idx"] = (torch.arange(layer.shape[1]) // 32).int()
    save_file(content, tmp_path / "ct/model.safetensors", metadata={"format": "pt"})
    for format in ("gptq", "llmq"):
        convert(tmp_path / "ct", tmp_path / format, format)
        assert torch.equal(logits(tmp_path / format), logits(tmp_path / "ct"))


def test_a_folder_of_a_newer_llmq_is_refused_by_all(tmp_path: Path) -> None:
    recipe = Recipe(method="rtn", group_size=32, format="llmq")
    quantize(make_llama(tmp_path / "dense"), tmp_path / "packed", recipe)
    folder = Path(shutil.copytree(tmp_path / "packed", tmp_path / "newer"))
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"]["schemes"][0]["grid"] = "spiral"
    (folder / "config.json").write_text(json.dumps(config))
    for reader in (llmq.load, PackedCheckpoint):
        with pytest.raises(CheckpointError, match=r"grid is 'spiral'.*needs a newer llmq"):
            reader(folder)
    with pytest.raises(CheckpointError, match="needs a newer llmq"):
        convert(folder, tmp_path / "out", "gptq")
    assert next(finding.name for finding in diagnose(folder)) == "unreadable"


def test_transformers_knows_the_method_only_while_llmq_is_enabled() -> None:
    from transformers.quantizers import auto

    llmq.hf.disable()
    try:
        assert "llmq" not in auto.AUTO_QUANTIZER_MAPPING
        assert "llmq" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    finally:
        llmq.hf.enable()
    assert auto.AUTO_QUANTIZER_MAPPING["llmq"] is llmq.hf.PackedQuantizer
