"""README.md of a packed folder: a model card, with metadata that the hub reads and prose that people do.

It says what the weights were made from, how, what that cost, and how to load them. There is no date and no duration in
it: the same job writes the same bytes. Metadata of the source's card that still holds, such as the license, stay; its
text does not, since it is about another model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmq.checkpoint import read_json
from llmq.engines import Result, verdicts
from llmq.errors import CheckpointError
from llmq.report import REPORT
from llmq.types import QuantSpec

CARD = "README.md"
CERTIFICATE = "certificate.json"
RELATION = "quantized"  # of the model to its base, as the hub calls it

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")  # of the source's metadata
_SNAPSHOT = re.compile(r"models--(?P<owner>.+?)--(?P<name>[^/]+)/snapshots/")


@dataclass(frozen=True)
class Facts:
    """What a card is about.

    Args:
        base: hub id of the model that was packed, if it is known to have one.
        architecture: class of the model.
        specs: what each packed module looks like; none: the weights were made dense again.
        shapes: outputs and inputs of each.
        dense: linear layers in the blocks that are not packed.
        report: what report.json says of the making, if anybody knows.
        certificate: what `llmq verify` found out about the folder or about one with the same tensors.
    """

    base: str | None
    architecture: str
    specs: Mapping[str, QuantSpec]
    shapes: Mapping[str, tuple[int, int]]
    dense: frozenset[str] = frozenset()
    report: Mapping[str, Any] | None = None
    certificate: Mapping[str, Any] | None = None


def write_card(folder: Path, facts: Facts, source: str = "") -> None:
    """Write the model card of `facts` to `folder`; `source` is the text of the card of what it was made from."""
    (folder / CARD).write_text(card(facts, source), encoding="utf-8")


def card(facts: Facts, source: str = "") -> str:
    """Return the model card of `facts`; `source` is the text of the card of what it was made from."""
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        **{key: value for key, value in metadata_of(source).items() if key in _KEPT},
        base_model=facts.base,
        base_model_relation=RELATION,
        library_name="transformers",
        tags=_tags(facts),
    )
    parts = [_title(facts), _making(facts), _result(facts), _certified(facts), _loading(facts)]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def metadata_of(text: str) -> dict[str, Any]:
    """Return the metadata of a model card; none if it has none that can be read."""
    found = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        content = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def card_in(folder: Path) -> str:
    """Return the text of the model card in `folder`, or an empty one."""
    try:
        return (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def report_in(folder: Path) -> dict[str, Any] | None:
    """Return what report.json in `folder` says, if it is one of llmq's."""
    try:
        found = read_json(folder / REPORT)
    except CheckpointError:
        return None
    layers, numbers = found.get("layers"), ("out_features", "in_features", "weight_error")
    if not isinstance(found.get("recipe"), dict) or not isinstance(layers, list):
        return None
    good = all(isinstance(x, dict) and all(isinstance(x.get(key), (int, float)) for key in numbers) for x in layers)
    return found if good and all(isinstance(found.get(key), dict) for key in ("bytes", "versions")) else None


def base_of(folder: Path) -> str | None:
    """Return the hub id that the dense `folder` is a snapshot of; None: it is a folder like any, wherever it lies."""
    snapshot = _SNAPSHOT.search(f"{folder.absolute().as_posix()}/")
    return f"{snapshot['owner']}/{snapshot['name']}" if snapshot else None


def packed_base_of(text: str) -> str | None:
    """Return what `text`, the card of a packed folder, calls the model that was packed."""
    metadata = metadata_of(text)
    base = metadata.get("base_model")
    return base if metadata.get("base_model_relation") == RELATION and isinstance(base, str) else None


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the class of the model that config.json describes."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else str(config.get("model_type", "model"))


def _tags(facts: Facts) -> list[str]:
    formats = dict.fromkeys(spec.format for spec in facts.specs.values())
    bits = sorted({spec.bits for spec in facts.specs.values()})
    return ["llmq", *formats, *(f"{width}-bit" for width in bits)]


