"""A writer goes on where a killed one was, and no two write at once."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from writing_cases import Stopped, close, contents, layout, names, script, stopped_at, tensors, unfinished, write

from llmq.checkpoint import STAGING, CheckpointReader
from llmq.errors import CheckpointError
from llmq.writing import CheckpointWriter, check_free


def test_leaving_the_context_keeps_what_was_written(tmp_path: Path) -> None:
    content = tensors(5)
    write(tmp_path / "whole", content, 50)

    def stop() -> None:
        with CheckpointWriter(tmp_path / "out") as writer:
            writer.allocate(layout(content), 50)
            writer.write("t0", content["t0"])
            writer.sync()
            raise Stopped

    with pytest.raises(Stopped):
        stop()
    with CheckpointWriter(tmp_path / "out") as writer:
        assert writer.allocate(layout(content), 50)
        for name in ("t1", "t2", "t3", "t4"):
            writer.write(name, content[name])
        close(writer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from llmq.writing import CheckpointWriter
from writing_cases import layout, tensors

content, last = tensors(6), int(sys.argv[2])
writer = CheckpointWriter(Path(sys.argv[1]))
writer.allocate(layout(content), 90)
for number, name in enumerate(content):
    if number == last:
        os.pwrite(writer._handles[writer._places[name][0]], b"torn", writer._places[name][1].offset)
        os.kill(os.getpid(), signal.SIGKILL)
    writer.write(name, content[name])
    if number % 2:
        writer.sync()
"""


