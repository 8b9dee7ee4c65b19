"""Checks of scales: turned round, not finite, zero, negative."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmq.doctor.findings import ERROR, NOTE, WARNING, Finding, Repair, of_all
from llmq.doctor.patient import Patient
from llmq.errors import LlmqError

_NAMES = ("scales", "weight_scale")


def transposed(patient: Patient) -> Iterator[Finding]:
    """Report scales whose dimensions are exchanged: by their shape, or by how they fit the codes."""
    found = []
    for layer in patient.layers.values():
        name = next((name for name in _NAMES if name in layer.header), None)
        if layer.stored is not None or name is None or len(layer.header[name][0]) != 2:
            continue
        shape, dtype = layer.header[name]
        header = {**layer.header, name: (shape[::-1], dtype)}
        try:
            patient.method.recognize(layer.spec, header, lambda local: patient.read(f"{layer.module}.{local}"))  # noqa: B023
        except LlmqError:
            continue
        found.append((layer.module, f"{layer.module}.{name}", shape))
    if found:
        yield Finding(
            "scales-transposed", ERROR, tuple(module for module, *_ in found),
            f"scales are {list(found[0][2])}, expected {list(found[0][2][::-1])}", "exchange their dimensions",
            Repair(transposed=tuple(key for _, key, _ in found)),
        )  # fmt: skip
    turned = [m for m in patient.layers if (seen := patient.measures(m)) is not None and seen.scales_turned]
    if turned:
        yield Finding(
            "scales-in-wrong-order", ERROR, tuple(turned),
            "scales do not fit the spread of the codes, and do with their memory read in the other direction",
            "they were written without exchanging their dimensions; write them again from the original",
        )  # fmt: skip


def values(patient: Patient) -> Iterator[Finding]:
    """Report scales that are not finite, zero or negative."""
    infinite, zero, negative = [], [], []
    for layer in patient.layers.values():
        name = next((name for name in _NAMES if name in layer.header), None)
        if name is None or not layer.header[name][1].is_floating_point:
            continue
        scales = patient.read(f"{layer.module}.{name}").float()  # small floats cannot be compared
        bad = int((~torch.isfinite(scales)).sum())
        if bad:
            dtype = layer.header[name][1]
            infinite.append((layer.module, f"{bad} of {scales.numel()} scales are inf or NaN ({dtype})"))
        if count := int((scales == 0).sum()):
            zero.append((layer.module, f"{count} of {scales.numel()} scales are 0"))
        if count := int((scales < 0).sum()):
            negative.append((layer.module, f"{count} of {scales.numel()} scales are negative"))
    kinds = (
        ("scales-not-finite", ERROR, infinite, "the dtype overflowed or the solver failed; quantize them again"),
        ("scales-zero", WARNING, zero, "their weights are 0 whatever the codes; compare with the original"),
        ("scales-negative", NOTE, negative, "llmq, AutoRound and llama.cpp write such; not every engine expects it"),
    )  # fmt: skip
    for kind, severity, found, advice in kinds:
        yield from of_all(kind, severity, found, advice)
