"""Whole models on codebooks: quantized, loaded, run, saved, taken up after a stop, and refused in time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LLAMA, make_model, make_text
from transformers import LlamaConfig

import llmq.hf
from llmq.convert import DENSE, convert
from llmq.driver import quantize
from llmq.errors import SpecError
from llmq.grids import VECTOR_GRIDS
from llmq.nn import QuantLinear
from llmq.packed import PackedCheckpoint
from llmq.recipe import Recipe, make_recipe
from llmq.solvers.vectors import VECTOR_SOLVERS

SMALL = {"hidden_size": 36, "intermediate_size": 54, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 18}
COMMON = {"num_samples": 6, "seq_len": 24, "shard_size": "20KB"}


class Stop(Exception):  # noqa: N818  not an error
    """What a kill is played by."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a `model`, whose inputs are no multiples of 8, and `text.txt`."""
    folder = tmp_path_factory.mktemp("source")
    make_text(folder / "text.txt", 1000)
    make_model(folder / "model", LlamaConfig(**{**LLAMA, **SMALL, "num_hidden_layers": 1}))
    return folder


def run(source: Path, output: Path, progress: Any = lambda _: None, **fields: Any) -> Path:
    quantize(
        source / "model", output, Recipe(**COMMON, calibration=str(source / "text.txt"), **fields), progress=progress
    )
    return output


CASES = [("vq4", "rtn"), ("vq4", "gptq"), ("vq4", "descent"), ("vq2", "gptq"), ("vq8", "gptq")]


@pytest.mark.parametrize(("grid", "method"), CASES, ids=str)
def test_a_model_is_quantized_and_runs(grid: str, method: str, source: Path, tmp_path: Path) -> None:
    packed = run(source, tmp_path / "packed", grid=grid, method=method, bits=1)
    model = llmq.hf.load(packed)
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 7
    ids = torch.arange(20)[None] % LLAMA["vocab_size"]
    with torch.no_grad():
        found = model(ids).logits
    assert {module.kernel for module in linears} <= {"cpu_vectors", "vectors"}
    convert(packed, tmp_path / "dense", DENSE)
    with torch.no_grad():
        expected = llmq.hf.load(tmp_path / "dense")(ids).logits
    # float32 both ways: products of 36 to 54 terms in one order or another
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    model.save_pretrained(tmp_path / "saved")
    mine, saved = PackedCheckpoint(packed), PackedCheckpoint(tmp_path / "saved")
    assert mine.specs == saved.specs
    assert all(torch.equal(mine.read(name), saved.read(name)) for name in mine)


def test_defaults_are_those_of_the_grid() -> None:
    made = {name: Recipe(grid=name) for name in VECTOR_GRIDS}
    assert {name: recipe.bits for name, recipe in made.items()} == {"vq2": 4, "vq4": 2, "vq8": 1}
    assert {(recipe.group_size, recipe.sym, recipe.format) for recipe in made.values()} == {(-1, True, "llmq")}
    assert Recipe(grid="vq4", bits=1, group_size=32).spec.group_size == 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "obq"}, "method obq decides on single weights.*gptq, descent, weighted_rtn, rtn"),
        ({"method": "gptaq"}, "method gptaq decides on single weights"),
        ({"order": "pivot"}, "order pivot takes vectors"),
        ({"guidance_groups": 2}, "guidance_groups is 2"),
        ({"tune_steps": 3}, "tune_steps"),
        ({"bits": 3}, "the vq4 grid has 2, 1 bits, not 3"),
        ({"group_size": 6}, "group_size 6 cuts the vectors"),
        ({"format": "gptq"}, "vq4"),
        ({"sym": False}, "--sym"),
        ({"method": "nothing"}, "unknown method"),
    ],
    ids=str,
)
def test_what_vectors_cannot_do_is_refused_before_work(
    fields: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        quantize(source / "model", tmp_path / "out", make_recipe({"grid": "vq4"} | fields))
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_engines_that_know_no_vectors_are_refused(source: Path, tmp_path: Path) -> None:
    packed = run(source, tmp_path / "packed", grid="vq8", method="rtn")
    for format in ("gptq", "gguf", "onnx"):
        with pytest.raises(SpecError, match="vq8"):
            convert(packed, tmp_path / format, format)
    convert(packed, tmp_path / "again", "llmq", shard_bytes=20_000)
    for file in packed.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_run_that_is_stopped_ends_in_the_same_bytes(source: Path, tmp_path: Path) -> None:
    fields = {"grid": "vq4", "bits": 1, "group_size": 12}
    events: list[Any] = []
    whole = run(source, tmp_path / "whole", events.append, **fields)
    for number in (len(events) // 2, len(events) - 2):
        seen = 0

        def stop(_: Any, at: int = number) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                raise Stop

        output = tmp_path / str(number)
        with pytest.raises(Stop):
            run(source, output, stop, **fields)
        run(source, output, **fields)
        for file in whole.iterdir():
            if file.name not in ("report.json", "README.md"):
                assert file.read_bytes() == (output / file.name).read_bytes(), file.name


def test_linears_of_a_stage_have_codebooks_of_their_own(source: Path, tmp_path: Path) -> None:
    packed = PackedCheckpoint(run(source, tmp_path / "packed", grid="vq4", bits=1))
    books = [packed.read(f"model.layers.0.self_attn.{name}_proj.codebook") for name in "qkv"]
    assert not torch.equal(books[0], books[1])
    assert not torch.equal(books[1], books[2])
    report = json.loads((packed.path / "report.json").read_text())
    assert {layer["name"].rpartition(".")[2] for layer in report["layers"]} >= {"q_proj", "k_proj", "v_proj"}
    assert all(layer["relative_loss"] < 0.5 for layer in report["layers"])


def test_refinement_is_that_of_vectors(source: Path, tmp_path: Path) -> None:
    lost = []
    for rounds in (0, 2):
        packed = run(source, tmp_path / str(rounds), grid="vq4", bits=1, refine_rounds=rounds)
        report = json.loads((packed / "report.json").read_text())
        lost.append(sum(layer["relative_loss"] for layer in report["layers"]))
    assert lost[1] < 0.95 * lost[0]


def test_every_solver_can_be_asked_for() -> None:
    assert set(VECTOR_SOLVERS) == {"gptq", "descent", "weighted_rtn", "rtn"}
