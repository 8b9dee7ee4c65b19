"""The script that makes the table of docs/accuracy.md: what a row is, and that none is made twice."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from script_loading import load_script
from tiny_models import make_llama, make_text, make_tokenizer

from llmq import load
from llmq.errors import SolverError, SpecError
from llmq_eval.divergence import divergence
from llmq_eval.windows import read_windows


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("accuracy_table")


@pytest.fixture
def run(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return arguments for a tiny model in `tmp_path`, the results in `tmp_path / "out"`."""
    monkeypatch.setattr(script, "SEQ_LEN", 32)
    make_llama(tmp_path / "model", num_hidden_layers=1)
    texts = [make_text(tmp_path / f"{name}.txt", 400, seed=seed) for seed, name in enumerate(("c", "a", "b"))]
    arguments = [tmp_path / "model", "--output", tmp_path / "out", "--calibration", texts[0], "--text", texts[1]]
    arguments += ["--text", texts[2], "--num-samples", 8, "--windows", 3, "--group-sizes", 32, -1]
    return [str(a) for a in [*arguments, "--bits", 3, "--grids", "sym", "--presets", "plain", "default-held_out"]]


def test_rows_hold_what_their_folders_give_and_are_made_once(
    script: ModuleType,
    run: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert script.main(run) == 0
    out, shown = tmp_path / "out", capsys.readouterr().out
    rows = {(row["preset"], row["group_size"]): row for row in json.loads((out / "table.json").read_text())}
    assert list(rows) == [("plain", 32), ("default-held_out", 32), ("plain", -1), ("default-held_out", -1)]
    recipe = rows["default-held_out", -1]["settings"]["recipe"]
    assert (recipe["group_size"], recipe["bits"], recipe["sym"], recipe["held_out"]) == (-1, 3, True, 0)
    assert (recipe["num_samples"], recipe["seq_len"], recipe["refine_rounds"]) == (8, 32, 2)
    original, packed = load(tmp_path / "model"), load(out / "plain-3sym-g32")
    for kl, name in zip(rows["plain", 32]["kl"], ("a", "b"), strict=True):
        windows = read_windows(tmp_path / f"{name}.txt", make_tokenizer(), seq_len=32, windows=3, spread=True)
        assert kl == divergence(original, packed, windows).kl
    assert shown == (out / "table.md").read_text() + "\n"
    assert shown.count("KL a | b:") == 2
    assert r"| plain | 1.00\|1.00 |" in shown
    a, b = (rows["default-held_out", -1]["kl"][i] / rows["plain", -1]["kl"][i] for i in (0, 1))
    assert rf"| default-held_out | {a:.2f}\|{b:.2f} |" in shown.split("## Per channel")[1]

    monkeypatch.setattr(script, "quantize", None)
    assert script.main(run) == 0, "nothing is made again"
    assert capsys.readouterr().out == shown


def test_rows_of_other_settings_or_without_their_model_are_made_again(
    script: ModuleType, run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*run[:-2], "plain", "--group-sizes", "32"]
    made: list[Path] = []
    real = script.quantize
    monkeypatch.setattr(script, "quantize", lambda *a, **k: made.append(a[1]) or real(*a, **k))
    script.main(run)
    assert len(made) == 1
    script.main([*run, "--windows", "2"])
    assert len(made) == 2
    (tmp_path / "out/plain-3sym-g32/config.json").unlink()
    script.main([*run, "--windows", "2"])
    assert len(made) == 3
    script.main([*run, "--windows", "2", "--num-samples", "7"])
    assert len(made) == 4


def test_a_row_that_fails_is_said_to_and_the_rest_is_made(
    script: ModuleType, run: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = script.quantize

    def quantize(model: Path, output: Path, recipe: object, **options: object) -> object:
        if output.name == "plain-3sym-g32":
            raise SolverError("no such luck")
        return real(model, output, recipe, **options)

    monkeypatch.setattr(script, "quantize", quantize)
    assert script.main(run) == 1
    shown = capsys.readouterr()
    assert "plain-3sym-g32: no such luck" in shown.err
    first = shown.out.split("## Per channel")[0]
    assert first.count("| plain | failed |") == 3
    assert "| default-held_out |  |" in first, "there is nothing to compare it with"


@pytest.mark.parametrize("preset", ["magic", "plain+magic", "plain-refine+refine"])
def test_names_that_mean_nothing_are_refused(script: ModuleType, preset: str) -> None:
    with pytest.raises(SpecError):
        script.fields_of(preset)


def test_stages_are_added_and_removed(script: ModuleType) -> None:
    fields = script.fields_of("best+rotation-tune_model")
    assert (fields["rotation"], fields["tune_epochs"], fields["tune_steps"]) == ("hadamard", 0, 200)
    assert script.fields_of("best")["tune_epochs"] == 6, "the preset itself is left alone"
