"""Checks against the model that config.json describes: what is missing, dense or tied otherwise than it should be."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import torch

from llmq.doctor.anatomy import Anatomy
from llmq.doctor.findings import ERROR, NOTE, WARNING, Finding, of_all
from llmq.doctor.patient import Patient
from llmq.engines import Result, verdicts
from llmq.errors import LlmqError
from llmq.formats import auto_round
from llmq.formats.naming import Rules

_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(.+)$")
_OUTLYING = 16  # factor between the scales of an expert and the median of its bank
_PIECE = 4096  # rows of an embedding that are compared at a time


def unknown_model(patient: Patient) -> Iterator[Finding]:
    """Report that nothing can be said of missing tensors."""
    if isinstance(patient.anatomy, str):
        yield Finding("model-unknown", NOTE, ("config.json",), patient.anatomy, "missing tensors are not looked for")


def missing(patient: Patient) -> Iterator[Finding]:
    """Report parameters of the model that no file has."""
    model = _known(patient)
    if model is None:
        return
    found: dict[str, list[str]] = defaultdict(list)
    for name, key in model.parameters.items():
        module, _, local = name.rpartition(".")
        if key is not None or (local == "weight" and module in model.packed):
            continue
        if model.experts and name.startswith(model.experts):
            found["expert-missing"].append(name)
        elif model.tied and module in (model.head, model.embedding) and _has_other(model, module):
            continue
        elif local == "bias":
            found["bias-missing"].append(name)
        elif module == model.head:
            found["head-missing"].append(name)
        else:
            found["tensor-missing"].append(name)
    for kind, names in found.items():
        hint = "tie_word_embeddings is false; " if kind == "head-missing" else ""
        yield Finding(
            kind, ERROR, tuple(names), "is in no file", f"{hint}readers leave it random: download or quantize again"
        )


def other_size(patient: Patient) -> Iterator[Finding]:
    """Report layers whose `shape` fits their tensors, but not the model: the last columns of a code may be any."""
    model = _known(patient)
    if model is None:
        return
    found = []
    for name, module in model.packed.items():
        layer = patient.layers.get(module)
        if layer is None or layer.stored is None or "shape" not in layer.header:
            continue
        size = layer.stored.out_features, layer.stored.in_features
        if size != model.sizes[name]:
            found.append((module, f"shape says {list(size)}, the model has {list(model.sizes[name])}"))
    advice = "the layer is of another model, or damaged: download or quantize it again"
    yield from of_all("layer-of-other-size", ERROR, found, advice)


def dense_inside(patient: Patient) -> Iterator[Finding]:
    """Report linears that are dense although the configuration has them packed."""
    model = _known(patient)
    if model is None:
        return
    dense = [name for name in model.linears if model.parameters.get(f"{name}.weight") and name not in model.packed]
    config = patient.quantization
    if config["quant_method"] == "llmq":
        return  # tensors tell what is packed
    if config["quant_method"] == "compressed-tensors":
        wrong = [name for name in dense if name != model.head or not model.tied]
        wrong = [name for name in wrong if _takes(patient, _in_files(model, name))]
    elif "auto-round" in config["quant_method"]:
        wrong = sorted(set(dense) - _kept_by_auto_round(patient, dense))
    else:
        local = {_local(name) for name in model.packed}
        wrong = [name for name in dense if _local(name) in local and not _left_out(patient, _in_files(model, name))]
    experts = [name for name in wrong if _EXPERT.match(name)]
    for kind, names in (("expert-dense", experts), ("packed-but-dense", [n for n in wrong if n not in experts])):
        if names:
            yield Finding(
                kind, ERROR, tuple(sorted(names)), "has a dense weight, but the configuration says that it is packed",
                "readers leave it random; name it in ignore, dynamic, modules_to_not_convert or extra_config",
            )  # fmt: skip


def outlying_experts(patient: Patient) -> Iterator[Finding]:
    """Report experts whose scales are far from those of their bank: never trained, or of another model."""
    banks: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for layer in patient.layers.values():
        found = _EXPERT.match(layer.module)
        name = next((name for name in ("scales", "weight_scale") if name in layer.header), None)
        if found and name:
            scales = patient.read(f"{layer.module}.{name}").float().abs()
            banks[found[1], found[3]][layer.module] = float(scales.nan_to_num(0, 0, 0).median())
    outlying = []
    for sizes in banks.values():
        middle = median(sizes.values())
        outlying += [m for m, size in sizes.items() if middle and not 1 / _OUTLYING < size / middle < _OUTLYING]
    if outlying:
        yield Finding(
            "expert-outlying", WARNING, tuple(outlying), f"its scales are far from its bank's, {_OUTLYING} times",
            "it was not trained, not calibrated or is damaged; compare it with the original",
        )  # fmt: skip


def tied_head(patient: Patient) -> Iterator[Finding]:
    """Report a head of its own in a model that ties it to the embedding."""
    model = _known(patient)
    if model is None or not model.tied or model.embedding is None:
        return
    embedding = model.parameters.get(f"{model.embedding}.weight")
    packed = [module for module in patient.modules if module.endswith(("lm_head", "embed_out"))]
    heads = [key for key in patient.infos if key.endswith(("lm_head.weight", "embed_out.weight")) and key != embedding]
    advice = "loaders drop the head; set tie_word_embeddings to false if it is meant to be another"
    if packed:
        yield Finding(
            "head-differs", ERROR, tuple(packed), "is packed, but config.json ties it to the embedding", advice
        )
    for key in heads if embedding else []:
        assert embedding is not None
        if not _equal(patient, key, embedding):
            yield Finding("head-differs", ERROR, (key,), f"is not {embedding}, to which config.json ties it", advice)


def engines(patient: Patient) -> Iterator[Finding]:
    """Report which engines do not take the layout, or not on several ranks."""
    layers = {module: layer for module, layer in patient.layers.items() if layer.stored is not None}
    if not layers:
        return
    specs = [layer.spec for layer in layers.values()]
    spec = max(specs, key=specs.count) if len(specs) < 2000 else specs[0]
    if "auto-round" in patient.quantization["quant_method"]:
        spec = replace(spec, format=auto_round.FORMAT_OF.get(spec.format, spec.format))
    shapes = {m: (layer.stored.out_features, layer.stored.in_features) for m, layer in layers.items() if layer.stored}
    model = _known(patient)
    dense = frozenset(model.linears - set(model.packed) - {model.head}) if model else frozenset()
    dense = frozenset(name for name in dense if re.search(r"\.\d+\.", name))
    advice = "use another engine or format" if spec.grid == "uniform" else "use llmq, or llmq convert --dequantize"
    result = Result(spec, shapes, dense, model.text_only if model else True, model.head_width if model else 1)
    for verdict in verdicts(result):
        if not verdict.accepted:
            yield Finding("engine-refuses", NOTE, (verdict.engine,), "; ".join(verdict.clashes), advice)
        clashes = {ranks: clash for ranks, clash in verdict.ranks.items() if clash}
        if clashes:
            ranks, clash = next(iter(clashes.items()))
            yield Finding(
                "tensor-parallel",
                NOTE,
                (verdict.engine,),
                f"not on {ranks} ranks: {clash}",
                "use fewer, or smaller groups",
            )


def _known(patient: Patient) -> Anatomy | None:
    return patient.anatomy if isinstance(patient.anatomy, Anatomy) else None


def _has_other(model: Anatomy, module: str) -> bool:
    """Whether the files have the embedding that a tied head takes, or the other way round."""
    other = model.embedding if module == model.head else model.head
    return model.parameters.get(f"{other}.weight") is not None or other in model.packed


def _equal(patient: Patient, a: str, b: str) -> bool:
    first, second = patient.infos[a], patient.infos[b]
    if first.shape != second.shape:
        return False
    return all(
        torch.equal(patient.read(a, rows).float(), patient.read(b, rows).float())
        for rows in (slice(at, at + _PIECE) for at in range(0, first.shape[0], _PIECE))
    )


def _in_files(model: Anatomy, name: str) -> str:
    return (model.parameters[f"{name}.weight"] or "").removesuffix(".weight")


def _local(name: str) -> str:
    """Return a name without the numbers of blocks and experts."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _takes(patient: Patient, module: str) -> bool:
    """Whether the configuration says that a linear is packed."""
    try:
        patient.method.specs(patient.quantization, [module])
    except LlmqError:
        return False
    return True


def _kept_by_auto_round(patient: Patient, modules: list[str]) -> set[str]:
    try:
        return auto_round.kept_dense(patient.quantization, modules)
    except LlmqError:  # said by `unreadable`
        return set(modules)


def _left_out(patient: Patient, module: str) -> bool:
    config = patient.quantization
    try:
        rule = Rules(config.get("dynamic")).first(module)
    except LlmqError:
        return True
    kept = config.get("modules_to_not_convert")
    kept = kept if isinstance(kept, list) else []
    return (rule is not None and rule.settings is None) or any(f".{name}." in f".{module}." for name in kept)
