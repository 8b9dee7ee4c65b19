"""A checkpoint is there as a whole or not at all, wherever its writer is stopped."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from writing_cases import (
    FULL,
    Stopped,
    close,
    contents,
    layout,
    names,
    steps_of,
    stopped_at,
    tensors,
    unfinished,
    write,
)

from llmq.checkpoint import INDEX, STAGING, CheckpointReader
from llmq.errors import CheckpointError
from llmq.writing import CheckpointWriter, check_free


def test_no_checkpoint_before_the_end(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.allocate(layout(tensors(3)), 1)
        for name, tensor in tensors(3).items():
            writer.write(name, tensor)
        assert names(tmp_path / "out") == [STAGING]
        with pytest.raises(CheckpointError, match=r"not a checkpoint, it has no config\.json; it holds an unfinished"):
            CheckpointReader(tmp_path / "out")
        close(writer)
    assert not (tmp_path / "out" / STAGING).exists()


@pytest.mark.parametrize("error", [Stopped(), FULL], ids=["stop", "full"])
def test_stopped_at_any_step_the_next_writer_makes_the_same(error: BaseException, tmp_path: Path) -> None:
    copy, content = tmp_path / "tokenizer.json", tensors(3)
    copy.write_text("{}")
    steps = steps_of(lambda: write(tmp_path / "whole", content, 1, copies=[copy]))
    complete = 0
    for step in range(1, steps + 1):
        out = tmp_path / f"out{step}"
        with pytest.raises((Stopped, CheckpointError)), stopped_at(step, error):
            write(out, content, 1, copies=[copy])
        if (out / "config.json").exists():  # only cleaning was left
            complete += 1
            assert not set(contents(tmp_path / "whole").items()) - set(contents(out).items())
            with pytest.raises(CheckpointError, match="exists and is not empty"):
                check_free(out)
        else:
            check_free(out)
            write(out, content, 1, copies=[copy])
        assert contents(out) == contents(tmp_path / "whole"), f"step {step}"
    assert 0 < complete < 12


@pytest.mark.parametrize("call", ["os.ftruncate", "os.pwrite"])
def test_disk_without_room_for_the_lock_is_left_as_it_was(call: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the disk is full"), stopped_at(1, FULL, (call,)):
        CheckpointWriter(tmp_path / "out")
    assert names(tmp_path) == []
    unfinished(tmp_path / "out", tensors(3), 2)
    before = contents(tmp_path / "out" / STAGING / "files")
    with pytest.raises(CheckpointError, match="the disk is full"), stopped_at(1, FULL, (call,)):
        CheckpointWriter(tmp_path / "out")
    assert contents(tmp_path / "out" / STAGING / "files") == before


def test_force_keeps_the_old_checkpoint_until_all_of_the_new_one_is_on_the_disk(tmp_path: Path) -> None:
    copy, old, new = tmp_path / "tokenizer.json", {"old": torch.zeros(3)}, tensors(3)
    copy.write_text("{}")
    write(tmp_path / "new", new, 1, copies=[copy])
    write(tmp_path / "old", old)
    before, after = contents(tmp_path / "old"), contents(tmp_path / "new")

    def renew(name: str) -> None:
        write(tmp_path / name, new, 1, force=True, copies=[copy])

    shutil.copytree(tmp_path / "old", tmp_path / "count")
    seen = {"old": 0, "gone": 0, "new": 0}
    for step in range(1, steps_of(lambda: renew("count")) + 1):
        out = tmp_path / f"out{step}"
        shutil.copytree(tmp_path / "old", out)
        with pytest.raises(CheckpointError, match="the disk is full"), stopped_at(step, FULL):
            renew(out.name)
        found = {name: content for name, content in contents(out).items() if not name.startswith(STAGING)}
        state = "old" if found == before else "new" if found == after else "gone"
        seen[state] += 1
        assert (out / "config.json").exists() == (state != "gone"), "a mixture of both is no checkpoint"
        renew(out.name)
        assert contents(out) == after, f"step {step}"
    assert seen["old"] > 20
    assert seen["gone"] > 5
    assert seen["new"] > 2


def test_config_comes_last_and_is_not_there_while_files_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", tensors(3), 1)
    real, moved, states = os.replace, [], []

    def watched(source: Path, target: Path) -> None:
        if Path(target).parent == tmp_path / "out":
            moved.append(Path(target).name)
            states.append((tmp_path / "out" / "config.json").exists())
        real(source, target)

    monkeypatch.setattr("os.replace", watched)
    write(tmp_path / "out", tensors(2), 1, force=True)
    assert len(states) == 5
    assert not any(states)
    assert moved.index("config.json") == 4


def test_everything_is_on_the_disk_before_files_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder is synced after it was last written to, and before what relies on it is done."""
    out, copy = tmp_path / "out", tmp_path / "tokenizer.json"
    copy.write_text("{}")
    events: list[str] = []
    replace = os.replace

    def path_of(handle: int) -> str:
        return str(Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path))

    def moved(source: Path, target: Path) -> None:
        events.append(f"move {Path(target).relative_to(tmp_path)}")
        replace(source, target)

    monkeypatch.setattr("os.fsync", lambda handle: events.append(f"sync {path_of(handle)}"))
    monkeypatch.setattr("os.replace", moved)
    write(out, tensors(2), 1, copies=[copy])
    files = ["config.json", INDEX, "report.json", "tokenizer.json"]
    files += [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    start = events.index("move out/model-00001-of-00002.safetensors")
    noted = events.index(f"move out/{STAGING}/moving.json")
    for name in files:
        assert f"sync out/{STAGING}/files/{name}" in events[:noted]
    assert (
        events.index(f"sync out/{STAGING}/files", noted - 3)
        < noted
        < events.index(f"sync out/{STAGING}", noted)
        < start
    )
    last = events.index("move out/config.json")
    assert events[last - 1] == "sync out"
    assert events[last + 1] == "sync out"


def test_a_record_follows_its_tensors_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tensors(2)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.allocate(layout(content), 1)
        for name, tensor in content.items():
            writer.write(name, tensor)
        record, synced = writer.staging / "written.jsonl", []
        seen = lambda handle: synced.append((Path(os.readlink(f"/proc/self/fd/{handle}")).name, record.exists()))  # noqa: E731
        monkeypatch.setattr("os.fsync", seen)
        writer.sync()
        shards = [(f"model-0000{i}-of-00002.safetensors", False) for i in (1, 2)]
        assert synced == [*shards, ("written.jsonl", True)]
        assert record.read_text() == '"t0"\n"t1"\n'
        synced.clear()
        writer.write("t1", content["t1"])
        writer.sync()
        assert synced == [(shards[1][0], True)], "only what was touched, and it is on record already"


def test_force_replaces_shards_and_index(tmp_path: Path) -> None:
    write(tmp_path / "out", tensors(3), 1)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    write(tmp_path / "out", {"new": torch.ones(2)}, force=True)
    assert names(tmp_path / "out") == ["config.json", "model.safetensors", "notes.txt", "report.json"]
    assert CheckpointReader(tmp_path / "out").keys() == ["new"]