@pytest.mark.parametrize("last", [0, 3])
def test_killed_between_writes(last: int, tmp_path: Path) -> None:
    content = tensors(6)
    write(tmp_path / "whole", content, 90)
    with script(KILLED, tmp_path / "out", last) as process:
        assert process.wait(timeout=120) == -signal.SIGKILL
    assert names(tmp_path / "out") == [STAGING]
    with CheckpointWriter(tmp_path / "out") as writer:
        assert writer.allocate(layout(content), 90)
        for name in list(content)[last // 2 * 2 :]:  # since the last sync
            writer.write(name, content[name])
        close(writer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_was_not_synced_counts_as_not_written(tmp_path: Path) -> None:
    content = tensors(3)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.allocate(layout(content), 50)
        writer.write("t0", content["t0"])
        writer.sync()
        writer.write("t1", content["t1"])
    with CheckpointWriter(tmp_path / "out") as writer:
        assert writer.allocate(layout(content), 50)
        with pytest.raises(CheckpointError, match=r"tensor t1 was never written \(2 in all\)"):
            close(writer)


def test_torn_record_of_what_was_written(tmp_path: Path) -> None:
    content = tensors(3)
    unfinished(tmp_path / "out", content, 2)
    record = tmp_path / "out" / STAGING / "written.jsonl"
    os.truncate(record, record.stat().st_size - 2)
    with CheckpointWriter(tmp_path / "out") as writer:
        assert writer.allocate(layout(content), 1)
        writer.write("t2", content["t2"])
        with pytest.raises(CheckpointError, match=r"tensor t1 was never written \(1 in all\)"):
            close(writer)
    with CheckpointWriter(tmp_path / "out") as writer:
        assert writer.allocate(layout(content), 1)
        writer.write("t1", content["t1"])
        close(writer)
    write(tmp_path / "whole", content, 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: ({**content, "t1": content["t1"][:5]}, 50),
        lambda content: ({**content, "t1": content["t1"].int()}, 50),
        lambda content: ({"x" if name == "t1" else name: tensor for name, tensor in content.items()}, 50),
        lambda content: (content, 100),
        lambda content: (dict(reversed(content.items())), 50),
    ],
    ids=["shape", "dtype", "name", "limit", "order"],
)
def test_another_layout_starts_over(change: Callable[[Any], tuple[dict[str, Tensor], int]], tmp_path: Path) -> None:
    unfinished(tmp_path / "out", tensors(4), 4, shard_bytes=50)
    content, limit = change(tensors(4, seed=1))
    write(tmp_path / "whole", content, limit)
    with CheckpointWriter(tmp_path / "out") as writer:
        assert not writer.allocate(layout(content), limit)
        with pytest.raises(CheckpointError, match=r"was never written \(4 in all\)"):
            close(writer)
        for name, tensor in content.items():
            writer.write(name, tensor)
        close(writer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: os.truncate(file, file.stat().st_size - 1),
        lambda file: file.write_bytes(b"\0" * file.stat().st_size),
        lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    ],
    ids=["missing", "short", "no header", "long"],
)
def test_damaged_shard_starts_over(damage: Callable[[Path], None], tmp_path: Path) -> None:
    content = tensors(3)
    write(tmp_path / "whole", content, 1)
    unfinished(tmp_path / "out", content, 3)
    damage(next((tmp_path / "out").rglob("model-00002-*")))
    with CheckpointWriter(tmp_path / "out") as writer:
        assert not writer.allocate(layout(content), 1)
        with pytest.raises(CheckpointError, match=r"was never written \(3 in all\)"):
            close(writer)
    write(tmp_path / "out", content, 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_refusing_a_folder_changes_nothing_in_it(tmp_path: Path) -> None:
    unfinished(tmp_path / "out", tensors(3), 2)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "out")
    for refuse in (check_free, CheckpointWriter):
        with pytest.raises(CheckpointError, match=r"exists and is not empty; choose another --output or pass --force"):
            refuse(tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_unfinished_run_is_no_obstacle(tmp_path: Path) -> None:
    unfinished(tmp_path / "out", tensors(3), 2)
    check_free(tmp_path / "out")
    write(tmp_path / "out", tensors(1))
    assert names(tmp_path / "out") == ["config.json", "model.safetensors", "report.json"]


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for force in (False, True):
        with pytest.raises(CheckpointError, match="exists and is not a folder"):
            CheckpointWriter(tmp_path / "out", force=force)


def test_discard_removes_what_is_unfinished_and_the_folder_it_made(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.allocate(layout(tensors(3)), 1)
        (writer.staging / "states").mkdir()
        (writer.staging / "states" / "0").write_text("of the caller")
        writer.discard()
        writer.discard()
    assert not (tmp_path / "out").exists()


def test_discard_keeps_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    CheckpointWriter(tmp_path / "empty").discard()
    assert names(tmp_path / "empty") == []
    write(tmp_path / "out", tensors(1))
    before = contents(tmp_path / "out")
    unfinished(tmp_path / "out", tensors(3), 2)
    CheckpointWriter(tmp_path / "out", force=True).discard()
    assert contents(tmp_path / "out") == before


def test_discard_after_the_end_does_nothing(tmp_path: Path) -> None:
    content = tensors(1)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.allocate(layout(content), 1)
        writer.write("t0", content["t0"])
        close(writer)
        writer.discard()
    assert names(tmp_path / "out") == ["config.json", "model.safetensors", "report.json"]


def test_discard_while_files_are_being_moved(tmp_path: Path) -> None:
    content = tensors(3)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.allocate(layout(content), 1)
        for name, tensor in content.items():
            writer.write(name, tensor)
        with pytest.raises(Stopped), stopped_at(4, Stopped(), ("os.replace",)):
            close(writer)
        assert len(names(tmp_path / "out")) == 3
        writer.discard()
    assert not (tmp_path / "out").exists()


def test_clear_forgets_an_unfinished_run(tmp_path: Path) -> None:
    content = tensors(3)
    unfinished(tmp_path / "out", content, 3)
    (tmp_path / "out" / STAGING / "journal.jsonl").write_text("of the caller")
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.clear()
        assert names(writer.staging) == ["lock"]
        assert not writer.allocate(layout(content), 1)


def test_stopped_before_the_old_checkpoint_is_gone_loses_nothing(tmp_path: Path) -> None:
    out, content = tmp_path / "out", tensors(3)
    write(tmp_path / "whole", content, 1)
    write(out, {"old": torch.zeros(3)})
    unfinished(out, content, 3)
    with CheckpointWriter(out, force=True) as writer:
        writer.allocate(layout(content), 1)
        with pytest.raises(Stopped), stopped_at(1, Stopped(), ("os.unlink",)):
            close(writer)
    assert CheckpointReader(out).keys() == ["old"]
    for _ in range(2):
        with CheckpointWriter(out, force=True) as writer:
            assert writer.allocate(layout(content), 1)
    with CheckpointWriter(out, force=True) as writer:
        assert writer.allocate(layout(content), 1)
        close(writer)
    assert contents(out) == contents(tmp_path / "whole")


def test_files_of_the_caller_stay_until_the_end(tmp_path: Path) -> None:
    unfinished(tmp_path / "out", tensors(3), 3)
    journal = tmp_path / "out" / STAGING / "journal.jsonl"
    journal.write_text("of the caller")
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.allocate(layout(tensors(3)), 1)
        assert journal.read_text() == "of the caller"
        close(writer)
    assert STAGING not in names(tmp_path / "out")


# --- one process at a time


HOLDER = """
import sys
from llmq.writing import CheckpointWriter
writer = CheckpointWriter(sys.argv[1])
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process hold `folder` until its stdin is closed."""
    with script(HOLDER, folder) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("force", [False, True])
def test_second_process_is_refused_until_the_first_is_killed(force: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with holder(out) as process:
        host = os.uname().nodename
        words = (
            rf"{out}: another llmq run \(pid {process.pid} on {host}\) is writing there; wait for it or choose another"
        )
        before = contents(out)
        with pytest.raises(CheckpointError, match=words):
            CheckpointWriter(out, force=force)
        assert contents(out) == before
        process.kill()
        process.wait(timeout=60)
        write(out, tensors(1))
    assert CheckpointReader(out).keys() == ["t0"]


def test_second_writer_of_one_process_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(CheckpointError, match=rf"another llmq run \(pid {os.getpid()} on ")
    with CheckpointWriter(tmp_path / "out"), refused:
        CheckpointWriter(tmp_path / "out")
    CheckpointWriter(tmp_path / "out").discard()


def test_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out")
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(theirs)
        os.read(ours, 1)  # until the parent closes its end
        os._exit(0)
    os.close(ours)
    writer.close()
    CheckpointWriter(tmp_path / "out").close()
    os.close(theirs)
    os.waitpid(child, 0)


def test_lock_file_that_its_holder_removes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    content, real, out = tensors(1), fcntl.flock, tmp_path / "out"
    first = CheckpointWriter(out)
    first.allocate(layout(content), 1)
    first.write("t0", content["t0"])

    def flock(handle: int, operation: int) -> None:
        monkeypatch.undo()  # the second writer has opened the file and now waits; the first one ends before it gets it
        close(first)
        real(handle, operation)

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        CheckpointWriter(out)
    assert names(out) == ["config.json", "model.safetensors", "report.json"]


def test_staging_folder_that_vanishes_before_the_lock_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, out = os.open, tmp_path / "out"

    def vanishing(file: Path, *arguments: Any) -> int:
        monkeypatch.undo()
        (out / STAGING).rmdir()
        return real(file, *arguments)

    monkeypatch.setattr("os.open", vanishing)
    write(out, tensors(1))


def test_another_process_is_about_to_lock_when_the_first_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, real, out = tensors(1), Path.rmdir, tmp_path / "out"

    def rmdir(folder: Path) -> None:
        monkeypatch.undo()
        (out / STAGING / "lock").touch()
        real(folder)

    with CheckpointWriter(out) as writer:
        writer.allocate(layout(content), 1)
        writer.write("t0", content["t0"])
        monkeypatch.setattr("pathlib.Path.rmdir", rmdir)
        close(writer)
    assert CheckpointReader(out).keys() == ["t0"]
