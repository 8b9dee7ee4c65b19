"""Repaired copies: what a finding's repair says is done, everything else is copied as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint import CONFIG, INDEX, LEGACY_CONFIG, TensorInfo
from llmq.doctor import examine
from llmq.doctor.findings import Finding
from llmq.doctor.patient import Patient
from llmq.errors import CheckpointError, SpecError
from llmq.writing import CheckpointWriter, Slot


def fix(source: str | Path, output: str | Path, *, shard_bytes: int = 4 * 10**9, force: bool = False) -> list[Finding]:
    """Write a copy of the packed folder `source` to `output` without what can be repaired exactly; return that.

    What cannot be repaired is in the copy, too: `llmq.doctor.diagnose` says what is left.

    Raises:
        SpecError: nothing can be repaired.
        CheckpointError: `source` cannot be read, or `output` not be written.
    """
    patient = Patient(source)
    if Path(output).exists() and Path(output).samefile(patient.path):
        raise CheckpointError(f"{output}: is the folder to repair; choose another --fix")
    repaired = [finding for finding in examine(patient) if finding.repair is not None]
    if not repaired:
        raise SpecError(f"{patient.path}: nothing that can be repaired exactly; llmq doctor says what is known")
    repairs = [finding.repair for finding in repaired if finding.repair is not None]
    transposed = {key for repair in repairs for key in repair.transposed}
    indexed = {key: sizes for repair in repairs for key, sizes in repair.indexed.items()}
    layout = {key: Slot(_shape(info, turned=key in transposed), info.dtype) for key, info in patient.infos.items()}
    layout |= {key: Slot((k,), torch.int32) for key, (k, _) in indexed.items()}
    with CheckpointWriter(output, force=force) as writer:
        try:
            writer.clear()
            writer.allocate(layout, shard_bytes)
            for key in patient.infos:
                writer.write(key, _tensor(patient, key, turned=key in transposed))
            for key, (k, size) in indexed.items():
                writer.write(key, torch.arange(k, dtype=torch.int32) // size)
            writer.finish(*_configs(patient, {k: v for repair in repairs for k, v in repair.settings.items()}))
        except BaseException:
            writer.discard()
            raise
    return repaired


def _shape(info: TensorInfo, *, turned: bool) -> tuple[int, ...]:
    return info.shape[::-1] if turned else info.shape


def _tensor(patient: Patient, key: str, *, turned: bool) -> Tensor:
    tensor = patient.read(key)
    return tensor.T.contiguous() if turned else tensor


def _is_own(path: Path) -> bool:
    """Whether a file is in its folder, or where the hub's cache keeps what its folders link to."""
    real, folder = path.resolve(), path.parent.resolve()
    return real.is_relative_to(folder) or real.is_relative_to(folder.parent.parent / "blobs")


def _configs(
    patient: Patient, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[Path]]:
    """Return config.json, quantize_config.json if there was one, and the files to copy."""
    quantization = {**patient.quantization, **settings}
    config = dict(patient.config)
    if "quantization_config" in config:
        config["quantization_config"] = quantization
    else:
        config["text_config"] = {**config["text_config"], "quantization_config": quantization}
    legacy = {LEGACY_CONFIG: quantization} if (patient.path / LEGACY_CONFIG).is_file() else {}
    shards = {name for names in patient.files.values() for name in names}
    written = {CONFIG, INDEX, LEGACY_CONFIG, *shards}
    files = sorted(path for path in patient.path.iterdir() if path.is_file() and _is_own(path))
    return config, legacy, [path for path in files if path.name not in written]
