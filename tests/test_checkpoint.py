import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.checkpoint import INDEX, STAGING, CheckpointReader, CheckpointWriter, check_free, resolve, tensor_infos
from llmq.errors import CheckpointError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
CONFIG = {"model_type": "tiny", "name": "größer"}


def tensors(count: int, size: int = 10) -> dict[str, Tensor]:
    """Return `count` float32 tensors of `size` entries each."""
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(size, generator=generator) for i in range(count)}


def write(
    folder: Path, content: dict[str, Tensor], shard_bytes: int = 10**9, *, force: bool = False, **finish: Any
) -> None:
    with CheckpointWriter(folder, shard_bytes, force=force) as writer:
        writer.add(content)
        writer.finish(
            finish.get("config", CONFIG), finish.get("json_files", {"report.json": {"a": 1}}), finish.get("copies", [])
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# --- reader


@pytest.mark.parametrize("shard_bytes", [10**9, 80, 1], ids=["single", "two in a shard", "one in a shard"])
def test_reader_gives_back_what_the_writer_got(shard_bytes: int, tmp_path: Path) -> None:
    content = tensors(5)
    write(tmp_path / "out", content, shard_bytes)
    reader = CheckpointReader(tmp_path / "out")
    assert reader.config == CONFIG
    assert set(reader) == set(reader.keys()) == set(content)
    for name, tensor in content.items():
        assert torch.equal(reader.read(name), tensor)
        info = reader.info(name)
        assert (info.shape, info.dtype, info.nbytes) == ((10,), torch.float32, 40)
        assert name in load_file(tmp_path / "out" / info.file)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_arrives(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    write(tmp_path / "out", {"a": tensor, "none": tensor[:0].clone(), "scalar": tensor[0, 1].clone()})
    reader = CheckpointReader(tmp_path / "out")
    assert reader.info("a") == ((2, 3), dtype, "model.safetensors", tensor.nbytes)
    assert reader.info("none").nbytes == 0
    assert reader.info("scalar").shape == ()
    assert reader.read("a").dtype == dtype
    assert torch.equal(reader.read("a").float(), tensor.float())


def test_reader_takes_files_without_an_index_by_any_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "first.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "second.safetensors")
    (tmp_path / "config.json").write_text("{}")
    reader = CheckpointReader(tmp_path)
    assert reader.keys() == ["a", "b"]
    assert torch.equal(reader.read("b"), torch.ones(2))


def test_index_wins_over_other_files(tmp_path: Path) -> None:
    write(tmp_path / "out", tensors(3), 1)
    save_file({"t0": torch.zeros(1), "adapter": torch.zeros(1)}, tmp_path / "out" / "adapter.safetensors")
    assert sorted(CheckpointReader(tmp_path / "out")) == ["t0", "t1", "t2"]


def test_reader_reads_no_tensor_until_asked(tmp_path: Path) -> None:
    write(tmp_path / "out", tensors(1, size=10**6))
    reader = CheckpointReader(tmp_path / "out")
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:  # the reader has seen the header only
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    assert reader.read("t0")[-1] == 0


def test_tensor_in_two_files_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"t": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tensor t is in a\.safetensors and in b\.safetensors"):
        CheckpointReader(tmp_path)


def test_reading_an_unknown_tensor_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "out", tensors(1))
    with pytest.raises(CheckpointError, match="tensor t1 is missing"):
        CheckpointReader(tmp_path / "out").read("t1")


def test_tensor_infos_reads_headers_of_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "a.safetensors")
    infos = tensor_infos([tmp_path / "a.safetensors"])
    assert infos == {"a": ((2, 3), torch.float32, str(tmp_path / "a.safetensors"), 24)}


# --- writer: what it makes


