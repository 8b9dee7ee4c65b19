"""Checkpoints to write, writers to stop, and processes to kill."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmq.writing import CheckpointWriter, Slot

CONFIG = {"model_type": "tiny", "name": "größer"}
FULL = OSError(errno.ENOSPC, "No space left on device")


def tensors(count: int, size: int = 10, seed: int = 0) -> dict[str, Tensor]:
    """Return `count` float32 tensors of `size` entries each."""
    generator = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(size, generator=generator) for i in range(count)}


def layout(content: dict[str, Tensor]) -> dict[str, Slot]:
    return {name: Slot(tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}


def write(
    folder: Path, content: dict[str, Tensor], shard_bytes: int = 10**9, *, force: bool = False, **finish: Any
) -> None:
    with CheckpointWriter(folder, force=force) as writer:
        writer.allocate(layout(content), shard_bytes)
        for name, tensor in content.items():
            writer.write(name, tensor)
        close(writer, **finish)


def close(writer: CheckpointWriter, **finish: Any) -> None:
    writer.finish(
        finish.get("config", CONFIG), finish.get("json_files", {"report.json": {"a": 1}}), finish.get("copies", [])
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def loaded(folder: Path) -> dict[str, Tensor]:
    """Return all tensors, by safetensors' own loader."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


class Stopped(BaseException):
    """What tests raise where a process may be stopped."""


MODULES = {"os": os, "shutil": shutil}
MOVES = ("os.replace", "os.fsync", "os.unlink", "os.rmdir", "shutil.copyfile", "os.pwrite", "os.posix_fallocate")


@contextmanager
def stopped_at(step: int, error: BaseException, calls: tuple[str, ...] = MOVES) -> Iterator[list[str]]:
    """Let the `step`-th of all `calls` of os or shutil raise `error`; yield what is called."""
    seen: list[str] = []

    def counting(call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            seen.append(call)
            if len(seen) == step:
                raise error
            return real(*arguments, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for call in calls:
            module, name = call.split(".")
            patch.setattr(MODULES[module], name, counting(call, getattr(MODULES[module], name)))
        yield seen


def steps_of(action: Callable[[], None], calls: tuple[str, ...] = MOVES) -> int:
    with stopped_at(0, Stopped(), calls) as seen:
        action()
    assert len(set(seen)) == len(calls), f"of {calls} there are only {set(seen)}"
    return len(seen)


def unfinished(folder: Path, content: dict[str, Tensor], written: int, shard_bytes: int = 1) -> None:
    """Leave the writer of `content` after its first tensors."""
    with CheckpointWriter(folder, force=True) as writer:
        writer.allocate(layout(content), shard_bytes)
        for name in list(content)[:written]:
            writer.write(name, content[name])
        writer.sync()


def script(source: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        **options,
    )
