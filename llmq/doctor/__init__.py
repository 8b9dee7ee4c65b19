"""What is wrong with a packed folder, whoever wrote it, and what can be done about it.

A check is a function from an opened folder to findings. A row in `CHECKS` makes it known; checks do not depend on each
other, and each that cannot look at a damaged part leaves it to those that can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from llmq.doctor import codes, files, indices, labels, parts, scales, vectors
from llmq.doctor.findings import ERROR, NOTE, WARNING, Finding, Repair
from llmq.doctor.patient import Patient
from llmq.errors import LlmqError
from llmq.packed import PackedCheckpoint

__all__ = ["CHECKS", "ERROR", "NOTE", "WARNING", "Finding", "Patient", "Repair", "diagnose"]

Check = Callable[[Patient], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    files.unsafe_index,
    files.index_against_shards,
    files.tensor_twice,
    labels.contradictions,
    labels.unknown_keys,
    labels.stale_legacy,
    labels.bits_and_groups,
    labels.dense_but_packed,
    labels.mislabelled,
    indices.index_of_groups,
    scales.transposed,
    scales.values,
    codes.shifted_zeros,
    codes.nibble_order,
    codes.dead_groups,
    codes.saturated_groups,
    codes.noise,
    vectors.codebooks,
    vectors.one_entry,
    parts.unknown_model,
    parts.missing,
    parts.other_size,
    parts.dense_inside,
    parts.outlying_experts,
    parts.tied_head,
    files.beside,
    parts.engines,
)


def diagnose(path: str | Path) -> list[Finding]:
    """Return what is wrong with, or worth knowing of, the packed folder `path`; errors first.

    Raises:
        CheckpointError: it is no packed folder, or a file of it cannot be read at all.
    """
    return examine(Patient(path))


def examine(patient: Patient) -> list[Finding]:
    """Return what the checks say of an opened folder; see `diagnose`."""
    found = [finding for check in CHECKS for finding in check(patient)]
    if not any(finding.severity == ERROR for finding in found):
        found += _unreadable(patient)
    order = (ERROR, WARNING, NOTE)
    return sorted(found, key=lambda finding: order.index(finding.severity))


def _unreadable(patient: Patient) -> list[Finding]:
    """Report what llmq itself has against the folder, where no check has said what it is."""
    broken = {module: layer.problem for module, layer in patient.layers.items() if layer.problem}
    if broken:
        seen = next(iter(broken.values()))
        return [Finding("layer-damaged", ERROR, tuple(broken), seen, "download or quantize it again")]
    try:
        PackedCheckpoint(patient.path).close()
    except LlmqError as error:
        return [Finding("unreadable", ERROR, (), str(error), "no reader can be sure what is meant")]
    return []