def test_shards_stay_below_the_limit_and_the_index_is_right(tmp_path: Path) -> None:
    content = tensors(7)  # 40 bytes each
    content["large"] = torch.zeros(50)
    write(tmp_path / "out", content, shard_bytes=100)
    names = [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == names
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 7 * 40 + 200}
    assert set(index["weight_map"]) == set(content)
    for name in names:
        shard = load_file(tmp_path / "out" / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == set(shard)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 100 or len(shard) == 1


def test_one_shard_has_the_plain_name_and_no_index(tmp_path: Path) -> None:
    write(tmp_path / "out", tensors(2))
    assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors", "report.json"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, tensors(5), 100)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_views_and_transposes_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    write(tmp_path / "out", {"t": whole.T, "part": whole[1:, ::2]})
    reader = CheckpointReader(tmp_path / "out")
    assert torch.equal(reader.read("t"), whole.T)
    assert torch.equal(reader.read("part"), whole[1:, ::2])


def test_json_is_utf_8_and_copies_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\x00any bytes")
    write(tmp_path / "out", tensors(1), copies=[tmp_path / "tokenizer.json"])
    assert "größer" in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"\x00any bytes"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_file_modes_follow_the_umask(mask: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    before = os.umask(mask)
    try:
        write(tmp_path / "out", tensors(3), 1, copies=[tmp_path / "tokenizer.json"])
    finally:
        assert os.umask(before) == mask
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 7
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)


def test_parents_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out", tensors(1))
    assert CheckpointReader(tmp_path / "a" / "b" / "out").keys() == ["t0"]


@pytest.mark.parametrize("shard_bytes", [10**9, 1], ids=["same shard", "earlier shard"])
def test_a_name_written_twice_is_an_error(shard_bytes: int, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", shard_bytes)
    writer.add(tensors(2))
    with pytest.raises(CheckpointError, match="tensor t0 is written twice"):
        writer.add(tensors(1))


# --- writer: whole or not at all


def test_no_checkpoint_before_the_end(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", 1) as writer:
        writer.add(tensors(3))
        assert [path.name for path in (tmp_path / "out").iterdir()] == [STAGING]
        assert len(list((tmp_path / "out" / STAGING).iterdir())) == 2, "the third waits in memory"
        with pytest.raises(CheckpointError, match=r"not a checkpoint, it has no config\.json; it holds an unfinished"):
            CheckpointReader(tmp_path / "out")
        writer.finish(CONFIG, {}, [])
    assert not (tmp_path / "out" / STAGING).exists()


class Stopped(BaseException):
    """What tests raise where a process may be stopped."""


def stop_at(monkeypatch: pytest.MonkeyPatch, call: str, count: int, error: BaseException) -> list[object]:
    """Let function `call` of the module os or shutil raise `error` the `count`-th time; return its first arguments."""
    module, name = call.split(".")
    real: Callable[..., Any] = getattr({"os": os, "shutil": shutil}[module], name)
    seen: list[object] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments[0])
        if len(seen) == count:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(f"llmq.checkpoint.{call}", counted)
    return seen


@pytest.mark.parametrize("error", [Stopped(), OSError(errno.ENOSPC, "No space left on device")], ids=["stop", "full"])
@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "shutil.copyfile"])
def test_stopped_at_any_step_nothing_is_left(
    call: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "tokenizer.json"
    copy.write_text("{}")
    with monkeypatch.context() as patch:
        seen = stop_at(patch, call, 0, error)
        write(tmp_path / "whole", tensors(3), 1, copies=[copy])
        steps = len(seen)
    assert steps
    for step in range(1, steps + 1):
        out = tmp_path / f"out{step}"
        with monkeypatch.context() as patch:
            stop_at(patch, call, step, error)
            with pytest.raises((Stopped, CheckpointError)):
                write(out, tensors(3), 1, copies=[copy])
        assert not out.exists(), f"{call} number {step} of {steps}"


@pytest.mark.parametrize("call", ["os.fsync", "shutil.copyfile"])
def test_force_keeps_the_old_checkpoint_until_all_of_the_new_one_is_on_the_disk(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, copy = tmp_path / "out", tmp_path / "tokenizer.json"
    copy.write_text("{}")
    write(out, {"old": torch.zeros(3)}, copies=[copy])
    before = contents(out)
    steps = {"os.fsync": 3 + 1 + 3, "shutil.copyfile": 1}[call]  # shards, the copy, index, report and config
    for step in range(1, steps + 1):
        with monkeypatch.context() as patch:
            stop_at(patch, call, step, OSError(errno.ENOSPC, "No space left on device"))
            with pytest.raises(CheckpointError, match="the disk is full"):
                write(out, tensors(3), 1, force=True, copies=[copy])
        assert contents(out) == before


def test_config_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = stop_at(monkeypatch, "os.replace", 0, Stopped())
    write(tmp_path / "out", tensors(3), 1)
    assert Path(str(moved[-1])).name == "config.json"
    assert sum(Path(str(path)).name == "config.json" for path in moved) == 1


def test_while_files_move_there_is_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", tensors(3), 1)
    real, states = os.replace, []

    def watched(source: Path, target: Path) -> None:
        if Path(target).parent == tmp_path / "out":
            states.append((tmp_path / "out" / "config.json").exists())
        real(source, target)

    monkeypatch.setattr("llmq.checkpoint.os.replace", watched)
    write(tmp_path / "out", tensors(2), 1, force=True)
    assert len(states) == 5
    assert not any(states)


def test_force_replaces_shards_and_index(tmp_path: Path) -> None:
    write(tmp_path / "out", tensors(3), 1)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    write(tmp_path / "out", {"new": torch.ones(2)}, force=True)
    assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors", "notes.txt", "report.json"]
    assert CheckpointReader(tmp_path / "out").keys() == ["new"]


def test_abort_keeps_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    writer = CheckpointWriter(tmp_path / "out", 1, force=True)
    writer.add(tensors(3))
    writer.abort()
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}


def test_empty_folder_is_used_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    CheckpointWriter(tmp_path / "out", 1).abort()
    assert (tmp_path / "out").is_dir()
    write(tmp_path / "out", tensors(1))


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    killed = CheckpointWriter(tmp_path / "out", 1)
    killed.add(tensors(5))
    (tmp_path / "out" / STAGING / ".tmp1234").write_text("what safetensors had not renamed yet")
    write(tmp_path / "out", tensors(1))
    assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors", "report.json"]


def test_refusing_a_folder_changes_nothing_in_it(tmp_path: Path) -> None:
    killed = CheckpointWriter(tmp_path / "out", 1)
    killed.add(tensors(3))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "out")
    for refuse in (check_free, lambda path: CheckpointWriter(path, 1)):
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            refuse(tmp_path / "out")
    assert contents(tmp_path / "out") == before


# --- resolve


def test_resolve_returns_folders_and_paths_as_they_are(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    for path in (str(tmp_path / "no" / "folder"), "./nothing", "a/b/c", "../x"):  # no hub id looks like these
        assert resolve(path) == Path(path)


def test_resolve_asks_the_hub_for_safetensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("some-org/some-model") == tmp_path
    assert asked["name"] == "some-org/some-model"
    assert "*.bin" in asked["ignore_patterns"]
    assert not any("safetensors" in pattern for pattern in asked["ignore_patterns"])


def test_resolve_gives_the_first_line_of_what_the_hub_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **_: Any) -> str:
        raise RuntimeError("401 unauthorized\nmore\nlines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"some-model: no such folder here.*\(401 unauthorized\)"):
        resolve("some-model")
