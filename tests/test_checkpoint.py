import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.checkpoint import INDEX, STAGING, CheckpointReader, resolve, tensor_infos
from llmq.errors import CheckpointError
from llmq.shards import DTYPES

CONFIG = {"model_type": "tiny", "name": "größer"}


def tensors(count: int, size: int = 10) -> dict[str, Tensor]:
    """Return `count` float32 tensors of `size` entries each."""
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(size, generator=generator) for i in range(count)}


def write(folder: Path, *shards: dict[str, Tensor]) -> Path:
    """Make a checkpoint of these shards, by safetensors' own writer."""
    folder.mkdir(exist_ok=True)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, content in zip(names, shards, strict=True):
        save_file(content, folder / name)
    if len(shards) > 1:
        weight_map = {key: name for name, content in zip(names, shards, strict=True) for key in content}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def split(content: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    names = list(content)
    return [{name: content[name] for name in names[i : i + size]} for i in range(0, len(names), size)]


@pytest.mark.parametrize("size", [5, 2, 1], ids=["single", "two in a shard", "one in a shard"])
def test_reader_gives_back_what_was_written(size: int, tmp_path: Path) -> None:
    content = tensors(5)
    reader = CheckpointReader(write(tmp_path / "out", *split(content, size)))
    assert reader.config == CONFIG
    assert list(reader) == reader.keys() == list(content)
    for name, tensor in content.items():
        assert torch.equal(reader.read(name), tensor)
        info = reader.info(name)
        assert (info.shape, info.dtype, info.nbytes) == ((10,), torch.float32, 40)
        assert name in load_file(tmp_path / "out" / info.file)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_arrives(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=torch.uint8)
    stored = stored.repeat_interleave(dtype.itemsize, dim=1).view(dtype)
    content = {"a": stored, "none": stored[:0].clone(), "row": stored[0].clone()}
    if dtype != torch.float4_e2m1fn_x2:  # two numbers make no scalar
        content["scalar"] = stored[0, 1].clone()
    reader = CheckpointReader(write(tmp_path / "out", content))
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in content.items():
        info, found = reader.info(name), reader.read(name)
        assert (info.shape, info.dtype, info.nbytes) == (tuple(tensor.shape), dtype, tensor.nbytes)
        assert (found.shape, found.dtype) == (tensor.shape, dtype) == (loaded[name].shape, loaded[name].dtype)
        for other in (tensor, loaded[name]):
            assert torch.equal(found.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def test_keys_are_in_the_order_that_safetensors_gives(tmp_path: Path) -> None:
    content = {name: torch.zeros(2, dtype=dtype) for name, dtype in (("b", torch.int8), ("a", torch.int8))}
    content["c"] = torch.zeros(2)  # stored first, for its item size
    reader = CheckpointReader(write(tmp_path / "out", content))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert reader.keys() == list(file.keys()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "rows",
    [slice(0, 3), slice(2, 5), slice(4, None), slice(None, 2), slice(-2, None), slice(5, 5), slice(4, 2), slice(3, 99)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(5, 3), (5,), (5, 2, 2), (5, 0), (0, 3)], ids=str)
def test_rows(rows: slice, shape: tuple[int, ...], tmp_path: Path) -> None:
    content = {"before": torch.ones(7), "t": torch.randn(shape).bfloat16(), "z": torch.ones(7, dtype=torch.bfloat16)}
    reader = CheckpointReader(write(tmp_path / "out", content))
    found = reader.read("t", rows)
    assert torch.equal(found, content["t"][rows])
    assert found.untyped_storage().nbytes() == found.nbytes, "the rest was read too"


@pytest.mark.parametrize("limit", [1, 24, 25, 71, 72, 10**9])
@pytest.mark.parametrize("name", ["t", "scalar", "none"])
def test_pieces_are_rows_one_after_the_other(
    name: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmq.checkpoint._PIECE", limit)
    content = {"t": torch.randn(6, 3), "scalar": torch.ones(()), "none": torch.ones(0, 3)}
    found = list(CheckpointReader(write(tmp_path / "out", content)).pieces(name))
    assert torch.equal(torch.cat([rows for _, rows in found]) if name == "t" else found[0][1], content[name])
    at = 0
    for start, rows in found:
        assert start == at
        assert rows.nbytes <= max(12, limit)
        at += rows.numel() // 3


def test_rows_in_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not in steps of 2"):
        CheckpointReader(write(tmp_path / "out", tensors(1))).read("t0", slice(0, 10, 2))


def test_reader_takes_files_without_an_index_by_any_name(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "first.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "second.safetensors")
    (tmp_path / "config.json").write_text("{}")
    reader = CheckpointReader(tmp_path)
    assert reader.keys() == ["a", "b"]
    assert torch.equal(reader.read("b"), torch.ones(2))


def test_index_wins_over_other_files(tmp_path: Path) -> None:
    write(tmp_path / "out", *split(tensors(3), 1))
    save_file({"t0": torch.zeros(1), "adapter": torch.zeros(1)}, tmp_path / "out" / "adapter.safetensors")
    assert sorted(CheckpointReader(tmp_path / "out")) == ["t0", "t1", "t2"]


def test_reader_reads_no_tensor_until_asked(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path / "out", tensors(1, size=10**6)))
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:  # the reader has seen the header only
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    assert reader.read("t0")[-1] == 0


def test_tensors_are_memory_of_their_own(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path / "out", tensors(1)))
    first = reader.read("t0")
    kept = first.clone()
    first.zero_()
    assert torch.equal(reader.read("t0"), kept)


PEAK = """
import sys
import torch
from llmq.checkpoint import CheckpointReader

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

reader = CheckpointReader(sys.argv[1])
reader.read("t0")
before = peak()
kept = []
for name in reader:
    tensor = reader.read(name)
    kept.append(torch.ones(100))  # lies behind it where both come from malloc, which then fills the hole badly
    del tensor
print(peak() - before)
"""


def test_what_is_read_and_dropped_does_not_count(tmp_path: Path) -> None:
    size = 10 * 2**20
    content = {f"t{i}": torch.zeros(size // 4) for i in range(20)}
    content["t7"][:] = torch.arange(size // 4)
    write(tmp_path / "out", content)
    script = [sys.executable, "-c", PEAK, str(tmp_path / "out")]
    done = subprocess.run(script, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) <= size // 2, "200 MiB were read, and each tensor was dropped before the next"


def open_files() -> list[str]:
    return [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]


def test_shards_are_opened_once_and_closed_with_the_reader(tmp_path: Path) -> None:
    def held() -> int:
        return sum(name.startswith(str(tmp_path)) for name in open_files())

    write(tmp_path / "out", *split(tensors(4), 2))
    with CheckpointReader(tmp_path / "out") as reader:
        for name in reader:
            reader.read(name)
        assert held() == 2
    assert held() == 0
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00002\.safetensors: tensor t0 cannot be read: the reader"
    ):
        reader.read("t0")
    reader = CheckpointReader(tmp_path / "out")
    assert held() == 2
    del reader
    assert held() == 0
    tensor_infos((tmp_path / "out").glob("*.safetensors"))
    (tmp_path / "out" / "model-00002-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        CheckpointReader(tmp_path / "out")
    assert held() == 0


def test_threads_and_forked_processes_do_not_disturb_each_other(tmp_path: Path) -> None:
    content = {f"t{i}": torch.full((1000,), i) for i in range(50)}
    reader = CheckpointReader(write(tmp_path / "out", {**content, "large": torch.ones(2**20)}))
    wrong: list[str] = []

    def check() -> None:
        wrong.extend(name for _ in range(10) for name in content if not torch.equal(reader.read(name), content[name]))

    large = reader.read("large")
    child = os.fork()
    if child == 0:
        large.numpy()[:] = 0  # a copy of the child's own; torch's threads do not survive a fork
        check()
        os._exit(len(wrong))
    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert not wrong
    assert large.all()


def test_reads_that_stop_short_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr("os.preadv", lambda handle, parts, at: real(handle, [parts[0][:7]], at))
    content = tensors(3)
    reader = CheckpointReader(write(tmp_path / "out", content))
    for name in content:
        assert torch.equal(reader.read(name), content[name])


def test_file_that_shrinks_while_it_is_open(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path / "out", tensors(2)))
    file = tmp_path / "out" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    reader.read("t0")
    with pytest.raises(CheckpointError, match=r"safetensors: tensor t1 cannot be read: it ends 1 bytes early"):
        reader.read("t1")


def test_tensor_in_two_files_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"t": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tensor t is in a\.safetensors and in b\.safetensors"):
        CheckpointReader(tmp_path)


def test_reading_an_unknown_tensor_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor t1 is missing"):
        CheckpointReader(write(tmp_path / "out", tensors(1))).read("t1")


def test_folder_with_an_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / STAGING).mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json; it holds an unfinished run: repeat its command"):
        CheckpointReader(tmp_path)


def test_tensor_infos_reads_headers_of_files(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2, 3)}, file)
    assert tensor_infos([file]) == {"a": ((2, 3), torch.float32, str(file), 24, file.stat().st_size - 24)}


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