def _title(facts: Facts) -> str:
    name = facts.architecture if facts.base is None else facts.base.rpartition("/")[2]
    whose = "a local model" if facts.base is None else f"`{facts.base}`"
    if not facts.specs:
        return f"# {name}, from packed weights\n\nDense weights that stand for packed ones, by llmq."
    kinds: dict[tuple[int, int, bool, str], int] = {}
    for spec in facts.specs.values():
        kind = (spec.bits, spec.group_size, spec.symmetric, spec.format)
        kinds[kind] = kinds.get(kind, 0) + 1
    bits = " and ".join(str(width) for width in sorted({kind[0] for kind in kinds}))
    lines = [f"# {name}, {bits} bits", "", f"Weights of {whose}, quantized by llmq; activations are not.", ""]
    lines += ["| layers | bits | group size | grid | format |", "|---|---|---|---|---|"]
    for (width, size, symmetric, layout), count in kinds.items():
        group = "one per output" if size == -1 else str(size)
        lines.append(f"| {count} | {width} | {group} | {'symmetric' if symmetric else 'asymmetric'} | {layout} |")
    return "\n".join(lines)


def _making(facts: Facts) -> str:
    if facts.report is None:
        return ""
    version = facts.report.get("versions", {}).get("llmq", "?")
    settings = _public(facts.report.get("recipe", {}))
    recipe = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()
    lines = ["## How it was made", "", f"`llmq quantize`, version {version}, with this recipe:", ""]
    lines += ["```yaml", recipe, "```"]
    calibration = facts.report.get("calibration")
    if isinstance(calibration, Mapping):
        lines += [
            "",
            "Calibration: " + ", ".join(f"{key} {value}" for key, value in _public(calibration).items()) + ".",
        ]
    return "\n".join(lines)


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` with files by their names alone: cards are published, and folders are nobody's business."""
    return {
        key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for key, value in settings.items()
    }


def _result(facts: Facts) -> str:
    if facts.report is None:
        return ""
    layers = facts.report.get("layers", [])
    sizes = facts.report.get("bytes", {})
    weights = sum(layer["out_features"] * layer["in_features"] for layer in layers)
    held_out = [layer["held_out_loss"] for layer in layers if layer.get("held_out_loss") is not None]
    rows: list[tuple[str, str]] = []
    if weights and "packed" in sizes:
        rows.append(("bits per packed weight, scales included", f"{8 * sizes['packed'] / weights:.3f}"))
    for key, name in (("output_tensors", "bytes of all tensors"), ("source_tensors", "bytes of the original's")):
        if key in sizes:
            rows.append((name, f"{sizes[key]:,}"))
    if layers:
        mean = sum(layer["weight_error"] for layer in layers) / len(layers)
        rows.append(("relative weight error, mean of layers", f"{mean:.4f}"))
    if held_out:
        mean = sum(held_out) / len(held_out)
        rows.append(("relative output error on held-out text, mean of layers", f"{mean:.5f}"))
    return "\n".join(["## Result", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _certified(facts: Facts) -> str:
    if facts.certificate is None:
        return ""
    lines = ["## Certificate", "", "What loaders compute, against the codes in float32 (`llmq verify`):", ""]
    lines += ["| loader | result | largest difference |", "|---|---|---|"]
    for row in facts.certificate.get("loaders", []):
        relative = row.get("relative")
        seen = "" if relative is None else f"{relative:.1e} of the largest logit"
        lines.append(f"| {row.get('loader')} | {row.get('verdict', 'refused')} | {seen} |")
    kl = facts.certificate.get("packing", {}).get("kl")
    if kl is not None:
        lines += ["", f"Divergence from the original model: {kl:.3e} nats per token."]
    return "\n".join(lines)


def _loading(facts: Facts) -> str:
    lines = ["## How to load it", "", "```python"]
    if facts.specs:
        lines.append("import llmq.hf  # packed layers for transformers")
    lines += ["from transformers import AutoModelForCausalLM", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("path/or/id/of/this/folder", dtype="auto")', "```"]
    if _vllm_loads(facts):
        lines += ["", "vLLM reads the same files: `vllm serve path/or/id/of/this/folder`."]
    return "\n".join(lines)


def _vllm_loads(facts: Facts) -> bool:
    """Whether vLLM takes the packed layers, if they are all alike."""
    kinds = {(spec.bits, spec.group_size, spec.symmetric, spec.format): spec for spec in facts.specs.values()}
    if len(kinds) != 1:
        return False
    found = verdicts(Result(next(iter(kinds.values())), facts.shapes, facts.dense))
    return any(verdict.accepted for verdict in found if verdict.engine.startswith("vLLM"))
