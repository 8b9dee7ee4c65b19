"""SHA-256 of every file of a folder, and of every tensor in it, so that damage can be told and placed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmq.checkpoint import CheckpointReader
from llmq.errors import CheckpointError
from llmq.shards import Entry, HeaderError, read_header, read_tensor

CERTIFICATE = "certificate.json"
_PIECE = 2**24  # bytes


def sign_files(folder: Path, apart_from: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return `sha256` and `bytes` of every file below `folder`, by its path in there.

    Certificates, the file `apart_from`, and what begins with a dot (caches of downloads) are left out.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts) or str(name) == CERTIFICATE:
            continue
        if apart_from is not None and apart_from.exists() and path.samefile(apart_from):
            continue
        found[name.as_posix()] = {"sha256": _file_hash(path), "bytes": path.stat().st_size}
    return found


def sign_tensors(reader: CheckpointReader) -> dict[str, str]:
    """Return the sha256 of the bytes of every tensor, by name."""
    return {name: _tensor_hash(reader, name) for name in reader}


def check_signature(folder: Path, certificate: Mapping[str, Any], apart_from: Path | None = None) -> list[str]:
    """Return what is not as the certificate says, a line per file; empty if all is.

    Raises:
        CheckpointError: `certificate` is none, or a file cannot be read.
    """
    files, tensors = certificate.get("files"), certificate.get("tensors")
    if not isinstance(files, dict) or not isinstance(tensors, dict):
        raise CheckpointError("the certificate has no files or tensors; llmq verify --output writes one")
    there = sign_files(folder, apart_from)
    faults = [f"{name}: missing" for name in files if name not in there]
    faults += [f"{name}: not in the certificate" for name in there if name not in files]
    for name, signed in files.items():
        if name in there and there[name] != signed:
            where = f"; {_changed(folder / name, tensors)}" if name.endswith(".safetensors") else ""
            faults.append(f"{name}: sha256 differs{where}")
    return faults


def _changed(file: Path, tensors: Mapping[str, str]) -> str:
    """Return which tensors of a shard are not those that were signed."""
    try:
        with file.open("rb", buffering=0) as handle:
            entries = read_header(handle.fileno())
            changed = [n for n, entry in entries.items() if _hash_at(handle.fileno(), entry) != tensors.get(n)]
    except (HeaderError, OSError) as error:
        return f"it cannot be read: {error}"
    if not changed:
        return "no tensor in it does"
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f"tensor {changed[0]} does{more}"


def _hash_at(handle: int, entry: Entry) -> str:
    tensor = read_tensor(handle, entry)
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _tensor_hash(reader: CheckpointReader, name: str) -> str:
    found = hashlib.sha256()
    for _, rows in reader.pieces(name):
        found.update(_bytes(rows))
    return found.hexdigest()


def _bytes(tensor: Any) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _file_hash(path: Path) -> str:
    found = hashlib.sha256()
    for piece in _pieces(path):
        found.update(piece)
    return found.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
