"""What is not exported to ONNX, and why; whatever goes wrong leaves nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnx_cases import ONE, Exported
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, make_model
from transformers import (
    BertConfig,
    LlamaConfig,
)

from llmq.driver import quantize
from llmq.errors import CheckpointError, SpecError
from llmq.exports import onnx as onnx_export
from llmq.exports.onnx import FAST, export
from llmq.exports.onnx_constants import attach, reader
from llmq.exports.onnx_graph import PackedLinear
from llmq.exports.onnx_plan import Plan, plan
from llmq.packed import PackedCheckpoint
from llmq.recipe import Recipe


def test_what_goes_wrong_on_the_way_leaves_nothing(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, target = exported("llama").packed, tmp_path / "out"

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(SpecError, match=r"torch\.onnx cannot draw this model: RuntimeError: no such operator"):
        export(packed, target)
    monkeypatch.setattr(onnx_export, "draw", lambda *args: None)
    monkeypatch.setattr(ir, "save", lambda model, path, **kwargs: path.write_bytes(b"") and None)
    monkeypatch.setattr(onnx_export, "_prove", fails)
    with pytest.raises(RuntimeError):
        export(packed, target)
    monkeypatch.setattr(ir, "save", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(CheckpointError, match="the disk is full"):
        export(packed, target)
    assert not list(tmp_path.iterdir())


def test_bad_requests_are_refused_before_work_starts(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, target = exported("llama").packed, tmp_path / "out"
    monkeypatch.setattr(onnx_export, "draw", None)
    with pytest.raises(SpecError, match=r"accuracy_level 2 is none of 1 \(exact\) and 4"):
        export(packed, target, accuracy_level=2)
    target.mkdir()
    with pytest.raises(CheckpointError, match="out: exists; choose another --output"):
        export(packed, target)
    target.rmdir()
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(SpecError, match=r"with the package onnxscript: pip install 'llmq\[onnx\]'"):
        export(packed, target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"bits": 3}, r"down_proj: MatMulNBits of onnxruntime has codes of 2, 4 and 8 bits, these have 3; quantize to"),
        (
            {"group_size": 8},
            "down_proj: its blocks hold multiples of 16 columns, the groups of this layer 8; quantize to",
        ),
    ],
    ids=["bits", "groups"],
)
def test_codes_that_the_operator_cannot_hold_are_refused(tmp_path: Path, recipe: dict[str, Any], message: str) -> None:
    make_model(tmp_path / "dense", LlamaConfig(**ONE))
    quantize(tmp_path / "dense", tmp_path / "packed", Recipe(**{"method": "rtn", "group_size": 32, **recipe}))
    with pytest.raises(SpecError, match=message):
        export(PackedCheckpoint(tmp_path / "packed"), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "packed"}


def test_a_missing_tensor_is_an_error(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    shutil.copytree(exported("llama").packed.path, tmp_path / "packed")
    content = load_file(tmp_path / "packed" / "model.safetensors")
    del content["model.norm.weight"]
    save_file(content, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"packed: tensor model.norm.weight is missing"):
        plan(PackedCheckpoint(tmp_path / "packed"))


def test_no_parameter_stays_without_a_value(exported: Callable[[str], Exported]) -> None:
    packed = exported("llama").packed
    value = ir.Value(name="model.norm.weight", const_value=ir.tensor([0.0]), type=ir.TensorType(ir.DataType.FLOAT))
    drawn = ir.Model(ir.Graph([], [], nodes=[], initializers=[value]), ir_version=10)
    nothing = Plan(None, {}, {})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"packed: tensor norm.weight is missing"):
        attach(drawn, packed, nothing, {"norm.weight": "norm.weight"})


def test_a_zero_above_all_codes_is_refused_by_name(exported: Callable[[str], Exported]) -> None:
    packed = PackedCheckpoint(exported("gpt2").packed.path)
    module = "transformer.h.0.mlp.c_fc"
    weight = packed.weight(module)
    weight.zeros[0, 0] = 4
    packed.take = lambda name: (weight, None)  # type: ignore[method-assign]
    found = reader(packed, plan(packed))(f"{module}.codes")
    assert found is not None
    with pytest.raises(SpecError, match=f"{module}: has a zero of 4, above all codes of 2 bits"):
        found[1]()


def test_packed_embeddings_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "dense", LlamaConfig(**ONE))
    recipe = Recipe(method="rtn", group_size=32, format="llmq", embeddings=8)
    quantize(tmp_path / "dense", tmp_path / "packed", recipe)
    with pytest.raises(SpecError, match=r"model.embed_tokens: a packed embedding, which ONNX export does not draw"):
        export(PackedCheckpoint(tmp_path / "packed"), tmp_path / "out")


def test_activations_of_8_bits_are_an_attribute_of_every_node(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("gpt2")
    levels = []
    monkeypatch.setattr(onnx_export, "draw", lambda packed, planned, level: levels.append(level) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(made.packed, tmp_path / "out", accuracy_level=FAST)
    assert levels == [4]
    for name, node in plan(made.packed).nodes.items():
        layer = PackedLinear(name, node, None, FAST)
        n, k = node.shape
        attributes = {"K": k, "N": n, "bits": 2, "block_size": 32, "accuracy_level": 4}
        assert layer.attributes == attributes
        found = [x for x in ir.load(made.folder / "model.onnx").graph if x.name == name]
        assert [{key: x.attributes[key].value for key in attributes} for x in found] == [
            {**attributes, "accuracy_level": 1}
        ]


@pytest.mark.parametrize("nested", [True, False])
def test_frequencies_that_change_with_the_length_are_refused(
    exported: Callable[[str], Exported], tmp_path: Path, nested: bool
) -> None:
    folder = shutil.copytree(exported("llama").packed.path, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_bytes())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config["rope_parameters"] = {**rope, "rope_type": "default", "full_attention": rope} if nested else rope
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match="rope_type 'dynamic': its frequencies change with the length of a text"):
        export(PackedCheckpoint(folder), tmp_path / "out")


def test_models_that_do_not_predict_text_are_refused(tmp_path: Path, exported: Callable[[str], Exported]) -> None:
    folder = shutil.copytree(exported("llama").packed.path, tmp_path / "packed")
    quantization = json.loads((folder / "config.json").read_bytes())["quantization_config"]
    config = {**BertConfig(vocab_size=WORDS).to_dict(), "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(SpecError, match="the export to ONNX works on predictions of the next token"):
        export(PackedCheckpoint(folder), tmp_path / "out")
