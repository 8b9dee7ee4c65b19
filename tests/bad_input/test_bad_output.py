"""Outputs that cannot be written and runs that are stopped: nothing half-written is taken for a checkpoint."""

import errno
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL, assert_fails, assert_nothing_finished, llmq, start
from damage import contents

import llmq as package
from llmq.checkpoint import STAGING
from llmq.recipe import Recipe


def test_output_exists(made: Path, output: Path, fails: Callable[..., None]) -> None:
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    fails(made / "model", words=(str(output), "not empty", "--output", "--force"))
    assert contents(output) == {"notes.txt": b"mine"}


def test_output_is_looked_at_before_any_work(output: Path, fails: Callable[..., None]) -> None:
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    fails("some-org/some-model", words=("not empty",))


def test_output_is_a_file(made: Path, output: Path, fails: Callable[..., None]) -> None:
    output.write_text("mine")
    fails(made / "model", "--force", words=(str(output), "not a folder"))
    assert output.read_text() == "mine"


def test_output_below_a_file(made: Path, tmp_path: Path, fails: Callable[..., None]) -> None:
    (tmp_path / "file").write_text("mine")
    target = tmp_path / "file" / "output"
    fails(made / "model", "--output", target, words=(str(target), "cannot be written", "--output"))


def test_output_is_the_source(model: Path, fails: Callable[..., None]) -> None:
    before = contents(model)
    fails(model, "--output", model, "--force", words=("original weights", "--output"))
    assert contents(model) == before
    assert not (model / STAGING).exists()


def test_disk_known_to_be_too_small(made: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    fails(made / "model", words=("the disk is full", "needs 0.00 GB", "are free", "--output"))


LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from llmq.cli.app import main
main()
"""


def test_disk_that_fills_up_while_writing_keeps_the_old_checkpoint(made: Path, output: Path) -> None:
    assert llmq("quantize", made / "model", "--output", output, *SMALL, "--method", "rtn").exit_code == 0
    before = contents(output)
    process = start(LIMITED, "quantize", made / "model", "--output", output, *SMALL, "--method", "rtn", "--force")
    stdout, stderr = process.communicate(timeout=120)
    words = (str(output), "cannot be written", "the disk is full", "--output")
    assert_fails(process.returncode, stdout, stderr, *words)
    assert contents(output) == before


def test_disk_that_refuses_to_be_written(made: Path, fails: Callable[..., None]) -> None:
    target = Path("/sys/llmq-output")  # not even root may make a folder there
    fails(made / "model", "--output", target, words=(str(target), "cannot be written", "read-only", "--output"))
    assert not target.exists()


@pytest.mark.parametrize(("number", "advice"), [(errno.EROFS, "read-only"), (errno.ENOSPC, "the disk is full")])
@pytest.mark.parametrize("call", ["os.replace", "os.pwrite", "shutil.copyfile", "os.fsync"])
def test_every_write_can_fail_and_the_run_goes_on_afterwards(
    call: str,
    number: int,
    advice: str,
    made: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[..., None],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    module, _, name = call.partition(".")
    with monkeypatch.context() as patch:
        patch.setattr({"os": os, "shutil": shutil}[module], name, refuse)
        words = ("cannot be written", os.strerror(number), advice)
        fails(made / "model", words=words, resumable=call not in ("os.pwrite", "os.fsync"))  # these fail at once
    result = llmq("quantize", made / "model", "--output", output, *SMALL, "--calibration", made / "text.txt")
    assert result.exit_code == 0, result.stderr


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_interrupt_in_the_middle(made: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]) -> None:
    monkeypatch.setattr("llmq.stream.Stream.advance", raise_interrupt)
    fails(made / "model", "--shard-size", "20kB", words=("interrupted", "same command"), resumable=True)


def test_interrupt_from_the_progress_callback_keeps_what_is_finished(made: Path, output: Path) -> None:
    recipe = Recipe(method="rtn", group_size=32, shard_size="20kB")

    def progress(event: Any) -> None:
        if event.done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        package.quantize(made / "model", output, recipe, progress=progress)
    assert [path.name for path in output.iterdir()] == [STAGING]
    assert "block" in (output / STAGING / "journal.jsonl").read_text()


WAITS = """
import signal
import time
from llmq.cli.app import main
from llmq.stream import Stream

advance, finished = Stream.advance, []

def wait(*arguments):
    if finished:  # a block is written after the hidden states have passed it: the first one is by now
        print("first block done", flush=True)
        time.sleep(300)
    finished.append(advance(*arguments))

Stream.advance = wait
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
main()
"""


def start_and_stop(stop: signal.Signals, made: Path, output: Path, *options: object) -> tuple[int, str, str]:
    """Send `stop` to a run that has finished its first block; return exit code, stdout and stderr."""
    options = (*SMALL, "--calibration", made / "text.txt", "--shard-size", "20kB", *options)
    process = start(WAITS, "quantize", made / "model", "--output", output, *options)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "first block done\n"
        process.send_signal(stop)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def test_interrupt_from_the_keyboard_keeps_the_old_checkpoint(made: Path, output: Path) -> None:
    assert llmq("quantize", made / "model", "--output", output, *SMALL, "--method", "rtn").exit_code == 0
    before = contents(output)
    code, stdout, stderr = start_and_stop(signal.SIGINT, made, output, "--force")
    assert_fails(code, stdout, stderr, "interrupted", "same command")
    assert contents(output) == before


def test_kill_leaves_a_marked_folder_that_the_same_command_finishes(made: Path, output: Path) -> None:
    code, _, _ = start_and_stop(signal.SIGKILL, made, output)
    assert code == -signal.SIGKILL
    assert [path.name for path in output.iterdir()] == [STAGING]
    assert STAGING.endswith(".llmq-partial")
    assert_nothing_finished(output)

    for command in (("inspect", output), ("eval", output, "--text", made / "text.txt"), ("generate", output, "w1")):
        result = llmq(*command)
        words = (str(output), "not a checkpoint", "config.json", "unfinished run")
        assert_fails(result.exit_code, result.stdout, result.stderr, *words)

    result = llmq("quantize", made / "model", "--output", output, *SMALL, "--method", "rtn")
    words = (str(output), "unfinished run that differs in recipe.method (gptq there, rtn now)", "--force")
    assert_fails(result.exit_code, result.stdout, result.stderr, *words)
    again = (*SMALL, "--calibration", made / "text.txt", "--shard-size", "20kB")
    result = llmq("quantize", made / "model", "--output", output, *again)
    assert result.exit_code == 0, result.stderr
    assert "continuing an unfinished run at block 2 of 2, 7 of 14 layers done" in result.stderr
    assert not (output / STAGING).exists()
    assert (output / "config.json").is_file()
