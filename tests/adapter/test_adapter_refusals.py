"""Pairs of models that do not fit, and places where no adapter can be written: each is refused in plain words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import RANK, SQUARE
from safetensors.torch import load_file, save_file
from tiny_models import make_llama
from torch import Tensor

from llmq.adapter import Adapter, compensate, open_pair, save
from llmq.calibration import Calibration
from llmq.driver import quantize
from llmq.errors import CalibrationError, CheckpointError, LlmqError, SolverError, SpecError
from llmq.recipe import Recipe


@pytest.mark.parametrize("rank", [0, -3, 65])
def test_a_rank_that_does_not_fit_is_refused(
    dense: Path, packed: Callable[..., Path], calibration: Calibration, rank: int
) -> None:
    with pytest.raises(SpecError, match=rf"--rank {rank}: model\.layers\.0.* use 1 to 64"):
        compensate(open_pair(packed(), dense), calibration, rank)


def test_the_smallest_layer_limits_the_rank(calibration: Calibration, tmp_path: Path) -> None:
    make_llama(tmp_path / "dense")
    quantize(tmp_path / "dense", tmp_path / "packed", Recipe(method="rtn", group_size=32))
    with pytest.raises(
        SpecError, match=r"--rank 33: model\.layers\.0\.self_attn\.k_proj has 32 outputs .* use 1 to 32"
    ):
        compensate(open_pair(tmp_path / "packed", tmp_path / "dense"), calibration, 33)


def test_windows_longer_than_the_model_are_refused(dense: Path, packed: Callable[..., Path]) -> None:
    windows = Calibration(torch.ones(1, 257, dtype=torch.int64), None, "x", "y")
    with pytest.raises(CalibrationError, match="257 tokens, the model has 256 positions"):
        compensate(open_pair(packed(), dense), windows, RANK)


def edit(source: Path, target: Path, change: Callable[[dict[str, Any]], object], name: str = "config.json") -> Path:
    """Copy a folder and change one of its JSON files."""
    shutil.copytree(source, target)
    content = json.loads((target / name).read_text(encoding="utf-8"))
    change(content)
    (target / name).write_text(json.dumps(content), encoding="utf-8")
    return target


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Copy a folder and change its tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def refused(error: type[LlmqError], packed: Path, original: Path, *words: str) -> None:
    with pytest.raises(error) as caught:
        open_pair(packed, original)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_that_is_not_packed_is_refused(dense: Path, packed: Callable[..., Path], tmp_path: Path) -> None:
    refused(CheckpointError, dense, dense, "nothing is packed", "give a packed folder")
    refused(SpecError, packed(), packed(), "already quantized")
    other = edit(packed(), tmp_path / "other", lambda c: c["quantization_config"].update(quant_method="hqq"))
    refused(CheckpointError, other, dense, "says 'hqq'")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"hidden_size": 128}, ("not the same model", "embed_tokens", "[128, 128] and [128, 64]")),
        ({"num_hidden_layers": 3}, ("not the same model", "model.layers.2", "and missing")),
        ({"num_hidden_layers": 1}, ("not the same model", "model.layers.1", "is missing and [")),
        ({"intermediate_size": 96}, ("not the same model", "gate_proj", "[96, 64] and [128, 64]")),
    ],
)
def test_an_original_of_other_shapes_is_refused(
    packed: Callable[..., Path], tmp_path: Path, overrides: dict[str, int], words: tuple[str, ...]
) -> None:
    refused(CheckpointError, packed(), make_llama(tmp_path / "other", **{**SQUARE, **overrides}), *words)


def test_an_original_of_other_weights_is_refused(
    packed: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    other = make_llama(tmp_path / "other", seed=1, **SQUARE)
    with pytest.raises(SpecError, match=r"model\.layers\.0\.self_attn\.q_proj: .* made from another model"):
        compensate(open_pair(packed(), other), calibration, RANK)


@pytest.mark.parametrize("change", [{"transforms": ["rotated"]}, {"recipe": {"transforms": ["rotated"]}}], ids=str)
def test_transformed_weights_are_refused(
    dense: Path, packed: Callable[..., Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = edit(packed(), tmp_path / "packed", lambda report: report.update(change), "report.json")
    refused(SpecError, folder, dense, "transformed", "(rotated)")


@pytest.mark.parametrize("report", [None, "{", "[]", "{}"])
def test_a_folder_without_a_report_of_ours_is_read(
    dense: Path, packed: Callable[..., Path], tmp_path: Path, report: str | None
) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(packed(), folder)
    (folder / "report.json").unlink()
    if report:
        (folder / "report.json").write_text(report)
    assert {spec.bits for spec in open_pair(folder, dense).reader.specs.values()} == {4}


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("model.norm.weight", "tensor model.norm.weight is missing"),
        ("model.layers.1.self_attn.q_proj.scales", "model.layers.1.self_attn.q_proj: scales is missing"),
    ],
)
def test_a_packed_folder_that_lacks_a_tensor_is_refused(
    dense: Path, packed: Callable[..., Path], tmp_path: Path, missing: str, words: str
) -> None:
    folder = rewritten(packed(), tmp_path / "packed", lambda tensors: tensors.pop(missing))
    refused(CheckpointError, folder, dense, words)


def test_a_dense_tensor_of_another_shape_is_refused(dense: Path, packed: Callable[..., Path], tmp_path: Path) -> None:
    norm = {"model.norm.weight": torch.ones(32)}
    folder = rewritten(packed(), tmp_path / "packed", lambda tensors: tensors.update(norm))
    refused(CheckpointError, folder, dense, "model.norm.weight has shape [32]", "[64]")


def test_groups_out_of_order_are_read(dense: Path, packed: Callable[..., Path], tmp_path: Path) -> None:
    """Inputs whose groups are listed backwards get the scales of the groups that are listed."""
    name = "model.layers.0.mlp.up_proj"
    folder = rewritten(
        packed(), tmp_path / "packed", lambda tensors: tensors[f"{name}.g_idx"].copy_(tensors[f"{name}.g_idx"].flip(0))
    )
    weight = open_pair(packed(), dense).reader.weight(name)
    scales, zeros = (t.flip(1).repeat_interleave(weight.group_size, dim=1) for t in (weight.scales, weight.zeros))
    expected = (weight.codes.double() - zeros) * scales
    assert torch.equal(open_pair(folder, dense).reader.read(f"{name}.qweight").double(), expected)


def test_a_weight_that_is_not_finite_is_named(
    dense: Path, packed: Callable[..., Path], calibration: Calibration, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    original = rewritten(dense, tmp_path / "dense", lambda tensors: tensors[name][0, :1].fill_(float("nan")))
    with pytest.raises(SolverError, match=r"model\.layers\.1\.mlp\.up_proj: the quantization error holds NaN"):
        compensate(open_pair(packed(), original), calibration, RANK)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_is_not_overwritten(adapter: Adapter, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "adapter"
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        save(adapter, output)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_an_empty_folder_and_what_a_killed_run_left_give_way(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter.llmq-partial").mkdir()
    (tmp_path / "adapter.llmq-partial" / "adapter_config.json").write_text("{")
    save(adapter, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert len(list((tmp_path / "adapter").iterdir())) == 2


def test_a_disk_that_fails_leaves_nothing(adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmq.adapter.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"adapter: cannot be written: .*No space left"):
        save(adapter, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
