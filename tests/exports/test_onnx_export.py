"""Packed folders as ONNX graphs: what onnxruntime computes from them, and every constant in them."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_cases import CASES, Exported
from tiny_models import WORDS
from torch import Tensor

import llmq.convert
from llmq.errors import CheckpointError
from llmq.exports import onnx as onnx_export
from llmq.exports.onnx import _prove
from llmq.exports.onnx_plan import plan
from llmq.verify.calling import Loader, ask
from llmq.verify.reference import reference_model


class Net:
    """A session, and the names of what goes in and out."""

    def __init__(self, folder: Path) -> None:
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.inputs = {x.name: x.shape for x in self.session.get_inputs()}
        self.past = [name for name in self.inputs if name.startswith("past_key_values.")]

    def run(self, ids: Tensor, mask: Tensor, positions: Tensor, past: list[Any]) -> tuple[Tensor, list[Any]]:
        texts = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feed = {name: tensor.numpy() for name, tensor in texts.items()}
        logits, *present = self.session.run(None, {**feed, **dict(zip(self.past, past, strict=True))})
        return torch.from_numpy(logits), present

    def empty(self, rows: int) -> list[Any]:
        shapes = [self.inputs[name] for name in self.past]
        return [np.zeros((rows, heads, 0, size), dtype=np.float32) for _, heads, _, size in shapes]


def steps(rows: int, length: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield ids, mask and positions of a prompt whose rows begin with padding, of one more token, and of three more."""
    draw = torch.Generator().manual_seed(rows * length)
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    yield torch.randint(0, WORDS, (rows, length), generator=draw), mask, (mask.cumsum(1) - 1).clamp(min=0)
    for new in (1, 3):
        mask = torch.cat([mask, torch.ones(rows, new, dtype=torch.int64)], dim=1)
        yield torch.randint(0, WORDS, (rows, new), generator=draw), mask, (mask.cumsum(1) - 1)[:, -new:]


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_computes_what_the_codes_stand_for(exported: Callable[[str], Exported], name: str) -> None:
    made = exported(name)
    net, reference = Net(made.folder), reference_model(made.packed)
    for rows, length in ((1, 9), (3, 12), (1, 1)):
        past, cache = net.empty(rows), None
        for ids, mask, positions in steps(rows, length):
            logits, past = net.run(ids, mask, positions, past)
            texts = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            expected = reference(**texts, past_key_values=cache, use_cache=True)
            cache = expected.past_key_values
            seen = mask[:, -ids.shape[1] :].bool()  # what padding predicts means nothing
            # sums of at most 128 products in another order are off by 128 · 2^-24 = 8e-6 of their magnitudes
            limit = 2e-5 * float(expected.logits.abs().max())
            torch.testing.assert_close(logits[seen], expected.logits[seen], rtol=0, atol=limit)
            assert past[0].shape[2] == mask.shape[1]


def test_names_and_sizes_are_those_that_others_look_for(exported: Callable[[str], Exported]) -> None:
    net = Net(exported("llama").folder)
    cache = ["batch_size", 2, "past_sequence_length", 16]
    assert net.inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "past_key_values.0.key": cache,
        "past_key_values.0.value": cache,
    }
    assert [x.name for x in net.session.get_outputs()] == ["logits", "present.0.key", "present.0.value"]


def test_the_folder_has_what_generating_takes(exported: Callable[[str], Exported]) -> None:
    made = exported("llama")
    names = {path.name for path in made.folder.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.onnx", "model.onnx_data", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    config, before = (json.loads((path / "config.json").read_bytes()) for path in (made.folder, made.packed.path))
    assert "quantization_config" not in config
    assert config == {key: value for key, value in before.items() if key != "quantization_config"}
    assert not list(made.folder.parent.glob("*partial*"))


def test_constants_are_the_codes_and_what_was_dense_and_no_more(exported: Callable[[str], Exported]) -> None:
    made = exported("llama")
    graph = ir.load(made.folder / "model.onnx").graph
    block = "model.layers.0"
    packed = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "down")]
    expected = {f"{block}.{layer}.{part}" for layer in packed for part in ("codes", "scales", "zero_points")}
    expected |= {f"{block}.self_attn.q_proj.columns", f"{block}.mlp.down_proj.columns"}
    expected |= {f"{block}.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"}
    expected |= {f"{block}.{norm}_layernorm.weight" for norm in ("input", "post_attention")}
    named = {name: value.const_value for name, value in graph.initializers.items() if "." in name}
    assert set(named) - {"model.rotary_emb.inv_freq"} == expected
    kept = {name for name, tensor in named.items() if tensor is not None and tensor.dtype == ir.DataType.BFLOAT16}
    assert kept == {"model.embed_tokens.weight", f"{block}.mlp.up_proj.weight"}
    assert set(made.types) == set(graph.initializers)
    assert made.types["model.embed_tokens.weight"] == "BFLOAT16"
    most = sum(path.stat().st_size for path in made.packed.path.glob("*.safetensors"))
    assert (made.folder / "model.onnx_data").stat().st_size < 1.1 * most  # scales are float32


