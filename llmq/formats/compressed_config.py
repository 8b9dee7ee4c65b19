"""The quantization_config of compressed-tensors: groups of modules with a scheme each, and modules left out.

A scheme that llmq reads packs weights as whole numbers, 2 to 8 bits, per group or per output, and leaves activations,
cache and weights' basis alone; whatever else a configuration asks for is refused by name (FORMATS 1.3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llmq.errors import CheckpointError, SpecError
from llmq.formats.naming import compiled, matches, patterns
from llmq.formats.stored import setting, shown
from llmq.types import QuantSpec

BITS = range(2, 9)
STREAM, PADDED = "compressed-tensors", "compressed-tensors-padded"
_LAYOUT = "pack-quantized"
_FIRST_STREAM = (0, 18)  # version of the library that packs one stream; 0.17.0 and 0.17.1 still pad (ran)
_VERSIONS = {STREAM: "0.18.0", PADDED: "0.17.0"}  # written: one that reads what was packed


def config(specs: Mapping[str, QuantSpec], dense: Sequence[str]) -> dict[str, object]:
    """Return the quantization_config for these packed modules, and `dense`: all linears of the model without packing.

    One spec is said of all linears but the dense ones, as llm-compressor says it; several get a group each, whose
    modules are named.

    Raises:
        SpecError: the specs differ in the arrangement of the bits, of which a checkpoint has one.
    """
    formats = {spec.format for spec in specs.values()}
    if len(formats) != 1:
        raise SpecError(f"one checkpoint is of one format, not of {' and '.join(sorted(formats)) or 'none'}")
    members: dict[tuple[int, int, bool], list[str]] = {}
    for name, spec in specs.items():
        members.setdefault((spec.bits, spec.group_size, spec.symmetric), []).append(name)
    groups: dict[str, object] = {}
    for (bits, group_size, symmetric), own in members.items():
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "channel" if group_size == -1 else "group",
            "group_size": None if group_size == -1 else group_size,
            "dynamic": False,
        }
        targets = ["Linear"]
        if len(members) > 1:
            mine = set(own)
            others = [*(name for name in specs if name not in mine), *dense]
            targets = [f"re:{pattern}" for pattern in patterns(own, others)]
        groups[f"group_{len(groups)}"] = {"targets": targets, "weights": weights, "format": _LAYOUT}
    return {
        "quant_method": "compressed-tensors",
        "format": _LAYOUT,
        "quantization_status": "compressed",  # without it the loader expects dense weights
        "config_groups": groups,
        "ignore": [f"re:{pattern}" for pattern in patterns(list(dense), specs, r"(\..*)?")],
        "version": _VERSIONS[formats.pop()],
    }


def specs(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, QuantSpec]:
    """Return what the quantization_config `config` says of each of the packed `modules`.

    The library's order holds: a module's own name, then a regular expression, then a class, all of which count as that
    of linear layers here.

    Raises:
        CheckpointError: a key is missing, has a value that llmq does not read, or contradicts the modules.
    """
    _check_whole(config)
    groups = _object(config, "config_groups", "quantization_config")
    chosen = [target for name, scheme in groups.items() for target in _group(name, scheme, config)]
    exact = {target.text: spec for target, spec in chosen if target.kind == _NAME}  # may be as many as modules
    other = sorted((pair for pair in chosen if pair[0].kind != _NAME), key=lambda pair: pair[0][:2])
    left_out = [target for target in _targets(config.get("ignore") or [], "ignore") if target.kind != _CLASS]
    dense = {target.text for target in left_out}
    found: dict[str, QuantSpec] = {}
    for module in modules:
        if module in dense or any(target.covers(module) for target in left_out if target.pattern):
            raise CheckpointError(f"quantization_config: ignore names {module}, but it is packed")
        spec = exact.get(module) or next((spec for target, spec in other if target.covers(module)), None)
        if spec is None:
            raise CheckpointError(f"quantization_config: {module} is packed, but no target of config_groups names it")
        found[module] = spec
    return found


_NAME, _PATTERN, _CLASS = range(3)


class _Target(NamedTuple):
    """What a group is for, or the model without packing."""

    kind: int  # in the order in which the library asks them
    text: str
    pattern: re.Pattern[str] | None

    def covers(self, module: str) -> bool:
        """Whether a pattern or class is for a packed module; every one is taken for a linear layer."""
        return self.pattern is None or matches(self.pattern, module)


def _check_whole(config: Mapping[str, Any]) -> None:
    """Check what a configuration says of the model as a whole."""
    status = config.get("quantization_status")
    if status not in ("compressed", "frozen"):  # the latter by its first versions
        raise CheckpointError(f"quantization_config: quantization_status is {shown(status)}; llmq reads compressed")
    layout = config.get("format")
    if layout not in (_LAYOUT, "mixed-precision"):
        raise CheckpointError(f"quantization_config: format is {shown(layout)}; llmq reads {_LAYOUT}")
    sparsity = config.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format") == "dense":
        sparsity = {}
    others = {"kv_cache_scheme": config.get("kv_cache_scheme"), "sparsity_config": sparsity}
    transforms = config.get("transform_config") or {}
    others["transform_config"] = transforms if transforms != {"config_groups": {}} else None
    for key, value in others.items():
        if value:
            raise CheckpointError(f"quantization_config: {key} is {shown(value)}; llmq reads packed weights only")


def _group(name: str, scheme: object, config: Mapping[str, Any]) -> list[tuple[_Target, QuantSpec]]:
    """Return the targets of one row of config_groups, and what it says of them."""
    where = f"config_groups {shown(name)}"
    if not isinstance(scheme, Mapping):
        raise CheckpointError(f"quantization_config: {where} is {shown(scheme)}; llmq reads an object")
    layout = scheme.get("format") or config.get("format")
    if layout != _LAYOUT:
        raise CheckpointError(f"quantization_config: {where} has format {shown(layout)}; llmq reads {_LAYOUT}")
    for key in ("input_activations", "output_activations"):
        if scheme.get(key):
            raise CheckpointError(f"quantization_config: {where} has {key}; llmq reads packed weights only")
    spec = _spec(_object(scheme, "weights", where), where, config)
    return [(target, spec) for target in _targets(scheme.get("targets"), f"{where} targets")]


def _spec(weights: Mapping[str, Any], where: str, config: Mapping[str, Any]) -> QuantSpec:
    """Return the spec of a scheme's `weights`."""
    bits = setting(weights, ("num_bits",), int, None, "2 to 8")
    strategy = weights.get("strategy")
    size = setting(weights, ("group_size",), int, None, "a positive number, or none")
    if strategy is None:
        strategy = {None: "tensor", -1: "channel"}.get(size, "group")
    wrong = {
        "num_bits": bits if bits not in BITS else None,
        "type": weights.get("type") if weights.get("type", "int") != "int" else None,
        "strategy": strategy if strategy not in ("group", "channel") else None,
        "dynamic": weights.get("dynamic") or None,
        "actorder": weights.get("actorder") if not _is_order(weights.get("actorder")) else None,
        "group_size": size if strategy == "group" and (size is None or size < 1) else None,
    }
    if bits is None or (strategy == "group" and size is None):
        key = "num_bits" if bits is None else "group_size"
        raise CheckpointError(f"quantization_config: {where} has no {key}")
    for key, value in wrong.items():
        if value is not None:
            raise CheckpointError(
                f"quantization_config: {where} has {key} {shown(value)}; llmq reads whole numbers of 2 to 8 bits, "
                "per group or per channel"
            )
    symmetric = setting(weights, ("symmetric",), bool, True, "true or false")
    version = re.match(r"(\d{1,6})\.(\d{1,6})", str(config.get("version") or ""))
    padded = version is not None and (int(version[1]), int(version[2])) < _FIRST_STREAM and 32 % bits != 0
    return QuantSpec(bits, size if strategy == "group" else -1, symmetric, PADDED if padded else STREAM)


def _is_order(value: object) -> bool:
    """Whether `value` is an actorder: with "group" the files have an index, else they need none."""
    return value is None or isinstance(value, bool) or value in ("group", "dynamic", "static", "weight")


def _targets(value: object, where: str) -> list[_Target]:
    """Return a list of module names, classes of linear layers, and regular expressions after ``re:``."""
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise CheckpointError(f"quantization_config: {where} is {shown(value)}; llmq reads a list of names")
    found = []
    for text in value:
        if text.startswith("re:"):
            found.append(_Target(_PATTERN, text, compiled(text[3:], where)))
        else:
            is_class = text == "Conv1D" or re.fullmatch(r"[A-Z]\w*Linear\w*|Linear\w*", text) is not None
            found.append(_Target(_CLASS if is_class else _NAME, text, None))
    return found


def _object(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = config.get(key)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where}: {key} is {shown(found)}; llmq reads an object")
    return found
