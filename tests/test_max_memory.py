"""A limit on memory is kept by giving up speed, or refused with what would do."""

from pathlib import Path

import pytest
from command_line import assert_fails, llmq
from tiny_models import make_llama, make_text

from llmq import driver
from llmq.budget import Budget
from llmq.driver import quantize
from llmq.errors import SpecError
from llmq.recipe import Recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_llama(folder / "model")
    make_text(folder / "text.txt", 1000)
    return folder


def recipe(made: Path) -> Recipe:
    return Recipe(group_size=32, num_samples=8, seq_len=32, calibration=str(made / "text.txt"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}


def test_a_limit_that_nothing_keeps_is_refused_before_work(made: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"this run needs at least .* GiB, of which .* are for process and libraries"):
        quantize(made / "model", tmp_path / "out", recipe(made), max_memory=2**20)
    assert not (tmp_path / "out").exists()
    result = llmq("quantize", made / "model", "--output", tmp_path / "out", "--group-size", 32, "--max-memory", "much")
    assert_fails(result.exit_code, result.stdout, result.stderr, "--max-memory much", "is not a size", expected=2)


def test_hidden_states_in_files_alone_give_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(made / "model", tmp_path / "free", recipe(made), max_memory=2**40)
    monkeypatch.setattr(driver, "_budget", lambda *_: Budget(cached=False))
    quantize(made / "model", tmp_path / "files", recipe(made), max_memory=2**30)
    assert files(tmp_path / "files") == files(tmp_path / "free")


def test_smaller_batches_and_fewer_rows_give_nearly_the_same(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for budget in (Budget(), Budget(cached=False, batch_tokens=32, solver_rows=16)):
        monkeypatch.setattr(driver, "_budget", lambda *_, budget=budget: budget)
        report = quantize(made / "model", tmp_path / str(len(losses)), recipe(made), max_memory=1)
        losses.append(sum(layer.relative_loss or 0 for layer in report.layers))
    # sums in another order move codes that lie half way between two levels, of which there are few
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_offloaded_states_go_where_they_are_told_and_leave_nothing(made: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def look(_: object) -> None:
        seen.append(len(list((tmp_path / "offload").rglob("*.safetensors"))))

    (tmp_path / "offload").mkdir()
    quantize(made / "model", tmp_path / "out", recipe(made), offload_dir=tmp_path / "offload", progress=look)
    assert max(seen) > 0
    assert list((tmp_path / "offload").iterdir()) == []
