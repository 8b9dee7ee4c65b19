"""What every writer needs: errors of the disk as one sentence that says what to do, and the way to its platters."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from llmq.errors import CheckpointError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a full, read-only or missing disk into one sentence about `path`.

    Raises:
        CheckpointError: what was done within failed.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))  # how safetensors passes it on
        code = int(number[1]) if number else getattr(error, "errno", None)
        advice = "choose another --output"
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = (
                "the disk is full; make space and run the same command again (it goes on where it stopped) or choose "
                "another --output"
            )
        elif code in (errno.EROFS, errno.EACCES, errno.EPERM):
            advice = "it is read-only, or belongs to somebody else; choose another --output"
        raise CheckpointError(f"{path}: cannot be written: {error}; {advice}") from error


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to file `path`; when this returns, it survives a power failure if its folder's entry does.

    Raises:
        OSError: the disk does not take it.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to file `path`, which is the old one or the new one, whole, at every instant.

    Raises:
        OSError: the disk does not take it.
    """
    if path.exists() and not path.is_file():  # a device or a pipe is written to, not replaced
        path.write_bytes(content)
        return
    new = path.with_name(f"{path.name}.new")
    write_file(new, content)
    os.replace(new, path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Force file or folder `path` to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
