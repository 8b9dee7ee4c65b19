"""What a writer makes of a layout and its tensors, and of disks that are too small."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from writing_cases import close, contents, layout, loaded, names, tensors, write

from llmq.checkpoint import INDEX, STAGING, CheckpointReader
from llmq.errors import CheckpointError
from llmq.shards import DTYPES
from llmq.writing import CheckpointWriter, Slot

# --- what it makes


SHAPES = st.one_of(st.just(()), st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple))


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, Tensor]:
    """Draw tensors of any shapes and dtypes, by odd names."""
    found: dict[str, Tensor] = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=5), max_size=6, unique=True)):
        shape, dtype = draw(SHAPES), draw(st.sampled_from(list(DTYPES.values())))
        if name == "__metadata__" or (dtype == torch.float4_e2m1fn_x2 and not shape):
            continue
        raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
        found[name] = raw.view(dtype).reshape(shape)
    return found


def raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@settings(max_examples=60)
@given(content=checkpoints(), shard_bytes=st.integers(1, 300), order=st.randoms(use_true_random=False))
def test_any_layout_arrives(
    content: dict[str, Tensor], shard_bytes: int, order: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("any") / "out"
    shuffled = list(content)
    order.shuffle(shuffled)
    with CheckpointWriter(out) as writer:
        assert not writer.allocate(layout(content), shard_bytes)
        for name in shuffled:
            writer.write(name, content[name])
        close(writer)
    assert not (out / STAGING).exists()
    reader, theirs = CheckpointReader(out), loaded(out)
    assert set(reader) == set(theirs) == set(content)
    for name, tensor in content.items():
        for found in (reader.read(name), theirs[name]):
            assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
            assert torch.equal(raw(found), raw(tensor))
        info = reader.info(name)
        assert info.offset % info.dtype.itemsize == 0, "aligned"
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            kept = list(opened.keys())
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
        sizes = [content[name].nbytes for name in kept]
        assert sum(sizes) <= shard_bytes or len([size for size in sizes if size]) == 1


def test_shards_are_filled_in_the_order_of_the_layout_and_the_index_is_right(tmp_path: Path) -> None:
    content = tensors(7)  # 40 bytes each
    content["large"] = torch.zeros(50)
    write(tmp_path / "out", content, shard_bytes=80)
    files = [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert [file for file in names(tmp_path / "out") if file.endswith(".safetensors")] == files
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 7 * 40 + 200}
    placed = [["t0", "t1"], ["t2", "t3"], ["t4", "t5"], ["t6"], ["large"]]
    assert list(index["weight_map"]) == sorted(content)
    for file, expected in zip(files, placed, strict=True):
        assert [name for name, at in index["weight_map"].items() if at == file] == expected
        assert sorted(load_file(tmp_path / "out" / file)) == sorted(expected)


def test_one_shard_has_the_plain_name_and_no_index(tmp_path: Path) -> None:
    write(tmp_path / "out", tensors(2))
    assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors", "report.json"]


def test_same_tensors_same_bytes_in_any_order_of_writing(tmp_path: Path) -> None:
    content = tensors(5)
    write(tmp_path / "a", content, 100)
    with CheckpointWriter(tmp_path / "b") as writer:
        writer.allocate(layout(content), 100)
        for name in reversed(content):
            writer.write(name, torch.zeros(10))
            writer.sync()
            writer.write(name, content[name])
        close(writer)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_views_and_transposes_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    write(tmp_path / "out", {"t": whole.T, "part": whole[1:, ::2], "same": whole[:1].expand(5, 4)})
    reader = CheckpointReader(tmp_path / "out")
    assert torch.equal(reader.read("t"), whole.T)
    assert torch.equal(reader.read("part"), whole[1:, ::2])
    assert torch.equal(reader.read("same"), whole[:1].expand(5, 4))


@pytest.mark.parametrize("piece", [1, 4, 7, 40, 100])
def test_large_tensors_are_copied_in_pieces(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = Tensor.contiguous

    def contiguous(tensor: Tensor) -> Tensor:
        sizes.append(0 if tensor.is_contiguous() else tensor.nbytes)
        return real(tensor)

    monkeypatch.setattr("llmq.shards._PIECE", piece)
    monkeypatch.setattr(Tensor, "contiguous", contiguous)
    content = {"a": torch.arange(60.0).reshape(3, 4, 5).permute(2, 0, 1), "b": torch.arange(30.0)[::2]}
    write(tmp_path / "out", content)
    assert max(sizes) <= max(piece, 4)
    for name, tensor in content.items():
        assert torch.equal(loaded(tmp_path / "out")[name], tensor)


def test_writes_that_stop_short_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, content = os.pwrite, tensors(3)
    monkeypatch.setattr("os.pwrite", lambda handle, part, at: real(handle, part[:7], at))
    write(tmp_path / "out", content)
    assert all(torch.equal(loaded(tmp_path / "out")[name], content[name]) for name in content)


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
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 7
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)


def test_parents_are_made(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out", tensors(1))
    assert CheckpointReader(tmp_path / "a" / "b" / "out").keys() == ["t0"]


# --- the layout is kept to


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("t9", torch.zeros(10), "tensor t9 has no place in the output"),
        ("t0", torch.zeros(9), r"tensor t0 is torch\.float32 \[9\], its place is for torch\.float32 \[10\]"),
        ("t0", torch.zeros(10).half(), r"tensor t0 is torch\.float16 \[10\], its place is for torch\.float32 \[10\]"),
    ],
)
def test_tensors_that_are_not_in_the_layout(name: str, tensor: Tensor, message: str, tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.allocate(layout(tensors(2)), 1)
        with pytest.raises(CheckpointError, match=message):
            writer.write(name, tensor)


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 0), (7, 2, 2)], ids=str)
def test_rows_one_after_the_other(shape: tuple[int, ...], tmp_path: Path) -> None:
    content = {"before": torch.ones(3), "t": torch.randn(shape), "z": torch.ones(3), "scalar": torch.ones(())}
    write(tmp_path / "whole", content)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.allocate(layout(content), 1000)
        for name in ("before", "z"):
            writer.write(name, content[name])
        for start in (0, 3):
            writer.write("t", content["t"][start : start + 3], start)
        writer.write("scalar", content["scalar"], 0)
        with pytest.raises(CheckpointError, match=r"tensor t was never written \(1 in all\)"):
            close(writer)
        writer.write("t", content["t"][6:], 6)
        close(writer)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("rows", "start"), [(1, 10), (2, 9), (11, 0), (1, 11)])
def test_rows_that_a_tensor_does_not_have(rows: int, start: int, tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.allocate(layout(tensors(2)), 1)
        with pytest.raises(CheckpointError, match=rf"t0 is torch\.float32 \[{rows}\] from row {start} on, its place"):
            writer.write("t0", torch.zeros(rows), start)


def test_dtype_that_safetensors_does_not_have(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        with pytest.raises(CheckpointError, match=r"tensor a is torch\.complex128, which safetensors cannot hold"):
            writer.allocate({"a": Slot((1,), torch.complex128)}, 1)
        writer.discard()
    assert not (tmp_path / "out").exists()


def test_tensors_that_were_never_written(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.allocate(layout(tensors(3)), 1)
        writer.write("t1", tensors(3)["t1"])
        with pytest.raises(
            CheckpointError, match=r"tensor t0 was never written \(2 in all\); the output is incomplete"
        ):
            close(writer)
    assert names(tmp_path / "out") == [STAGING]


def test_all_room_is_taken_at_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.allocate({"a": Slot((10**6,), torch.float32), "b": Slot((10**6,), torch.float32)}, 1)
        files = [file.stat() for file in (tmp_path / "out").rglob("*.safetensors")]
        assert len(files) == 2
        assert all(file.st_size > 4 * 10**6 and file.st_blocks * 512 >= file.st_size for file in files)
        writer.discard()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_cannot_reserve(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    write(tmp_path / "a", tensors(3), 50)
    monkeypatch.setattr("os.posix_fallocate", refuse)
    write(tmp_path / "b", tensors(3), 50)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --- disks


AGAIN = r"cannot be written: .*; the disk is full; make space and run the same command again"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "llmq", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("cannot mount a file system here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk_is_found_before_work_and_left_as_it_was(small_disk: Path) -> None:
    content = tensors(6, size=10**5)
    (small_disk / "out").mkdir()
    with CheckpointWriter(small_disk / "out") as writer:
        with pytest.raises(CheckpointError, match=AGAIN):
            writer.allocate(layout(content), 1)
        assert shutil.disk_usage(small_disk).free > 0.9 * 2**20, "the room is given back"
    write(small_disk / "out", tensors(2, size=10**5), 1)


def test_disk_that_fills_up_while_side_files_are_written(small_disk: Path) -> None:
    content, filler = tensors(2, size=10**5), small_disk / "filler"
    write(small_disk / "whole", content, 1)
    expected = contents(small_disk / "whole")
    shutil.rmtree(small_disk / "whole")
    with CheckpointWriter(small_disk / "out") as writer:
        writer.allocate(layout(content), 1)
        with filler.open("wb", buffering=0) as file:
            while shutil.disk_usage(small_disk).free:
                file.write(bytes(4096))
        for name, tensor in content.items():
            writer.write(name, tensor)  # has its room
        with pytest.raises(CheckpointError, match=AGAIN):
            close(writer)
    filler.unlink()
    with CheckpointWriter(small_disk / "out") as writer:
        assert writer.allocate(layout(content), 1)
        for name, tensor in content.items():
            writer.write(name, tensor)
        close(writer)
    assert contents(small_disk / "out") == expected


def test_limit_of_file_sizes(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with CheckpointWriter(tmp_path / "out") as writer, pytest.raises(CheckpointError, match=AGAIN):
            writer.allocate(layout(tensors(2, size=10**5)), 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_folder_that_cannot_be_written() -> None:
    with pytest.raises(CheckpointError, match=r"/sys/llmq: cannot be written: .*read-only"):
        CheckpointWriter("/sys/llmq")  # not even root may make a folder there
