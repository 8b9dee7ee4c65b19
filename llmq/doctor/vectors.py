"""Checks of layers on codebooks of vectors: entries that cannot be, codebooks and codes that say nothing.

Entries that no code names are sound: a layer with fewer vectors than entries has many.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmq.doctor.findings import ERROR, WARNING, Finding, of_all
from llmq.doctor.patient import Layer, Patient
from llmq.formats.llmq_layout import codes_of
from llmq.grids.vq import MAX_ENTRY, VECTORS, vector_grid

_PIECE = 2**22  # bytes of codes that are looked at together


def codebooks(patient: Patient) -> Iterator[Finding]:
    """Report codebooks with entries that llmq refuses, and those of zeros only."""
    beyond, empty = [], []
    for layer in _layers(patient):
        book = patient.read(f"{layer.module}.codebook")
        if count := int((book < -MAX_ENTRY).any(dim=1).sum()):
            beyond.append((layer.module, f"{count} of {len(book)} entries have numbers below -{MAX_ENTRY}"))
        if not book.any():
            empty.append((layer.module, f"all {len(book)} entries are 0"))
    kinds = (
        ("entries-out-of-range", ERROR, beyond, "another program wrote them, or the file is damaged; quantize again"),
        ("codebook-zero", WARNING, empty, "its weights are 0 whatever the codes; compare with the original"),
    )  # fmt: skip
    for kind, severity, found, advice in kinds:
        yield from of_all(kind, severity, found, advice)


def one_entry(patient: Patient) -> Iterator[Finding]:
    """Report layers whose codes all name the same entry."""
    found = []
    for layer in _layers(patient):
        named = _the_only_code(patient, layer)
        if named is not None:
            found.append((layer.module, f"every code is {named}; the other entries of its codebook are not used"))
    advice = "the codes were not written, or the weights are all alike; quantize these layers again"
    yield from of_all("codes-of-one-entry", WARNING, found, advice)


def _layers(patient: Patient) -> Iterator[Layer]:
    for layer in patient.layers.values():
        if layer.spec.grid in VECTORS and layer.stored is not None:
            yield layer


def _the_only_code(patient: Patient, layer: Layer) -> int | None:
    """Return the code that all vectors of a layer have, or None if there are two codes, or one vector only."""
    assert layer.stored is not None, "it was recognized"
    n, k = layer.stored.out_features, layer.stored.in_features
    grid = vector_grid(layer.spec.grid, layer.spec.bits)
    if n * grid.codes_in(k) == 1:
        return None
    _, row = layer.header["codes"][0]
    step, first = max(1, _PIECE // row), None
    for start in range(0, n, step):
        stored = patient.read(f"{layer.module}.codes", slice(start, start + step))
        codes = codes_of(stored, grid.code_bits, grid.codes_in(k))
        first = int(codes[0, 0]) if first is None else first
        if bool((codes != first).any()):
            return None
    return first
