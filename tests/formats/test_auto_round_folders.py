"""Folders under AutoRound's label: those that AutoRound wrote, ours, and what llmq.hf and the doctor make of them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_llama
from transformers import AutoModelForCausalLM, AutoRoundConfig
from transformers.quantizers import auto
from transformers.quantizers.quantizer_auto_round import AutoRoundQuantizer

import llmq.hf
from llmq.convert import convert
from llmq.doctor import NOTE, diagnose
from llmq.doctor.fixing import fix
from llmq.driver import quantize
from llmq.errors import SpecError
from llmq.packed import PackedCheckpoint
from llmq.recipe import Recipe

FOREIGN = Path(__file__).parents[1] / "data" / "foreign"
WROTE = sorted(path.name for path in FOREIGN.glob("autoround-label-*"))


# What AutoRound wrote
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WROTE)
def test_weights_are_those_that_autoround_multiplies_with(name: str) -> None:
    # AutoRound rounds products of codes and scales to float16, and of -0 a product with ones and zeros makes 0
    packed = PackedCheckpoint(FOREIGN / name)
    weights = {module: packed.dequantized(module) + 0.0 for module in packed.layers}
    sums = {module: hashlib.sha256(w.half().numpy().tobytes()).hexdigest() for module, w in weights.items()}
    assert sums == json.loads((FOREIGN / name / "weights.json").read_bytes())


def test_its_variants_are_all_there() -> None:
    found = {
        name: {(s.format, s.bits, s.symmetric) for s in PackedCheckpoint(FOREIGN / name).specs.values()}
        for name in WROTE
    }
    assert found == {
        "autoround-label-3-asym": {("gptq_v2", 3, False)},
        "autoround-label-4": {("gptq", 4, True)},
        "autoround-label-4-asym": {("awq", 4, False)},
        "autoround-label-mixed": {("gptq_v2", 4, False), ("gptq_v2", 8, True), ("gptq_v2", 2, True)},
    }


@pytest.mark.parametrize("name", WROTE)
def test_what_it_wrote_goes_through_our_label_and_comes_out_the_same(name: str, tmp_path: Path) -> None:
    expected = "auto_round:auto_gptq" if name == "autoround-label-4" else "auto_round:gptqmodel"
    convert(FOREIGN / name, tmp_path / "ours", "auto-round")
    source, ours = PackedCheckpoint(FOREIGN / name), PackedCheckpoint(tmp_path / "ours")
    assert ours.quantization["packing_format"] == expected
    assert {m: replace(s, format="") for m, s in ours.specs.items()} == {
        m: replace(s, format="") for m, s in source.specs.items()
    }
    for module in source.layers:
        assert torch.equal(source.dequantized(module), ours.dequantized(module))
    assert [f.line() for f in diagnose(tmp_path / "ours") if f.severity != NOTE] == []


# What llmq writes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sym", "label"), [(True, "gptq"), (False, "gptq_v2")])
def test_a_folder_of_ours(tmp_path: Path, sym: bool, label: str) -> None:
    recipe = Recipe(
        method="rtn", bits=4, sym=sym, group_size=32, format="auto-round", ignore=["model.layers.1.mlp.up_proj"]
    )
    quantize(make_llama(tmp_path / "dense"), tmp_path / "packed", recipe)
    packed = PackedCheckpoint(tmp_path / "packed")
    assert {s.format for s in packed.specs.values()} == {label}
    assert packed.quantization["extra_config"]["model.layers.1.mlp.up_proj"] == {"bits": 16}
    assert not [key for key in packed if key.endswith("g_idx")]
    assert not (tmp_path / "packed/quantize_config.json").exists()
    assert [f.line() for f in diagnose(tmp_path / "packed") if f.severity != NOTE] == []
    convert(tmp_path / "packed", tmp_path / "gptq", "gptq")
    convert(tmp_path / "gptq", tmp_path / "again", "auto-round")
    assert json.loads((tmp_path / "again/config.json").read_bytes()) == packed.config
    assert (
        load_file(tmp_path / "again/model.safetensors").keys()
        == load_file(tmp_path / "packed/model.safetensors").keys()
    )
    ids = torch.arange(16)[None]
    with torch.no_grad():
        one, two = (llmq.hf.load(tmp_path / name, dtype=torch.float32)(ids).logits for name in ("packed", "gptq"))
    assert torch.equal(one, two)


# llmq.hf and the doctor
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def relabelled(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a folder of AutoRound's with another configuration."""

    def make(name: str, *, tensors: Callable[[dict[str, torch.Tensor]], object] = len, **changes: Any) -> Path:
        folder = tmp_path / "relabelled"
        folder.mkdir()
        for path in (FOREIGN / name).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_bytes())
        config["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))
        content = load_file(folder / "model.safetensors")
        tensors(content)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def test_transformers_own_row_comes_back() -> None:
    try:
        llmq.hf.disable()
        assert auto.AUTO_QUANTIZER_MAPPING["auto-round"] is AutoRoundQuantizer
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["auto-round"] is AutoRoundConfig
        assert "intel/auto-round" not in auto.AUTO_QUANTIZER_MAPPING
    finally:
        llmq.hf.enable()
    assert auto.AUTO_QUANTIZER_MAPPING["auto-round"] is llmq.hf.PackedQuantizer


@pytest.mark.parametrize(
    "changes", [{"data_type": "mx_fp"}, {"bits": 6}, {"packing_format": "auto_round:fp8"}], ids=str
)
def test_what_llmq_does_not_read_is_left_to_transformers(
    relabelled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    class Own:
        @classmethod
        def from_dict(cls, *_: Any, **__: Any) -> None:
            raise NotImplementedError("transformers' own configuration")

    monkeypatch.setitem(llmq.hf._PREVIOUS, "auto-round", (Own, Own))
    with pytest.raises(NotImplementedError, match="own configuration"):
        AutoModelForCausalLM.from_pretrained(relabelled("autoround-label-4", **changes))


def test_saving_writes_back_what_was_read(tmp_path: Path) -> None:
    source = FOREIGN / "autoround-label-mixed"
    llmq.hf.load(source).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes())["quantization_config"]
    assert config == PackedCheckpoint(source).quantization
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_doctor_says_who_reads_the_label() -> None:
    refusing = {f.where[0]: f.seen for f in diagnose(FOREIGN / "autoround-label-4") if f.name == "engine-refuses"}
    assert refusing["GPTQModel 7.7"].startswith("format auto-round, it reads gptq")
    assert not refusing.keys() & {"transformers with AutoRound 0.16", "vLLM 0.33"}


@pytest.mark.parametrize("wrong", ["auto_round:gptqmodel", "auto_round"])
def test_the_doctor_repairs_a_wrong_label(relabelled: Callable[..., Path], tmp_path: Path, wrong: str) -> None:
    name, right = "autoround-label-4", "auto_round:auto_gptq"
    folder = relabelled(name, packing_format=wrong)
    assert [f.name for f in diagnose(folder) if f.severity != NOTE] == ["zeros-of-other-version"]
    fix(folder, tmp_path / "fixed")
    config = json.loads((tmp_path / "fixed/config.json").read_bytes())["quantization_config"]
    assert config["packing_format"] == right
    assert [f.line() for f in diagnose(tmp_path / "fixed") if f.severity != NOTE] == []
    module = "model.layers.0.mlp.down_proj"
    assert torch.equal(
        PackedCheckpoint(tmp_path / "fixed").dequantized(module), PackedCheckpoint(FOREIGN / name).dequantized(module)
    )


def test_the_doctor_names_the_label_where_asymmetric_zeros_are_shifted(relabelled: Callable[..., Path]) -> None:
    folder = relabelled("autoround-label-3-asym", packing_format="auto_round:auto_gptq")
    [found] = [f for f in diagnose(folder) if f.severity != NOTE]
    assert found.name == "zeros-shifted"
    assert "try packing_format auto_round:gptqmodel" in found.line()


def test_the_doctor_finds_what_is_dense_without_being_said_to_be(relabelled: Callable[..., Path]) -> None:
    folder = relabelled("autoround-label-mixed")
    config = json.loads((folder / "config.json").read_bytes())
    del config["quantization_config"]["extra_config"]["model.layers.0.self_attn.o_proj"]
    (folder / "config.json").write_text(json.dumps(config))
    assert [(f.name, f.where) for f in diagnose(folder) if f.severity != NOTE] == [
        ("packed-but-dense", ("model.layers.0.self_attn.o_proj",))
    ]


def test_act_order_is_read_and_not_written(relabelled: Callable[..., Path], tmp_path: Path) -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    module = "model.layers.0.self_attn.q_proj"

    def shuffle(content: dict[str, torch.Tensor]) -> None:
        content[f"{module}.g_idx"] = (order // 32).to(torch.int32)

    folder = relabelled("autoround-label-4", tensors=shuffle)
    packed = PackedCheckpoint(folder)
    found, weight = packed.columns(module), packed.weight(module)
    assert found is not None
    assert weight.dequantize().shape == (64, 64)
    assert torch.equal((order // 32)[found], torch.arange(64) // 32)
    assert "g-idx-not-honoured" in [f.name for f in diagnose(folder)]
    with pytest.raises(SpecError, match=r"act-order.*auto-round has no place for"):
        convert(folder, tmp_path / "out", "auto-round")
