"""Asks a loader, in a process and an environment of its own, for the logits that it computes from a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError, SpecError
from llmq.loaders import SCRIPTS, command

_TAIL = 2**16  # bytes of what a process printed that are looked at
# loaders that read no packed folder: the export that they do read, and its name
EXPORTED = {"llamacpp": ("gguf", "model.gguf"), "onnxruntime": ("onnx", "onnx")}


@dataclass(frozen=True)
class Loader:
    """A loader, and the Python of the environment that it lives in."""

    name: str
    python: str = sys.executable

    @classmethod
    def parse(cls, text: str) -> Loader:
        """Return what ``name`` or ``name=path/to/python`` says.

        Raises:
            SpecError: there is no such loader or no such file.
        """
        name, _, python = text.strip().partition("=")
        if name not in SCRIPTS:
            raise SpecError(f"--loaders {name}: unknown; there are {', '.join(SCRIPTS)}")
        if python and not os.access(python, os.X_OK):
            raise SpecError(f"--loaders {name}={python}: no such program; name the Python of an environment")
        return cls(name, python or sys.executable)


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    versions: dict[str, str] = field(default_factory=dict)
    refused: str | None = None  # the loader's own words; None: it has loaded
    dtype: str = "float32"  # that it computes in
    notes: list[str] = field(default_factory=list)
    logits: Tensor | None = None  # float32 [B, P, V]
    new: list[int] = field(default_factory=list)  # tokens that it went on with after the first row
    peak_memory_bytes: int | None = None


def call(loader: Loader, model: Path, ids: Tensor, *, new: int, seconds: float) -> Outcome:
    """Return what `loader` makes of `model`, a folder or what the loader reads, in at most `seconds`.

    Args:
        loader: who.
        model: what.
        ids: int64 [B, L].
        new: how many tokens to go on with after the first row.
        seconds: after that the process is killed, and its children.
    """
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="llmq-verify-") as folder:
        source, target = Path(folder, "in.npz"), Path(folder, "out.npz")
        np.savez(source, ids=ids.numpy(), new=np.int64(new))
        arguments = command(loader.name, model.absolute(), source, target)
        code, output, errors = _run([loader.python, *arguments], Path(folder), seconds)
        result = _last_json(output)
        if result is None:
            return Outcome(refused=_why(code, errors, seconds))
        known = {
            key: result[key] for key in ("versions", "dtype", "notes", "new", "peak_memory_bytes") if key in result
        }
        if not result["loaded"]:
            return Outcome(refused=str(result["refused"]), **known)
        if not target.exists():
            return Outcome(refused=f"{_why(code, errors, seconds)} and no logits", **known)
        with np.load(target) as found:
            return Outcome(logits=torch.from_numpy(found["logits"]), **known)


def _run(program: list[str], folder: Path, seconds: float) -> tuple[int | None, str, str]:
    """Return exit code, None if time was up, and the ends of what the process printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    if program[0] != sys.executable:
        environment.pop("PYTHONPATH", None)  # of this environment, not of that one
    code: int | None
    with Path(folder, "stdout").open("w+b") as output, Path(folder, "stderr").open("w+b") as errors:
        process = subprocess.Popen(
            program, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
        return code, *(_end(file) for file in (output, errors))  # type: ignore[return-value]


def _end(file: Any) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
    return bytes(file.read()).decode(errors="replace")


def _last_json(output: str) -> dict[str, Any] | None:
    """Return the last object that was printed on a line of its own and is a result."""
    for line in reversed(output.splitlines()):
        if not line.startswith("{"):
            continue
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "loaded" in found:
            return found
    return None


def _why(code: int | None, errors: str, seconds: float) -> str:
    """Return why there is no result."""
    if code is None:
        return f"no answer in {seconds:g} seconds"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    said = f": {lines[-1][:300]}" if lines else ""
    return f"killed by signal {-code}{said}" if code < 0 else f"exit code {code}{said}"


def with_model(loader: Loader, folder: Path, scratch: Path) -> Path:
    """Return what `loader` is to load: the packed `folder`, or what `EXPORTED` says, made of it in `scratch`.

    Raises:
        LlmqError: such a thing cannot be made.
    """
    if loader.name not in EXPORTED:
        return folder
    from llmq.exports import EXPORTS
    from llmq.packed import PackedCheckpoint

    format, name = EXPORTED[loader.name]
    target = scratch / name
    if not target.exists():
        EXPORTS[format].export(PackedCheckpoint(folder), target)
    return target


def ask(loader: Loader, folder: Path, ids: Tensor, *, new: int, seconds: float) -> Outcome:
    """Return what `loader` makes of a packed `folder`, see `call`; what llmq refuses to convert is refused."""
    with tempfile.TemporaryDirectory(prefix="llmq-verify-") as scratch:
        try:
            model = with_model(loader, folder, Path(scratch))
        except LlmqError as error:
            return Outcome(refused=f"llmq: {error}")
        return call(loader, model, ids, new=new, seconds=seconds)
