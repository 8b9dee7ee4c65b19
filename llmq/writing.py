"""Checkpoint folders, written: in any order, over several processes if one is killed, whole or no checkpoint at all.

The whole output is laid out before work starts. Shards are files of their final size with their final header, and a
tensor goes to its place the moment it is there: nothing waits in memory, and a full disk is found in the first minute.
All of this is in a folder of its own inside the output. When everything is on the disk the files are moved up,
config.json last: a folder without config.json is not a checkpoint, and every reader says so. A process that is killed
leaves the folder as it is, and the next one goes on in it, even if the files were being moved.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.checkpoint import CONFIG, INDEX, SINGLE, STAGING
from llmq.disk import disk_errors, replace_file, sync_path, write_file
from llmq.errors import CheckpointError
from llmq.lock import LOCK, FolderLock
from llmq.shards import DTYPES, Entry, HeaderError, holds, make_header, read_tensor, reserve, write_tensor

_FILES = "files"  # folder inside the staging folder with what will be the output, under its final names
_MOVING = "moving.json"  # says which files are being moved up
_WRITTEN = "written.jsonl"  # names of the tensors that have reached the disk


class Slot(NamedTuple):
    """What a tensor of the output will be."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointWriter:
    """Writes a checkpoint folder tensor by tensor; use it as a context manager.

    The folder is locked until the end of the context. An exception within, Ctrl-C included, leaves what was written:
    another writer goes on there. `discard` removes it.

    Args:
        path: folder to write, made if missing.
        force: replace the checkpoint that is there. It stays as it is until every file of the new one is on the disk.

    Raises:
        CheckpointError: the folder holds something and `force` is not set, another process writes there, or it cannot
            be written.
    """

    def __init__(self, path: str | Path, *, force: bool = False) -> None:
        self.path = Path(path)
        self.staging = self.path / STAGING
        self._files = self.staging / _FILES
        self._places: dict[str, tuple[str, Entry]] = {}  # by tensor: shard, and where in it
        self._handles: dict[str, int] = {}  # of the shards
        self._unsynced: list[str] = []  # tensors
        self._written: set[str] = set()  # tensors that are on the disk
        check_free(self.path, force=force)
        self._made = not self.path.exists()
        with disk_errors(self.path):
            try:
                self._lock = FolderLock(self.staging)
            except BaseException:
                self._remove_if_made()
                raise
            try:
                _take_back(self.path)
                _check_empty(self.path, force=force)  # again: another process may have finished meanwhile
            except BaseException:
                self._remove_if_bare()
                self.close()
                raise

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def allocate(self, layout: Mapping[str, Slot], shard_bytes: int) -> bool:
        """Make the shards for the tensors of `layout`, in its order, or take over those of a killed run.

        Args:
            layout: every tensor of the output.
            shard_bytes: size limit of the tensors of one file; a single larger tensor gets a file of its own.

        Returns:
            whether all shards of this very layout were there, with what has been written to them.

        Raises:
            CheckpointError: the disk has no room for the output, or safetensors no name for a dtype.
        """
        assert not self._handles, "the shards are open"
        plan = self._plan(layout, shard_bytes)
        with disk_errors(self.path):
            self._files.mkdir(exist_ok=True)
            for stale in self._files.iterdir():
                if stale.name not in plan:
                    stale.unlink()
            for name in plan:
                self._handles[name] = os.open(self._files / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            missing = [name for name in plan if not holds(self._handles[name], *plan[name])]
            if missing:
                (self.staging / _WRITTEN).unlink(missing_ok=True)  # and not back after a power failure
            for folder in (self._files, self.staging, self.path):
                sync_path(folder)
            try:
                for name in missing:
                    reserve(self._handles[name], *plan[name])
            except BaseException:
                for name in missing:  # gives the room back
                    os.ftruncate(self._handles[name], 0)
                raise
            self._written = _read_written(self.staging / _WRITTEN) & set(layout)
        return not missing

    def write(self, name: str, tensor: Tensor, start: int | None = None) -> None:
        """Write a tensor to its place, over what was written there before.

        Args:
            name: of the tensor in the layout.
            tensor: all of it or, with `start`, some of its rows.
            start: number of the first of these rows. A tensor counts as written with its last row.

        Raises:
            CheckpointError: it is not in the layout, or other there, or the disk does not take it.
        """
        if name not in self._places:
            raise CheckpointError(f"{self.path}: tensor {name} has no place in the output")
        shard, place = self._places[name]
        shape, offset, last = place.shape, place.offset, True
        if start is not None and shape:
            shape = (min(len(tensor), shape[0] - start), *shape[1:])
            offset += start * (place.nbytes // max(1, place.shape[0]))
            last = start + len(tensor) == place.shape[0]
        if (tuple(tensor.shape), tensor.dtype) != (shape, place.dtype):
            rows = "" if start is None else f" from row {start} on"
            raise CheckpointError(
                f"{self.path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}{rows}, its place is for "
                f"{place.dtype} {list(place.shape)}"
            )
        with disk_errors(self.path):
            write_tensor(self._handles[shard], tensor.detach(), offset)
        if last:
            self._unsynced.append(name)

    def read(self, name: str) -> Tensor:
        """Return a tensor that was written.

        Raises:
            CheckpointError: the disk does not give it back.
        """
        shard, place = self._places[name]
        try:
            return read_tensor(self._handles[shard], place)
        except (OSError, HeaderError) as error:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read back: {error}") from error

    def sync(self) -> None:
        """Force what was written to the disk; when this returns, it survives a power failure.

        Raises:
            CheckpointError: the disk does not take it.
        """
        with disk_errors(self.path):
            for shard in sorted({self._places[name][0] for name in self._unsynced}):
                os.fsync(self._handles[shard])
            new = dict.fromkeys(name for name in self._unsynced if name not in self._written)
            if new:
                with (self.staging / _WRITTEN).open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(name) + "\n" for name in new))
                    file.flush()
                    os.fsync(file.fileno())
        self._written.update(new)
        self._unsynced.clear()

    def finish(self, config: Mapping[str, object], files: Mapping[str, object], copies: list[Path]) -> None:
        """Write index, `files` by name, `copies` and config.json, and move all files up: it is a checkpoint.

        A file is given as its text, or as what its JSON says.

        Raises:
            CheckpointError: a tensor was never written, by this process or one before, or the disk does not take a
                file.
        """
        self.sync()
        missing = [name for name in self._places if name not in self._written]
        if missing:
            raise CheckpointError(
                f"{self.path}: tensor {missing[0]} was never written ({len(missing)} in all); the output is incomplete"
            )
        with disk_errors(self.path):
            for source in copies:
                shutil.copyfile(source, self._files / source.name)
                sync_path(self._files / source.name)
            if len(self._handles) > 1:
                _write_json(self._files / INDEX, self._index())
            for name, content in files.items():
                write_file(self._files / name, content.encode() if isinstance(content, str) else _json(content))
            _write_json(self._files / CONFIG, config)
            _move_up(self.path)
            _empty(self.staging)
            self._lock.remove_folder()
            sync_path(self.path)
        self.close()

    def clear(self) -> None:
        """Remove what an unfinished run left in the staging folder; before `allocate`.

        Raises:
            CheckpointError: the disk refuses.
        """
        assert not self._handles, "the shards are open"
        with disk_errors(self.path):
            _empty(self.staging)

    def discard(self) -> None:
        """Remove everything that is not finished, and the folder if this writer made it and nothing else is in it.

        Raises:
            CheckpointError: the disk refuses.
        """
        if not self._lock.held:
            return
        with disk_errors(self.path):
            _take_back(self.path)
            _empty(self.staging)
            self._remove_if_bare()
        self.close()

    def close(self) -> None:
        """Close the shards and unlock the folder; what was written stays, for another writer to go on."""
        while self._handles:
            os.close(self._handles.popitem()[1])
        self._lock.release()

    def _plan(self, layout: Mapping[str, Slot], shard_bytes: int) -> dict[str, tuple[bytes, int]]:
        """Give every tensor its place; return header and size of each shard."""
        shards: list[dict[str, Slot]] = []
        filled = 0
        for name, slot in layout.items():
            if slot.dtype not in DTYPES.values():
                raise CheckpointError(f"{self.path}: tensor {name} is {slot.dtype}, which safetensors cannot hold")
            nbytes = torch.Size(slot.shape).numel() * slot.dtype.itemsize
            if not shards or (shards[-1] and filled + nbytes > shard_bytes):
                shards.append({})
                filled = 0
            shards[-1][name] = slot
            filled += nbytes
        plan: dict[str, tuple[bytes, int]] = {}
        self._places = {}
        for position, shard in enumerate(shards or [{}]):
            count = max(1, len(shards))
            file = SINGLE if count == 1 else f"model-{position + 1:05d}-of-{count:05d}.safetensors"
            header, entries = make_header(shard)
            plan[file] = header, len(header) + sum(entry.nbytes for entry in entries.values())
            self._places |= {name: (file, entry) for name, entry in entries.items()}
        return plan

    def _index(self) -> dict[str, object]:
        total = sum(place.nbytes for _, place in self._places.values())
        return {
            "metadata": {"total_size": total},
            "weight_map": {name: self._places[name][0] for name in sorted(self._places)},
        }

    def _remove_if_bare(self) -> None:
        """Remove the staging folder if nothing but the lock is in it, and the output if this writer made it."""
        if [entry.name for entry in self.staging.iterdir()] != [LOCK]:
            return
        self._lock.remove_folder()
        self._remove_if_made()

    def _remove_if_made(self) -> None:
        """Remove the output folder if this writer made it and nothing is in it."""
        if self._made and self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()


