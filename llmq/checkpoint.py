"""Checkpoint folders: a lazy reader over sharded safetensors, and a writer whose output is whole or no checkpoint.

The reader opens headers only and hands out single tensors; every way a folder can be wrong is found when it is
opened, not hours later. The writer stages all files in a folder of its own inside the output, and moves them up when
the last one is on the disk, config.json last: a folder without config.json is not a checkpoint, and every reader says
so.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmq.errors import CheckpointError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STAGING = "unfinished.llmq-partial"  # folder inside the output with everything that is not finished
FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str  # name of the shard
    nbytes: int


class CheckpointReader:
    """A checkpoint folder, opened: config.json read, all headers checked, tensors read when asked for.

    Raises:
        CheckpointError: the folder, config.json or a shard is missing, truncated or corrupt.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such folder; give a checkpoint folder or a hub id like org/name")
        if not (self.path / CONFIG).is_file():
            unfinished = (self.path / STAGING).is_dir()
            hint = "it holds an unfinished run: quantize again" if unfinished else "every checkpoint folder has one"
            raise CheckpointError(f"{self.path}: not a checkpoint, it has no {CONFIG}; {hint}")
        self.config: dict[str, Any] = _read_json(self.path / CONFIG)
        self._files = {name: _open(self.path / name) for name in self._shards()}
        self._infos = _infos(self._files)
        self._check_index()

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def keys(self) -> list[str]:
        """Return the names of all tensors, in the order of the shards."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype, shard and size of tensor `name`."""
        return self._infos[name]

    def read(self, name: str) -> Tensor:
        """Return tensor `name`, on the CPU, as stored.

        Raises:
            CheckpointError: the tensor does not exist or cannot be read.
        """
        if name not in self._infos:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; the checkpoint is incomplete")
        info = self._infos[name]
        try:
            tensor: Tensor = self._files[info.file].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / info.file}: tensor {name} cannot be read: {error}") from error
        return tensor

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
                raise CheckpointError(f"{self.path / INDEX}: shard {name!r} is not a plain file name")
            if not (self.path / name).is_file():
                raise CheckpointError(f"{self.path / INDEX} names shard {name}, which is missing; download it again")
        if not names:
            foreign = sorted(p.name for p in self.path.iterdir() if p.suffix in FOREIGN_WEIGHTS)
            found = f" (found {foreign[0]}; convert it with save_pretrained)" if foreign else ""
            raise CheckpointError(f"{self.path}: no .safetensors file{found}")
        return names

    def _weight_map(self) -> dict[str, str]:
        weight_map = _read_json(self.path / INDEX).get("weight_map")
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


