"""Checks of g_idx: missing, damaged, out of order."""

from __future__ import annotations

from collections.abc import Iterator

from llmq.doctor.findings import ERROR, WARNING, Finding, Repair
from llmq.doctor.patient import Patient
from llmq.errors import LlmqError
from llmq.formats import FORMATS


def shuffled(patient: Patient) -> list[str]:
    """Return the modules whose groups are not contiguous inputs."""
    return [module for module, order in _orders(patient).items() if order is True]


def index_of_groups(patient: Patient) -> Iterator[Finding]:
    """Report an index of groups that readers need and miss, cannot use, or do not honour."""
    orders = _orders(patient)
    if broken := {module: order for module, order in orders.items() if isinstance(order, str)}:
        yield Finding(
            "g-idx-damaged", ERROR, tuple(broken), next(iter(broken.values())), "download or quantize it again"
        )
    if patient.quantization["quant_method"] == "llmq":
        return  # who reads it honours it
    moved = [module for module, order in orders.items() if order is True]
    said = patient.quantization.get("desc_act")
    if moved and said is False:
        yield Finding(
            "g-idx-against-desc-act", ERROR, tuple(moved), "inputs are out of order, but desc_act is false",
            "readers that go by desc_act take wrong scales; set desc_act to true", Repair({"desc_act": True}),
        )  # fmt: skip
    elif moved:
        yield Finding(
            "g-idx-not-honoured", WARNING, tuple(moved), "inputs are out of the order of their groups (act-order)",
            "vLLM 0.33, AWQ and AutoRound know none; load it with llmq, GPTQModel, transformers, or use static groups",
        )  # fmt: skip
    if patient.quantization["quant_method"] == "gptq":
        missing = [layer for layer in patient.layers.values() if layer.stored and "g_idx" not in layer.header]
        if missing:
            added = {}
            for layer in missing:
                assert layer.stored is not None
                k = layer.stored.in_features
                added[f"{layer.module}.g_idx"] = k, min(layer.spec.group_columns(k), k)
            exact = said is not True
            yield Finding(
                "g-idx-missing", WARNING, tuple(layer.module for layer in missing), "has no g_idx",
                "GPTQModel and transformers want one" + ("" if exact else "; desc_act is true: the order is lost"),
                Repair(indexed=added) if exact else None,
            )  # fmt: skip


def _orders(patient: Patient) -> dict[str, bool | str]:
    """Return of each module with an index whether it is out of order, or what is wrong with it."""
    found: dict[str, bool | str] = {}
    for layer in patient.layers.values():
        name = FORMATS[layer.spec.format].index
        if name is None or name not in layer.header or layer.stored is None:
            continue
        try:
            index = {name: patient.read(f"{layer.module}.{name}")}
            order = FORMATS[layer.spec.format].columns(index, layer.spec)
        except LlmqError as error:
            found[layer.module] = str(error)
            continue
        found[layer.module] = order is not None and not bool((order.diff() == 1).all())
    return found