def test_weights_are_read_when_they_are_written(exported: Callable[[str], Exported]) -> None:
    for name in CASES:
        k = 256 if name == "gpt2" else 128
        assert exported(name).read_early == 4 * k  # indices, to see whether columns are in order


def test_the_file_tells_nothing_of_this_machine(exported: Callable[[str], Exported]) -> None:
    content = (exported("llama").folder / "model.onnx").read_bytes()
    for word in (b"site-packages", b"modeling_", str(Path.cwd()).encode(), b"stack_trace"):
        assert word not in content


def test_the_loader_of_verify_makes_the_graph_itself(
    exported: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("gpt2")
    packed = made.packed
    monkeypatch.setattr(onnx_export, "export", lambda packed, output: shutil.copytree(made.folder, output))
    ids = torch.randint(0, WORDS, (2, 10), generator=torch.Generator().manual_seed(1))
    found = ask(Loader("onnxruntime"), packed.path, ids, new=6, seconds=120)
    reference: Any = reference_model(packed)
    with torch.no_grad():
        expected = reference(ids).logits
        more = reference.generate(ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 10:].tolist()
    assert found.logits is not None, found.refused
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert len({int(expected[0, 0].argmax()), *more}) > 3  # not a word that is always the likeliest
    assert found.new == more
    assert "onnxruntime" in found.versions


def test_convert_writes_it_and_says_how_large_it_is(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("llama")
    monkeypatch.setattr(onnx_export, "export", lambda packed, output: shutil.copytree(made.folder, output))
    done = llmq.convert.convert(made.packed.path, tmp_path / "out", "onnx")
    assert (done.format, done.layers) == ("onnx", 6)
    assert done.output_bytes == sum(path.stat().st_size for path in made.folder.iterdir())


@pytest.mark.parametrize(
    "part",
    [
        "self_attn.k_proj.codes",
        "self_attn.k_proj.scales",
        "self_attn.k_proj.zero_points",
        "self_attn.q_proj.columns",
        "mlp.up_proj.weight",
        "input_layernorm.weight",
    ],
)
def test_a_changed_byte_is_found(exported: Callable[[str], Exported], tmp_path: Path, part: str) -> None:
    made = exported("llama")
    graph, planned = made.folder / "model.onnx", plan(made.packed)
    assert _prove(graph, made.packed, planned) == made.types
    model = ir.load(graph)
    constant = model.graph.initializers[f"model.layers.0.{part}"]
    assert constant.const_value is not None
    content = constant.const_value.numpy().copy()
    content.view(np.uint8).reshape(-1)[1] ^= 1
    constant.const_value = ir.tensor(content, dtype=constant.const_value.dtype, name=constant.name)
    graph = tmp_path / "model.onnx"
    ir.save(model, graph, external_data="model.onnx_data")
    name = f"model.layers.0.{part}"
    wrong = name if part.endswith("weight") else name.rpartition(".")[0]
    with pytest.raises(CheckpointError, match=f"{wrong} read back is not what was meant"):
        _prove(graph, made.packed, planned)


def test_a_node_that_is_missing_or_other_is_found(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    made = exported("llama")
    planned = plan(made.packed)
    changes: list[Callable[[ir.Node], object]] = [
        lambda node: node.metadata_props.clear(),
        lambda node: node.attributes.update({"block_size": ir.AttrInt64("block_size", 16)}),
        lambda node: node.replace_input_with(0, node.inputs[0].producer().inputs[0]),  # type: ignore[union-attr]
    ]
    for number, change in enumerate(changes):
        model = ir.load(made.folder / "model.onnx")
        change(next(node for node in model.graph if node.op_type == "MatMulNBits"))
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(made.folder / "model.onnx_data", folder)
        ir.save(model, folder / "model.onnx")
        with pytest.raises(CheckpointError, match=r"model.layers.0.self_attn.\w_proj read back is not what was meant"):
            _prove(folder / "model.onnx", made.packed, planned)
