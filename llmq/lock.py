"""One process at a time in a folder: a lock file that the kernel frees when its holder ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from llmq.errors import CheckpointError
from llmq.shards import write_bytes

LOCK = "lock"


class FolderLock:
    """Holds `folder`, made if missing, from the beginning of its life to `release` or the end of the process.

    Raises:
        CheckpointError: another process holds it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle: int | None = None
        while self._handle is None:
            self._handle = _try(folder)

    @property
    def held(self) -> bool:
        """Whether it has not been released yet."""
        return self._handle is not None

    def release(self) -> None:
        """Let others have the folder."""
        if self._handle is not None:
            fcntl.flock(self._handle, fcntl.LOCK_UN)  # closing alone would leave it to processes forked from this one
            os.close(self._handle)
            self._handle = None

    def remove_folder(self) -> None:
        """Remove the folder, in which nothing else may be, unless another process is about to use it."""
        (self.folder / LOCK).unlink()
        try:
            self.folder.rmdir()
        except OSError as error:  # the other one has made its lock file in it, or has gone again already
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise


def _try(folder: Path) -> int | None:
    """Return the lock file, open and locked; None: its holder removed it in this very moment."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:  # and the folder with it
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(handle, folder / LOCK):
            os.close(handle)
            return None
        _sign(handle, folder)
    except BlockingIOError as error:
        holder = os.pread(handle, 300, 0).decode("utf-8", "replace") or "not known yet"
        os.close(handle)
        raise CheckpointError(
            f"{folder.parent}: another llmq run ({holder}) is writing there; wait for it or choose another --output"
        ) from error
    except BaseException:
        os.close(handle)
        raise
    return handle


def _sign(handle: int, folder: Path) -> None:
    """Write into the lock who holds it; a full disk is not left with a lock and nothing else in the folder."""
    try:
        os.ftruncate(handle, 0)
        write_bytes(handle, f"pid {os.getpid()} on {os.uname().nodename}".encode(), 0)
    except BaseException:
        if [entry.name for entry in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()
        raise


def _is_at(handle: int, file: Path) -> bool:
    """Return whether the open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False
