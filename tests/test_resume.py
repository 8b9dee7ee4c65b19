"""A run that is stopped anywhere goes on when it is repeated, and ends in the bytes of one that was not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LLAMA, make_model, make_text
from transformers import LlamaConfig

from llmq.checkpoint import STAGING
from llmq.driver import quantize
from llmq.errors import CheckpointError
from llmq.journal import Journal
from llmq.recipe import Recipe
from llmq.report import Progress

SMALLER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
COMMON = {"bits": 3, "sym": False, "group_size": 16, "num_samples": 8, "seq_len": 32, "shard_size": "20KB"}
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "plain": {"shift": 0.0, "refine_rounds": 0, "random_windows": 0.0, "held_out": 0.0},
    "default": {},
    "transformed": {"scaling": "smooth", "rotation": "hadamard", "dtype": "float32"},
    "best": {"guidance_groups": 1, "tune_steps": 4, "tune_epochs": 2, "scaling": "smooth", "dtype": "float32"},
}


class Stop(Exception):  # noqa: N818  not an error
    """What a kill is played by: nothing of llmq catches it."""


@pytest.fixture(scope="module", autouse=True)
def small_steps() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmq.run.TOKENS_PER_STEP", 64)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tied bfloat16 `model` and `text.txt`."""
    folder = tmp_path_factory.mktemp("source")
    make_text(folder / "text.txt", 1000)
    config = LlamaConfig(**{**LLAMA, **SMALLER, "tie_word_embeddings": True})
    make_model(folder / "model", config, dtype=torch.bfloat16)
    return folder


def run(
    source: Path, output: Path, kind: str, progress: Callable[[Progress], None] = lambda _: None, **more: Any
) -> None:
    recipe = Recipe(**COMMON | {"calibration": str(source / "text.txt")} | RECIPES[kind] | more)
    quantize(source / "model", output, recipe, progress=progress)


def content(folder: Path) -> dict[str, bytes]:
    """Return all files; of the report what does not depend on the clock."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files.pop("report.json"))
    del report["seconds"], report["peak_memory_bytes"]
    return {**files, "report.json": json.dumps(report).encode()}


def stop_at(number: int) -> Callable[[Progress], None]:
    seen = 0

    def progress(_: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            raise Stop

    return progress


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, bytes], int]]:
    """Return what gives the files of a run without a stop, and how often it reports progress."""
    made: dict[str, tuple[dict[str, bytes], int]] = {}

    def make(kind: str) -> tuple[dict[str, bytes], int]:
        if kind not in made:
            output, events = tmp_path_factory.mktemp("whole") / kind, []
            run(source, output, kind, events.append)
            made[kind] = content(output), len(events)
        return made[kind]

    return make


@pytest.mark.parametrize("kind", RECIPES)
def test_a_run_stopped_many_times_ends_in_the_same_bytes(kind: str, source: Path, whole: Any, tmp_path: Path) -> None:
    expected, events = whole(kind)
    output = tmp_path / "out"
    attempts = 0
    for number in range(20, events, 7):  # later and later, since every attempt repeats the first events
        try:
            run(source, output, kind, stop_at(number))
        except Stop:
            attempts += output.exists()  # not before there is anything to keep
            assert not output.exists() or [path.name for path in output.iterdir()] == [STAGING]
            continue
        break
    assert attempts >= 3
    assert content(output) == expected


@pytest.mark.parametrize("kind", ["default", "best"])
def test_a_run_stopped_between_any_two_records_ends_in_the_same_bytes(
    kind: str, source: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = whole(kind)
    append, output = Journal.append, tmp_path / "out"

    def stop(self: Journal, kind: str, **entries: Any) -> None:
        append(self, kind, **entries)
        raise Stop

    records = 0
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stop)
        while True:
            try:
                run(source, output, kind)
            except Stop:
                records += 1
                continue
            break
    assert records >= 2 * 4 + 2 + 1  # stages of two blocks, the blocks, the identity
    assert content(output) == expected


def test_what_was_finished_is_not_done_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []

    def stop(event: Progress) -> None:
        if event.block == 1 and event.done == 9:
            raise Stop

    with pytest.raises(Stop):
        run(source, tmp_path / "out", "default", stop)
    solved: list[str] = []
    from llmq import driver

    solve = driver.solve_stage
    monkeypatch.setattr(
        driver,
        "solve_stage",
        lambda job, block, problems: solved.append(problems[0].name) or solve(job, block, problems),
    )
    run(source, tmp_path / "out", "default", lambda event: phases.append(event.phase))
    assert solved
    assert all(name.startswith("model.layers.1.") for name in solved)
    assert len(solved) < 4


def differing(source: Path, output: Path, **more: Any) -> str:
    with pytest.raises(CheckpointError) as raised:
        run(source, output, "default", **more)
    return str(raised.value)


def test_another_run_does_not_continue_this_one_and_says_what_differs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with pytest.raises(Stop):
        run(source, output, "default", stop_at(45))
    journal = (output / STAGING / "journal.jsonl").read_bytes()
    assert "recipe.bits (3 there, 4 now)" in differing(source, output, bits=4)
    make_text(tmp_path / "other.txt", 1200)
    message = differing(source, output, calibration=str(tmp_path / "other.txt"))
    assert "recipe.calibration" in message
    with monkeypatch.context() as patch:
        patch.setattr("llmq.environment.versions", lambda: {"torch": "9.9"})
        assert "versions.torch" in differing(source, output)
    config = LlamaConfig(**{**LLAMA, **SMALLER, "tie_word_embeddings": True})
    make_model(tmp_path / "model", config, dtype=torch.bfloat16, seed=5)
    (tmp_path / "text.txt").write_bytes((source / "text.txt").read_bytes())
    recipe = Recipe(**COMMON, calibration=str(source / "text.txt"))
    with pytest.raises(CheckpointError, match="weights"):
        quantize(tmp_path / "model", output, recipe)
    assert (output / STAGING / "journal.jsonl").read_bytes() == journal


def test_force_starts_over_where_the_settings_differ(source: Path, whole: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(Stop):
        run(source, output, "rtn", stop_at(45))
    recipe = Recipe(**COMMON, calibration=str(source / "text.txt"))
    quantize(source / "model", output, recipe, force=True)
    assert content(output) == whole("default")[0]
