"""Statistics collected once give every output that calibration of the original model gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import llmq
from safetensors.torch import load_file
from tiny_models import make_llama, make_text

from llmq.calibration import load_calibration
from llmq.checkpoint import STAGING
from llmq.collecting import collect
from llmq.driver import quantize
from llmq.errors import CheckpointError, SpecError
from llmq.recipe import Recipe
from llmq.statistics import MANIFEST, Statistics

CALIBRATED: dict[str, Any] = {"num_samples": 8, "seq_len": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `model`, of one block, `text.txt` and `statistics`."""
    folder = tmp_path_factory.mktemp("made")
    make_llama(folder / "model", num_hidden_layers=1)
    make_text(folder / "text.txt", 1000)
    collect(folder / "model", folder / "statistics", recipe(folder))
    return folder


def recipe(made: Path, **fields: Any) -> Recipe:
    return Recipe(**{**CALIBRATED, "group_size": 32, "calibration": str(made / "text.txt"), **fields})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("fields", [{"bits": 4}, {"bits": 2, "sym": False, "group_size": 16}, {"method": "descent"}])
def test_the_first_stage_is_that_of_a_calibrated_run(made: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    """Nothing is quantized in front of the first block's first stage: its linears cannot tell the difference."""
    quantize(made / "model", tmp_path / "a", recipe(made, shift=0.0, **fields))
    report = quantize(made / "model", tmp_path / "b", recipe(made, **fields), statistics=made / "statistics")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys()
    for name in a:
        if ".q_proj." in name or ".k_proj." in name or ".v_proj." in name:
            assert torch.equal(a[name], b[name]), name
    assert any(not torch.equal(a[name], b[name]) for name in a if "down_proj" in name)  # it sees no rounding there
    assert all(layer.held_out_loss is not None for layer in report.layers)


def test_the_hessians_are_those_of_the_original_model(made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    statistics = Statistics(made / "statistics")
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    down = model.model.layers[0].mlp.down_proj
    seen: list[torch.Tensor] = []
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0].double().flatten(0, -2)))
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    whole = load_calibration(str(made / "text.txt"), tokenizer, seed=0, **CALIBRATED)
    with torch.no_grad():
        model(whole.input_ids)
    entry = statistics.manifest["blocks"][0][-1]["problems"][0]
    sums = load_file(made / "statistics" / entry["file"])
    # held-out windows are in a sum of their own, windows of random tokens with those that train
    assert entry["held_out"]["tokens"] == 32
    assert entry["train"]["tokens"] == 7 * 32 + 32
    x = torch.cat(seen)
    expected = 2 * x.T @ x
    assert torch.linalg.eigvalsh(sums["train"].double()).min() > -1e-3
    total = 2 * (sums["train"] + sums["held_out"]).double()
    # the difference is the window of random tokens: positive semidefinite
    assert torch.linalg.eigvalsh(total - expected).min() >= -1e-4 * torch.linalg.norm(total)


def test_a_stopped_collection_goes_on_and_ends_in_the_same_files(made: Path, tmp_path: Path) -> None:
    seen = 0

    def stop(_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == limit:
            raise KeyboardInterrupt

    for number in range(5, 60, 3):
        seen, limit = 0, number
        try:
            collect(made / "model", tmp_path / "s", recipe(made), progress=stop)
        except KeyboardInterrupt:
            with pytest.raises(CheckpointError, match="no finished statistics"):
                Statistics(tmp_path / "s")
            continue
        break
    assert limit > 5
    assert not (tmp_path / "s" / STAGING).exists()
    expected = {file.name: file.read_bytes() for file in (made / "statistics").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "s").iterdir()} == expected


def test_experts_weights_and_answers_are_kept_apart(made: Path, tmp_path: Path) -> None:
    manifest = collect(made / "model", tmp_path / "s", recipe(made, guidance_groups=2))
    assert [len(stage["problems"]) for stage in manifest["blocks"][0]] == [6, 2, 4, 2]
    report = quantize(made / "model", tmp_path / "out", recipe(made), statistics=tmp_path / "s")
    assert len(report.layers) == 7


def test_what_statistics_cannot_do_is_refused(made: Path, tmp_path: Path) -> None:
    def fails(match: str, model: str = "model", folder: Path = made / "statistics", **fields: Any) -> None:
        with pytest.raises((SpecError, CheckpointError), match=match):
            quantize(made.joinpath(model), tmp_path / "out", recipe(made, **fields), statistics=folder)
        assert not (tmp_path / "out").exists()

    fails("tune_steps runs the model", tune_steps=5)
    fails("scaling runs the model", scaling="smooth")
    fails("rtn uses no data", method="rtn")
    fails("no finished statistics", folder=tmp_path)
    make_llama(made / "other", num_hidden_layers=1, seed=1)
    fails("another model", model="other")
    make_llama(made / "deeper", num_hidden_layers=2)
    fails("another model", model="deeper")


def test_damaged_statistics_are_refused(made: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(made / "statistics", tmp_path / "s"))
    file = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not what was collected"):
        quantize(made / "model", tmp_path / "out", recipe(made), statistics=folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        Statistics(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        Statistics(folder)


def test_the_commands(made: Path, tmp_path: Path) -> None:
    common = ("--calibration", made / "text.txt", "--num-samples", 8, "--seq-len", 32)
    result = llmq("collect", made / "model", "--output", tmp_path / "s", *common)
    assert result.exit_code == 0, result.stderr
    assert "problems" in result.stdout
    more = ("--statistics", tmp_path / "s", "--group-size", 32, "--bits", 3)
    result = llmq("quantize", made / "model", "--output", tmp_path / "out", *more)
    assert result.exit_code == 0, result.stderr
    assert "calibrating on" not in result.stderr
    assert llmq("collect", made / "model", "--output", tmp_path / "s", *common).exit_code == 1
    assert "--bits" not in llmq("collect", "--help").stdout
