"""Checkpoint folders, read: config.json and sharded safetensors, whose tensors are fetched one by one.

The reader opens headers only and hands out single tensors; every way a folder can be wrong is found when it is
opened, not hours later. A folder without config.json is not a checkpoint: `llmq.writing` puts it there last.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmq.errors import CheckpointError
from llmq.shards import LARGEST_JSON, DtypeError, Entry, HeaderError, parse_json, read_bytes, read_header, read_tensor

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
QUANTIZATION = "quantization_config"  # key of config.json
LEGACY_CONFIG = "quantize_config.json"  # where older tools look for the quantization_config of gptq
SINGLE = "model.safetensors"
STAGING = ".llmq-partial"  # folder inside the output with everything that is not finished
FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")
_PIECE = 64 * 2**20  # bytes of a large tensor that are read at a time


class TensorInfo(NamedTuple):
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str  # name of the shard
    nbytes: int
    offset: int  # of its first byte in the shard


class CheckpointReader:
    """A checkpoint folder, opened: config.json read, all headers checked, tensors read when asked for.

    Tensors come in memory of their own, which is free again when they are dropped. May be read by several threads, and
    by processes forked from this one. The shards stay open until `close`, the end of its context, or of its life.

    Raises:
        CheckpointError: the folder, config.json or a shard is missing, truncated or corrupt.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such folder; give a checkpoint folder or a hub id like org/name")
        if not (self.path / CONFIG).is_file():
            unfinished = (self.path / STAGING).is_dir()
            hint = "every checkpoint folder has one"
            if unfinished:
                hint = "it holds an unfinished run: repeat its command to finish it"
            raise CheckpointError(f"{self.path}: not a checkpoint, it has no {CONFIG}; {hint}")
        self.config: dict[str, Any] = read_json(self.path / CONFIG)
        self._handles: dict[str, int] = {}
        self.close = weakref.finalize(self, _close, self._handles)
        self._infos: dict[str, TensorInfo] = {}
        for name in self._shards():
            self._handles[name] = _open(self.path / name)
            _add(self._infos, name, _header(self._handles[name], self.path / name))
        self._check_index()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def keys(self) -> list[str]:
        """Return the names of all tensors, in the order of the shards."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype, shard and size of tensor `name`."""
        return self._infos[name]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return tensor `name`, or only `rows` of its first dimension, on the CPU, as stored.

        Raises:
            CheckpointError: the tensor does not exist or cannot be read.
        """
        if name not in self._infos:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; the checkpoint is incomplete")
        return self._fetch(name, self._infos[name], rows)

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield tensor `name` some rows of its first dimension at a time, each time with the number of the first.

        Raises:
            CheckpointError: the tensor does not exist or cannot be read.
        """
        info = self._infos.get(name)
        if info is None or info.nbytes <= _PIECE or not info.shape:
            yield 0, self.read(name)
            return
        rows = max(1, _PIECE * info.shape[0] // info.nbytes)
        for start in range(0, info.shape[0], rows):
            yield start, self.read(name, slice(start, start + rows))

    def _fetch(self, name: str, info: TensorInfo, rows: slice | None) -> Tensor:
        """Return what lies where `info` says."""
        file = self.path / info.file
        if info.file not in self._handles:
            raise CheckpointError(f"{file}: tensor {name} cannot be read: the reader was closed")
        try:
            return read_tensor(self._handles[info.file], Entry(info.shape, info.dtype, info.nbytes, info.offset), rows)
        except (OSError, HeaderError) as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read: {error}") from error

    def _shards(self) -> list[str]:
        """Return the file names of the shards."""
        if (self.path / INDEX).is_file():
            names = sorted(set(self._weight_map().values()))
        elif (self.path / SINGLE).is_file():
            names = [SINGLE]
        else:
            names = sorted(p.name for p in self.path.glob("*.safetensors"))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{self.path / INDEX}: shard {name[:200]!r} is not a plain file name")
            if not _is_file(self.path / name):
                raise CheckpointError(
                    f"{self.path / INDEX} names shard {name[:200]!r}, which is missing; download it again"
                )
        if not names:
            foreign = sorted(p.name for p in self.path.iterdir() if p.suffix in FOREIGN_WEIGHTS)
            found = f" (found {foreign[0]}; convert it with save_pretrained)" if foreign else ""
            raise CheckpointError(f"{self.path}: no .safetensors file{found}")
        return names

    def _weight_map(self) -> dict[str, str]:
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{self.path / INDEX}: has no weight_map of tensor names to files")
        return weight_map

    def _check_index(self) -> None:
        """Check that every tensor of the index is where the index says."""
        if not (self.path / INDEX).is_file():
            return
        for key, name in self._weight_map().items():
            if key not in self._infos or self._infos[key].file != name:
                raise CheckpointError(f"{self.path / INDEX}: tensor {key} is not in {name}; download it again")


class ShardReader:
    """Files whose headers are `infos` (`tensor_infos`), each opened once, until the end of the context."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self._infos = infos
        self._handles: dict[str, int] = {}

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _close(self._handles)

    def read(self, name: str) -> Tensor:
        """Return tensor `name`; errors as for `read_alike`."""
        return self.read_alike([name])[0]

    def read_alike(self, names: Sequence[str]) -> Tensor:
        """Return the tensors `names`, all of one shape and dtype, as one with a first dimension more.

        Raises:
            CheckpointError: one cannot be read.
        """
        first = self._infos[names[0]]
        raw = torch.empty(len(names) * first.nbytes, dtype=torch.uint8, device="cpu")
        content = raw.numpy().data
        for number, name in enumerate(names):
            info = self._infos[name]
            if info.file not in self._handles:
                self._handles[info.file] = _open(Path(info.file))
            at = number * first.nbytes
            try:
                read_bytes(self._handles[info.file], content[at : at + first.nbytes], info.offset)
            except (OSError, HeaderError) as error:
                raise CheckpointError(f"{info.file}: tensor {name} cannot be read: {error}") from error
        return raw.view(first.dtype).view(len(names), *first.shape)


def resolve(model: str | Path) -> Path:
    """Return the folder of `model`: itself when it exists, else the hub's snapshot of that id, downloaded if needed.

    Raises:
        CheckpointError: neither a folder nor an id that the hub (or its local cache, when offline) has.
    """
    path = Path(model)
    if path.exists() or not _is_hub_id(str(model)):
        return path
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(model), ignore_patterns=[f"*{s}" for s in FOREIGN_WEIGHTS]))
    except Exception as error:  # the hub's errors share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model}: no such folder here, and the hub did not give it ({reason}); "
            "check the name and the connection, or download it elsewhere and pass the folder"
        ) from error


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(part and not part.startswith(".") for part in parts)


def tensor_infos(files: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """Return what the headers of safetensors `files` say, by tensor name.

    Raises:
        CheckpointError: a file is truncated or corrupt, or two hold the same tensor.
    """
    found: dict[str, TensorInfo] = {}
    for file in files:
        handle = _open(Path(file))
        try:
            _add(found, str(file), _header(handle, Path(file)))
        finally:
            os.close(handle)
    return found


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of the dense model, also where the text model in it has what is left out."""
    dense = {key: value for key, value in config.items() if key != QUANTIZATION}
    if isinstance(text := dense.get("text_config"), dict):
        dense["text_config"] = {key: value for key, value in text.items() if key != QUANTIZATION}
    return dense


def read_from(infos: Mapping[str, TensorInfo], name: str, rows: slice | None = None) -> Tensor:
    """Return tensor `name`, or `rows` of its first dimension, of the files whose headers are `infos` (`tensor_infos`).

    Raises:
        CheckpointError: it cannot be read.
    """
    info = infos[name]
    handle = _open(Path(info.file))
    try:
        return _read(handle, name, info, rows)
    finally:
        os.close(handle)


def _read(handle: int, name: str, info: TensorInfo, rows: slice | None = None) -> Tensor:
    """Return tensor `name`, which is where `info` says, of the open file `handle`."""
    try:
        return read_tensor(handle, Entry(info.shape, info.dtype, info.nbytes, info.offset), rows)
    except (OSError, HeaderError) as error:
        raise CheckpointError(f"{info.file}: tensor {name} cannot be read: {error}") from error


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error


def _close(handles: dict[str, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])


def _header(handle: int, path: Path) -> dict[str, Entry]:
    try:
        return read_header(handle)
    except DtypeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (HeaderError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt ({error}); download it again") from error


def _add(found: dict[str, TensorInfo], file: str, entries: dict[str, Entry]) -> None:
    """Add the tensors of one file to those of others."""
    for key, entry in entries.items():
        if key in found:
            raise CheckpointError(f"tensor {key} is in {found[key].file} and in {file}; keep one of the files")
        found[key] = TensorInfo(entry.shape, entry.dtype, file, entry.nbytes, entry.offset)


def _is_file(path: Path) -> bool:
    """Whether there is a file of that name, which may be none that a file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: it holds something else, or is too large for what it is.
    """
    try:
        with path.open("rb") as file:
            content = parse_json(file.read(LARGEST_JSON + 1))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a JSON object")
    return content
