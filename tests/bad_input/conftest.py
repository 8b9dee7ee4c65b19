"""Sound models to damage, and the run that has to fail."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import SMALL, assert_fails, llmq
from tiny_models import make_llama, make_text

from llmq.checkpoint import STAGING


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `model`, `sharded` and `text.txt` of 2000 tokens; nobody writes to them."""
    folder = tmp_path_factory.mktemp("made")
    make_llama(folder / "model")
    make_llama(folder / "sharded", max_shard_size="100KB")
    make_text(folder / "text.txt", 2000)
    return folder


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the model, to be damaged."""
    return Path(shutil.copytree(made / "model", tmp_path / "model"))


@pytest.fixture
def sharded(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the model in several files, to be damaged."""
    return Path(shutil.copytree(made / "sharded", tmp_path / "sharded"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


@pytest.fixture
def fails(made: Path, output: Path) -> Callable[..., None]:
    """Return a function that quantizes, expects a certain failure, and nothing left of it but what can be continued."""

    def run(
        source: Path | str, *options: object, words: tuple[str, ...], code: int = 1, resumable: bool = False
    ) -> None:
        before = output.exists()
        options = (*SMALL, "--calibration", made / "text.txt", *options)
        result = llmq("quantize", source, "--output", output, *options)
        assert_fails(result.exit_code, result.stdout, result.stderr, *words, expected=code)
        if resumable:
            assert [path.name for path in output.iterdir()] == [STAGING]
        else:
            assert before or not output.exists()

    return run
