"""``llmq ablate`` on a tiny model: every row is what `quantize` and `eval` say, and no row takes the others with it."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_fails, llmq
from safetensors.torch import load_file
from tiny_models import make_llama, make_text

from llmq import driver
from llmq.errors import SolverError
from llmq.recipe import Recipe
from llmq.report import Report
from llmq.stages import STAGES

RECIPE = ("--bits", 3, "--group-size", 32, "--num-samples", 8, "--seq-len", 32, "--seed", 1)
QUICK = ("--refine-rounds", 0, "--scale-search", "none")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `model`, `text.txt` to calibrate on, `a.txt` and `b.txt` to judge by."""
    folder = tmp_path_factory.mktemp("made")
    make_llama(folder / "model", num_hidden_layers=1)
    for seed, name in enumerate(("text", "a", "b")):
        make_text(folder / f"{name}.txt", 500, seed=seed)
    return folder


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check that nothing is left where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


class Quantize:
    """Stands for `quantize`: notes how it is called, and fails where the recipe has a field's value."""

    def __init__(self, error: Exception | None = None, **fails: object) -> None:
        self.calls: list[tuple[Recipe, Any, Path]] = []
        self.beside: list[list[Path]] = []  # what was in the folder of the output when each call began
        self.error, self.fails, self.real = error, fails, driver.quantize

    def __call__(self, model: Path, output: Path, recipe: Recipe, *, calibration: Any, device: torch.device) -> Report:
        self.calls.append((recipe, calibration, output))
        self.beside.append(list(output.parent.iterdir()) if output.parent.exists() else [])
        if self.error is not None and all(getattr(recipe, name) == value for name, value in self.fails.items()):
            raise self.error
        return self.real(model, output, recipe, calibration=calibration, device=device)


def ablate(made: Path, *options: object, texts: tuple[str, ...] = ("a",)) -> tuple[str, str]:
    """Run the command on four windows of each text, expect success, and return stdout and stderr."""
    judged = [argument for name in texts for argument in ("--text", made / f"{name}.txt")]
    common = ("--calibration", made / "text.txt", *RECIPE, "--windows", 4, "--eval-seq-len", 40)
    result = llmq("ablate", made / "model", *judged, *common, *options)
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


def table(stdout: str) -> list[str]:
    """Return the lines of the table, blanks squeezed."""
    lines = [" ".join(line.split()) for line in stdout.splitlines()]
    return lines[next(i for i, line in enumerate(lines) if line.startswith("variant")) :]


def test_every_row_is_what_quantize_and_eval_say(made: Path, tmp_path: Path) -> None:
    options = ("--stages", "refine,magr", "--keep", tmp_path / "kept", "--json")
    found = json.loads(ablate(made, *options, texts=("a", "b"))[0])
    rows = {row["variant"]: row for row in found["variants"]}
    assert list(rows) == ["recipe", "- refine", "+ magr"]
    assert [row["changes"] for row in rows.values()] == [{}, {"refine_rounds": 0}, {"magr": 0.01}]
    cases = (("recipe", "recipe", ()), ("- refine", "without-refine", ("--refine-rounds", 0)))
    cases = (*cases, ("+ magr", "with-magr", ("--magr", 0.01)))
    for name, folder, same in cases:
        given = ("--calibration", made / "text.txt", *RECIPE, *same)
        assert llmq("quantize", made / "model", "--output", tmp_path / folder, *given).exit_code == 0
        mine, other = (load_file(path / folder / "model.safetensors") for path in (tmp_path / "kept", tmp_path))
        assert all(torch.equal(tensor, other[key]) for key, tensor in mine.items()), name
        report = json.loads((tmp_path / "kept" / folder / "report.json").read_text(encoding="utf-8"))
        assert rows[name]["error"] is None
        assert rows[name]["seconds"] == pytest.approx(sum(report["seconds"].values()))
        for key, field in (("relative_loss", "relative_loss"), ("held_out_loss", "held_out_loss")):
            losses = [layer[field] for layer in report["layers"]]
            assert rows[name][key] == pytest.approx(sum(losses) / len(losses))
        for text, judged in zip(("a", "b"), rows[name]["texts"], strict=True):
            given = ("--against", made / "model", "--text", made / f"{text}.txt", "--windows", 4, "--seq-len", 40)
            said = json.loads(llmq("eval", tmp_path / folder, *given, "--spread", "--json").stdout)
            assert judged["kl"] == said["kl"]
            assert judged["kl_interval"] == said["kl_interval"]
            assert judged["ppl"] == said["packed"]["ppl"]
            first = rows["recipe"]["texts"][("a", "b").index(text)]["kl"]
            assert judged["kl_ratio"] == pytest.approx(said["kl"] / first)
    assert [protocol["text"] for protocol in found["protocols"]] == [str(made / "a.txt"), str(made / "b.txt")]
    assert {protocol["stride"] for protocol in found["protocols"]} == {124}
    assert found["recipe"]["bits"] == 3


