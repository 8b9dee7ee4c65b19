"""What a run has finished, on the disk the moment it is finished, so that a killed run goes on where it was.

The journal is a file of JSON lines in the staging folder, only ever appended to, each line forced to the disk before
the run goes on. Tensors that a later step needs (a stage's codes, end-loss weights) are files beside it, whole before
a line speaks of them. A line that a kill or a power failure tore is the last one, and is cut off.

The first line is the run's identity: model, recipe, calibration, versions and machine. A run that differs in any of
them would give other bytes, so it does not continue this one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.disk import disk_errors, sync_path
from llmq.errors import CheckpointError
from llmq.ranks import ALONE, Ranks
from llmq.shards import HeaderError, read_tensors, write_tensors

_FILE = "journal.jsonl"


class Journal:
    """The finished steps of the run in a staging folder.

    Args:
        folder: the staging folder.
        ranks: who shares the run. The first of them reads and writes; the others keep the same records in memory.
    """

    def __init__(self, folder: Path, ranks: Ranks = ALONE) -> None:
        self.folder = folder
        self._ranks = ranks
        self._path = folder / _FILE
        self.records: list[dict[str, Any]] = []
        if ranks.first and self._path.is_file():
            self._read()
        self.records = ranks.broadcast(self.records)

    @property
    def begun(self) -> bool:
        """Whether there is a run to continue."""
        return bool(self.records)

    def check(self, identity: Mapping[str, object]) -> None:
        """Check that the run here, if there is one, agrees with these entries of an identity.

        Raises:
            CheckpointError: it does not; every entry that differs is named.
        """
        if not self.begun:
            return
        mine = {name: value for name, value in self.records[0]["identity"].items() if name in identity}
        different = differences(mine, json.loads(json.dumps(identity)), "")
        if different:
            raise CheckpointError(
                f"{self.folder.parent}: holds an unfinished run that differs in {'; '.join(different)}; repeat it with "
                "the same settings to finish it, choose another --output, or pass --force to start over"
            )

    def begin(self, identity: Mapping[str, object]) -> None:
        """Write down who runs here, unless a run is being continued.

        Raises:
            CheckpointError: the run here is another one, or the disk does not take it.
        """
        self.check(identity)
        if not self.begun:
            self.append("run", identity=identity)

    def append(self, kind: str, **content: object) -> None:
        """Add a record; when this returns, it survives a power failure.

        Raises:
            CheckpointError: the disk does not take it.
        """
        line = json.dumps({"kind": kind, **content}, separators=(",", ":"))
        if self._ranks.first:
            self._write(line)
        self.records.append(json.loads(line))

    def find(self, kind: str, **where: object) -> dict[str, Any] | None:
        """Return the last record of this kind with these entries."""
        wanted = {"kind": kind, **where}.items()
        return next((record for record in reversed(self.records) if wanted <= record.items()), None)

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Return all records of this kind, in order."""
        return [record for record in self.records if record["kind"] == kind]

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors` as file `name`, which replaces an older one whole.

        Raises:
            CheckpointError: the disk does not take them.
        """
        if not self._ranks.first:
            return
        partial = self._tensors(f"{name}.new")
        with disk_errors(self.folder.parent):
            with partial.open("wb") as file:
                write_tensors(file.fileno(), tensors)
                os.fsync(file.fileno())
            os.replace(partial, self._tensors(name))
            sync_path(self.folder)

    def load(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of file `name`.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        try:
            with self._tensors(name).open("rb") as file:
                return read_tensors(file.fileno())
        except (OSError, HeaderError) as error:
            raise CheckpointError(
                f"{self._tensors(name)}: cannot be read ({error}); pass --force to start over"
            ) from error

    def drop(self, name: str) -> None:
        """Remove file `name`, if it is there."""
        if self._ranks.first:
            self._tensors(name).unlink(missing_ok=True)

    def _write(self, line: str) -> None:
        with disk_errors(self.folder.parent):
            new = not self._path.exists()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync_path(self.folder)

    def _tensors(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _read(self) -> None:
        """Read the records; cut off what follows the last whole line."""
        with disk_errors(self.folder.parent):
            content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        try:
            self.records = [json.loads(line) for line in content[:whole].splitlines()]
        except ValueError as error:
            raise CheckpointError(f"{self._path}: is damaged ({error}); pass --force to start over") from error
        if whole < len(content):
            with disk_errors(self.folder.parent):
                os.truncate(self._path, whole)


def differences(there: object, now: object, name: str) -> list[str]:
    """Return what differs between two JSON values that are called `name`, entry by entry."""
    if isinstance(there, dict) and isinstance(now, dict):
        found: list[str] = []
        for key in dict.fromkeys([*there, *now]):
            found += differences(there.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        return found
    return [] if there == now else [f"{name} ({_short(there)} there, {_short(now)} now)"]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}…"