def check_free(path: str | Path, *, force: bool = False) -> None:
    """Check that a checkpoint may be written to folder `path`, without making or changing anything of use.

    Where a writer was killed after its last step, while it cleaned up, this is done here.

    Raises:
        CheckpointError: it is not a folder, or it holds something besides an unfinished run and `force` is not set.
    """
    path = Path(path)
    with disk_errors(path):
        if _is_finished(path):
            lock = FolderLock(path / STAGING)
            try:
                if _is_finished(path):
                    _empty(lock.folder)
                    lock.remove_folder()
            finally:
                lock.release()
    _check_empty(path, force=force)


def _check_empty(path: Path, *, force: bool) -> None:
    with disk_errors(path):
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path}: exists and is not a folder; choose another --output")
        if force or not path.exists():
            return
        unfinished = {STAGING, *_moving(path)}
        if any(entry.name not in unfinished for entry in path.iterdir()):
            raise CheckpointError(f"{path}: exists and is not empty; choose another --output or pass --force")


def _read_written(file: Path) -> set[str]:
    """Return the names in a file that a kill may have torn; what follows the last whole line is cut off."""
    if not file.exists():
        return set()
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    os.truncate(file, whole)
    return {json.loads(line) for line in content[:whole].splitlines()}


def _write_json(file: Path, content: object) -> None:
    write_file(file, _json(content))


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _move_up(path: Path) -> None:
    """Move the finished files to where they belong: renames only, which no full disk can stop."""
    files, note = path / STAGING / _FILES, path / STAGING / _MOVING
    names = sorted((file.name for file in files.iterdir()), key=lambda name: (name == CONFIG, name))
    sync_path(files)
    replace_file(note, _json(names))
    # an older checkpoint ends here: it has no config.json from now until the new one is complete
    (path / CONFIG).unlink(missing_ok=True)
    (path / INDEX).unlink(missing_ok=True)
    for old in path.glob("*.safetensors"):
        old.unlink()
    for name in names:
        if name == CONFIG:
            sync_path(path)
        os.replace(files / name, path / name)
    sync_path(path)