class CheckpointWriter:
    """Writes a checkpoint folder shard by shard; use it as a context manager.

    Leaving the block by an exception, Ctrl-C included, removes what was written. After a kill the unfinished files
    remain in the folder `STAGING`, and there is no config.json beside it; the next writer removes them.

    Args:
        path: folder to write, made if missing.
        shard_bytes: size limit of one file; a single larger tensor gets a file of its own.
        force: replace the checkpoint that is there. It stays as it is until every file of the new one is on the disk.

    Raises:
        CheckpointError: the folder holds something and `force` is not set, or cannot be written.
    """

    def __init__(self, path: str | Path, shard_bytes: int, *, force: bool = False) -> None:
        self.path = Path(path)
        self._staging = self.path / STAGING
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[dict[str, int]] = []  # per shard: tensor name -> bytes
        self._placed: list[str] = []  # files that have been moved to where they belong
        check_free(self.path, force=force)
        self._made = not self.path.exists()
        with _disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                shutil.rmtree(self._staging, ignore_errors=True)
                self._staging.mkdir()
            except BaseException:
                self.abort()
                raise

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.abort()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Append `tensors`; they reach the disk when a shard is full.

        Raises:
            CheckpointError: a name was added before, or the disk does not take the shard.
        """
        for name, tensor in tensors.items():
            if name in self._pending or any(name in shard for shard in self._shards):
                raise CheckpointError(f"{self.path}: tensor {name} is written twice")
            if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
                self._flush()
            self._pending[name] = tensor.detach().contiguous().cpu()
            self._pending_bytes += tensor.nbytes

    def finish(self, config: Mapping[str, object], json_files: Mapping[str, object], copies: list[Path]) -> None:
        """Write the last shard, index, `json_files` by name, `copies` and config.json: now it is a checkpoint.

        Raises:
            CheckpointError: the disk does not take a file.
        """
        self._flush()
        names = self._shard_names()
        with _disk_errors(self.path):
            for position, name in enumerate(names):
                os.replace(self._staged_shard(position), self._staging / name)
            for source in copies:
                shutil.copyfile(source, self._staging / source.name)
                _sync(self._staging / source.name)
            if len(names) > 1:
                self._write_json(INDEX, self._index(names))
            for name, content in json_files.items():
                self._write_json(name, content)
            self._write_json(CONFIG, config)
            self._place()

    def abort(self) -> None:
        """Remove everything that this writer wrote, and the folder if it made it and nothing else is in it."""
        self._pending = {}
        for name in reversed(self._placed):  # config.json first
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self._staging, ignore_errors=True)
        if self._made and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _place(self) -> None:
        """Move the staged files to where they belong: renames only, which no full disk can stop."""
        # an older checkpoint ends here: it has no config.json from now until the new one is complete
        (self.path / CONFIG).unlink(missing_ok=True)
        (self.path / INDEX).unlink(missing_ok=True)
        for old in self.path.glob("*.safetensors"):
            old.unlink()
        for name in sorted((file.name for file in self._staging.iterdir()), key=lambda name: (name == CONFIG, name)):
            if name == CONFIG:
                _sync(self.path)
            self._placed.append(name)
            os.replace(self._staging / name, self.path / name)
        self._staging.rmdir()
        _sync(self.path)

    def _flush(self) -> None:
        if not self._pending:
            return
        shard = self._staged_shard(len(self._shards))
        with _disk_errors(self.path):
            # by way of a nameless file beside it, which would outlive a kill anywhere but in the staging folder
            save_file(self._pending, shard, metadata={"format": "pt"})
            shard.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
            _sync(shard)
        self._shards.append({name: tensor.nbytes for name, tensor in self._pending.items()})
        self._pending, self._pending_bytes = {}, 0

    def _staged_shard(self, position: int) -> Path:
        return self._staging / f"model-{position + 1:05d}.safetensors"

    def _shard_names(self) -> list[str]:
        count = len(self._shards)
        return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]

    def _index(self, names: list[str]) -> dict[str, object]:
        total = sum(sum(shard.values()) for shard in self._shards)
        placed = {key: name for name, shard in zip(names, self._shards, strict=True) for key in shard}
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}

    def _write_json(self, name: str, content: object) -> None:
        file = self._staging / name
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _sync(file)


def check_free(path: str | Path, *, force: bool = False) -> None:
    """Check that a checkpoint may be written to folder `path`, without making or changing anything.

    Raises:
        CheckpointError: it is not a folder, or it holds something and `force` is not set.
    """
    path = Path(path)
    with _disk_errors(path):
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path}: exists and is not a folder; choose another --output")
        if not force and path.exists() and any(entry.name != STAGING for entry in path.iterdir()):
            raise CheckpointError(f"{path}: exists and is not empty; choose another --output or pass --force")


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
    return _infos({str(file): _open(Path(file)) for file in files})


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or corrupt ({error}); download it again") from error


def _infos(files: Mapping[str, Any]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for name, file in files.items():
        for key in file.keys():  # noqa: SIM118  not a dict
            if key in found:
                raise CheckpointError(f"tensor {key} is in {found[key].file} and in {name}; keep one of the files")
            found[key] = _info(file, key, name)
    return found


def _info(file: Any, key: str, name: str) -> TensorInfo:
    entry = file.get_slice(key)
    shape, code = tuple(entry.get_shape()), entry.get_dtype()
    if code not in _DTYPES:
        raise CheckpointError(f"{name}: tensor {key} has dtype {code}, which torch {torch.__version__} cannot read")
    size = _DTYPES[code].itemsize
    for extent in shape:
        size *= extent
    return TensorInfo(shape, _DTYPES[code], name, size)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a JSON object")
    return content


def _umask() -> int:
    """Return the process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Force file or folder `path` to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a full, read-only or missing disk into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))  # how safetensors passes it on
        code = int(number[1]) if number else getattr(error, "errno", None)
        advice = "choose another --output"
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "the disk is full; make space or choose another --output"
        elif code in (errno.EROFS, errno.EACCES, errno.EPERM):
            advice = "it is read-only, or belongs to somebody else; choose another --output"
        raise CheckpointError(f"{path}: cannot be written: {error}; {advice}") from error