def test_the_table_has_a_row_per_variant_and_nothing_is_cut_off(made: Path) -> None:
    stdout, stderr = ablate(made, *QUICK, "--stages", "order,held_out", texts=("a", "b"))
    assert "…" not in stdout
    header, base, order, held_out = table(stdout)
    assert header == "variant loss held out KL a ratio perplexity KL b ratio perplexity seconds"
    number, kl = r"\d\.\d\de-\d\d", r"(\d\.\d{5}) \(-?\d\.\d{5} to \d\.\d{5}\) (\d\.\d{3}) (\d+\.\d{4})"
    assert re.fullmatch(rf"recipe {number} {number} {kl} {kl} \d+\.\d", base)
    first, other = (torch.tensor([[float(x) for x in found] for found in re.findall(kl, row)]) for row in (base, order))
    assert first[:, 1].tolist() == [1, 1]
    # KLs near 1 are printed to 5e-6, ratios to 5e-4
    torch.testing.assert_close(other[:, 1], other[:, 0] / first[:, 0], rtol=0, atol=6e-4)
    before = re.findall(r"perplexity before (\d+\.\d{4})", stdout)
    assert len(before) == 2
    assert not set(before) & {found[2] for row in (base, order) for found in re.findall(kl, row)}
    assert re.fullmatch(rf"- order {number} {number} {kl} {kl} \d+\.\d", order)
    assert re.fullmatch(rf"- held_out {number} - {kl} {kl} \d+\.\d", held_out)
    assert stdout.count("4 windows of 40 tokens, stride 124; perplexity before ") == 2
    assert re.search(r"2 of 3  - order\n +\d+\.\d s  KL \d\.\d{5}, \d\.\d{5}\n3 of 3  - held_out", stderr)


def test_windows_may_stand_end_to_end(made: Path) -> None:
    found = json.loads(ablate(made, *QUICK, "--stages", "order", "--end-to-end", "--json")[0])
    assert found["protocols"][0]["stride"] == 40


def test_all_variants_share_one_calibration_and_one_is_on_disk_at_a_time(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = Quantize()
    monkeypatch.setattr(driver, "quantize", quantize)
    ablate(made, *QUICK, "--stages", "order,held_out")
    recipes, calibrations, outputs = zip(*quantize.calls, strict=True)
    assert [(r.order, r.held_out) for r in recipes] == [("act", 0.1), ("natural", 0.1), ("act", 0.0)]
    assert calibrations[0].input_ids.shape == (8, 32)
    assert all(calibration is calibrations[0] for calibration in calibrations)
    assert quantize.beside == [[], [], []]
    assert len(set(outputs)) == 3


def test_a_method_without_data_reads_none(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = Quantize()
    monkeypatch.setattr(driver, "quantize", quantize)
    stdout, _ = ablate(made, "--method", "rtn", "--stages", "order", "--calibration", "no/such/file.txt")
    assert [calibration for _, calibration, _ in quantize.calls] == [None, None]
    assert re.match(r"recipe - - \d\.", table(stdout)[1]), "no data, no losses"


def test_all_stages_are_switched_by_default(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = Quantize()
    monkeypatch.setattr(driver, "quantize", quantize)
    # RTN has no use for most of them, which makes them quick
    found = json.loads(ablate(made, "--method", "rtn", "--json")[0])["variants"]
    assert len(quantize.calls) == len(found) == 1 + len(STAGES)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SolverError("no such luck; try again"), "no such luck; try again"),
        (RuntimeError("out of memory\nand a page of advice"), "RuntimeError: out of memory"),
        (AssertionError(), "AssertionError:"),
    ],
    ids=["ours", "torch's", "a bug"],
)
def test_a_variant_that_fails_is_a_row_and_the_rest_goes_on(
    made: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    options = (*QUICK, "--stages", "magr,order", "--json")
    monkeypatch.setattr(driver, "quantize", Quantize(error, magr=0.01))
    rows = json.loads(ablate(made, *options)[0])["variants"]
    assert [(row["variant"], row["error"]) for row in rows] == [("recipe", None), ("+ magr", said), ("- order", None)]
    assert (rows[1]["texts"], rows[1]["relative_loss"], rows[1]["seconds"]) == ([], None, None)
    stdout, stderr = ablate(made, *options[:-1])
    lines = table(stdout)
    assert lines[0].endswith(" seconds failed")
    assert lines[2] == f"+ magr - - - - - - {said}"
    assert lines[3].startswith("- order ")
    assert f"s  {said}\n" in stderr


def test_a_recipe_that_fails_ends_the_command(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = Quantize(SolverError("no such luck"), bits=3)
    monkeypatch.setattr(driver, "quantize", quantize)
    options = ("--text", made / "a.txt", "--calibration", made / "text.txt", *RECIPE, "--eval-seq-len", 40)
    result = llmq("ablate", made / "model", *options)
    assert_fails(result.exit_code, result.stdout, result.stderr, "no such luck")
    assert len(quantize.calls) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--stages", "refine,magic"), ("unknown stages 'magic'", ", ".join(STAGES))),
        (("--stages", ","), ("no stages",)),
        (("--text", "absent.txt"), ("absent.txt", "cannot be read")),
        (("--eval-seq-len", 1000), ("too few for one window of 1000",)),
        (("--device", "abacus"), ("no such device",)),
        (("--preset", "magic"), ("unknown preset 'magic'",)),
    ],
    ids=lambda value: str(value[0]),
)
def test_what_cannot_be_done_is_said_before_anything_is_quantized(
    made: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(driver, "quantize", None)
    result = llmq("ablate", made / "model", "--text", made / "a.txt", "--eval-seq-len", 40, *RECIPE, *options)
    assert_fails(result.exit_code, result.stdout, result.stderr, *words, expected=2)


def test_folders_are_kept_only_where_nothing_lies(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "quantize", None)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    for keep in (tmp_path / "kept", tmp_path / "kept" / "file"):
        result = llmq("ablate", made / "model", "--text", made / "a.txt", "--keep", keep)
        assert_fails(result.exit_code, result.stdout, result.stderr, f"--keep {keep}: is not an empty folder")