def _moving(path: Path) -> list[str]:
    """Return the files of folder `path` that were being moved up when a writer was stopped; none if it was done."""
    files, note = path / STAGING / _FILES, path / STAGING / _MOVING
    if not note.is_file() or _is_finished(path):
        return []
    names: list[str] = json.loads(note.read_bytes())
    return [name for name in names if not (files / name).exists() and (path / name).exists()]


def _is_finished(path: Path) -> bool:
    """Return whether all files of folder `path` are in their places, and only the staging folder is to be removed."""
    staging = path / STAGING
    if not (path / CONFIG).is_file() or not staging.is_dir():
        return False
    if (staging / _MOVING).is_file():
        return not (staging / _FILES / CONFIG).exists()
    return all(entry.name == LOCK for entry in staging.iterdir())


def _take_back(path: Path) -> None:
    """Bring files that were being moved up back to the others, so that the run can be finished again.

    Where config.json had been moved the checkpoint is complete, and only the staging folder is cleaned.
    """
    files, note = path / STAGING / _FILES, path / STAGING / _MOVING
    if _is_finished(path):
        _empty(path / STAGING)
    for name in _moving(path):
        os.replace(path / name, files / name)
    if note.is_file():
        sync_path(files)
        note.unlink()


def _empty(staging: Path) -> None:
    """Remove what is in the staging folder but for the lock, and last the note on files that are being moved."""
    for entry in sorted(staging.iterdir(), key=lambda entry: entry.name == _MOVING):
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()
