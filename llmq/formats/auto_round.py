"""AutoRound's label on the layouts of gptq and awq, as AutoRound, transformers and vLLM read it.

The tensors are those of the other two; what is AutoRound's own is quantization_config. Its `packing_format` names the
layout, and how zeros are stored:

    auto_round:auto_gptq                     gptq, version 1: zero - 1
    auto_round:gptqmodel, or auto_round      gptq, version 2: the zero itself
    auto_round:auto_awq                      awq

There is no `g_idx`: AutoRound's layers have none, and pass over one that is there. `extra_config` has rows for single
modules, by name or by an expression that is searched for in names; 16 bits in a row keep a module dense. Read in the
sources of AutoRound 0.16.1 (inference/convert_model.py and backend.py, export/export_to_autoround), and run with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from llmq.errors import CheckpointError, SpecError
from llmq.formats import awq, gptq
from llmq.formats.naming import compiled, matches, within_block
from llmq.formats.stored import (
    Header,
    Read,
    Stored,
    TensorLayout,
    group_columns,
    group_size_of,
    header_of,
    setting,
    shown,
)
from llmq.types import QuantizedWeight, QuantSpec

_T = TypeVar("_T")

PACKING_OF = {"gptq": "auto_round:auto_gptq", "gptq_v2": "auto_round:gptqmodel"}  # what is written
_INNER = {"auto-round": "gptq", "auto-round-v2": "gptq_v2"}
FORMAT_OF = {inner: name for name, inner in _INNER.items()}  # what layers of a folder are called with its label
# The second part of a packing_format, of which a third may name a kernel. The label of AutoRound 0.2 to 0.5, `backend`,
# has such names as well, and those of kernels that take the zero itself.
_LAYOUTS = {
    **dict.fromkeys(("auto_gptq", "gptq"), "gptq"),
    **dict.fromkeys(("", "gptqmodel", "exllamav2", "tritonv2"), "gptq_v2"),
    **dict.fromkeys(("auto_awq", "awq"), "awq"),
}
_DENSE = 16  # bits from which on a row means that a module stays as it is
_SPECIAL = frozenset("*+?^$()[]{}|\\")  # what makes an expression of a key
_REFUSED = ("rotation_config", "spinquant_config", "super_bits", "super_group_size")  # other functions of the codes

marker = "qweight"
parts: tuple[str, ...] = gptq.parts
optional: tuple[str, ...] = ("g_idx",)
index: str | None = None
embeddings = False


def refuses(spec: QuantSpec, out_features: int, in_features: int) -> str | None:
    """Return why a layer of this size cannot be stored, or None if it can."""
    return gptq.refuses(_inner(spec), out_features, in_features)


def layout(spec: QuantSpec, out_features: int, in_features: int) -> TensorLayout:
    """Return shape and dtype of each tensor that `pack` makes, by its local name."""
    return _without_index(gptq.layout(_inner(spec), out_features, in_features))


def recognize(spec: QuantSpec, header: Header, read: Read) -> Stored:
    """Return the layer that a file with the tensors in `header` holds.

    Raises:
        CheckpointError: a tensor is missing, or its shape or dtype does not fit the others and `spec`.
    """
    method: Any = awq if spec.format == "awq" else gptq
    stored: Stored = method.recognize(_inner(spec), header, read)
    if stored.in_features % group_columns(spec, stored.in_features):  # nothing but qweight tells how many there are
        raise CheckpointError(
            f"qweight has {stored.in_features} inputs, of which group_size {spec.group_size} leaves some over"
        )
    return replace(stored, spec=replace(stored.spec, format=spec.format))


def pack(weight: QuantizedWeight, spec: QuantSpec, columns: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors of one layer by their local names.

    Raises:
        SpecError: `columns` are given, or what `llmq.formats.gptq.pack` refuses.
    """
    if columns is not None:
        raise SpecError("AutoRound passes over g_idx: columns with act-order cannot be stored for it")
    return _without_index(gptq.pack(weight, _inner(spec)))


def unpack(tensors: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
    """Return the weight that the stored `tensors` hold.

    Raises:
        CheckpointError: the tensors do not fit each other or `spec`.
    """
    recognize(spec, header_of(tensors), tensors.__getitem__)
    return gptq.unpack(tensors, _inner(spec))


def columns(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor | None:
    """Return what `llmq.formats.gptq.columns` does of files that have a `g_idx` all the same."""
    return gptq.columns(tensors, _inner(spec))


def config(specs: Mapping[str, QuantSpec], dense: Sequence[str]) -> dict[str, object]:
    """Return the quantization_config for these packed modules, and `dense`, linears that stay dense.

    Where specs differ, the most common one stands above, and `extra_config` has a row for each other module, by name.

    Raises:
        SpecError: the specs differ in how zeros are stored, of which a checkpoint has one.
    """
    labels = {spec.format for spec in specs.values()}
    if len(labels) != 1:
        raise SpecError(f"one checkpoint is of one format, not of {' and '.join(sorted(labels)) or 'none'}")
    kinds = {name: (spec.bits, spec.group_size, spec.symmetric) for name, spec in specs.items()}
    counts = list(kinds.values())
    base = max(dict.fromkeys(counts), key=counts.count)
    blocks = {name: _block_prefix(name) for name in specs}
    rows: dict[str, dict[str, object]] = {name: {"bits": _DENSE} for name in dense}
    for name, kind in kinds.items():
        if kind != base or blocks[name] is None:
            rows[name] = _row(kind)
    prefixes = list(dict.fromkeys(prefix for prefix in blocks.values() if prefix is not None))
    found: dict[str, object] = {
        "quant_method": "auto-round",
        **_row(base),
        "packing_format": PACKING_OF[_INNER[labels.pop()]],
    }
    if prefixes:
        found["block_name_to_quantize"] = ",".join(prefixes)
    return found | ({"extra_config": rows} if rows else {})


def specs(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, QuantSpec]:
    """Return what the quantization_config `config` says of each of the packed `modules`: specs of gptq and awq.

    Raises:
        CheckpointError: a key is missing, has a value that llmq does not read, or keeps one of the modules dense.
    """
    look_up = _rows(config)
    found = {}
    for module in modules:
        key, spec = look_up(module)
        if spec is None:
            raise CheckpointError(
                f"quantization_config: extra_config {shown(key)} keeps {module} dense, but it is packed"
            )
        if key is None and within_block(module) is None and _outside(config, module):
            raise CheckpointError(
                f"quantization_config: {module} is packed, but neither block_name_to_quantize nor extra_config names it"
            )
        found[module] = spec
    return found


def kept_dense(config: Mapping[str, Any], modules: Iterable[str]) -> set[str]:
    """Return those of `modules` of which readers of `config` expect ordinary weights.

    Raises:
        CheckpointError: as `specs` does.
    """
    look_up = _rows(config)
    found = {module: look_up(module) for module in modules}
    return {name for name, (key, spec) in found.items() if spec is None or (key is None and _outside(config, name))}


def _rows(config: Mapping[str, Any]) -> Callable[[str], tuple[str | None, QuantSpec | None]]:
    """Return a function that says of a module which row of `extra_config` is for it, and its spec; None: dense.

    A row with the name itself counts first, then the first whose expression is found in the name.
    """
    label = _label(config)
    rows = config.get("extra_config") or {}
    if not isinstance(rows, Mapping) or not all(isinstance(row, Mapping) for row in rows.values()):
        raise CheckpointError(f"quantization_config: extra_config is {shown(rows)}; llmq reads an object of objects")
    own = {key: value for key, value in config.items() if key != "extra_config"}
    made: dict[str | None, QuantSpec | None] = {None: _spec(own, label)}
    made |= {key: _spec({**own, **row}, label) for key, row in rows.items() if row}
    if made[None] is None:
        raise CheckpointError(f"quantization_config: bits is {shown(config.get('bits'))}; llmq reads 2, 3, 4 and 8")
    # `search` as AutoRound does it, in the terms of `matches`, which knows how long a search may take
    open_ = [(key, compiled(f".*?(?:{key})", "extra_config")) for key in made if key and _SPECIAL & set(key)]

    def look_up(module: str) -> tuple[str | None, QuantSpec | None]:
        key = module if module in made else next((key for key, pattern in open_ if matches(pattern, module)), None)
        return key, made[key]

    return look_up


def _spec(config: Mapping[str, Any], label: str) -> QuantSpec | None:
    """Return the spec that `config` describes, or None if it leaves weights and activations as they are."""
    act_bits = setting(config, ("act_bits",), int, _DENSE, "16: activations as they are")
    bits = setting(config, ("bits",), int, None, "2, 3, 4 and 8")
    if act_bits < _DENSE:
        raise CheckpointError(f"quantization_config: act_bits is {act_bits}; llmq reads activations as they are, 16")
    if bits is not None and bits >= _DENSE:
        return None
    kind = setting(config, ("data_type",), str, "int", "int")
    if kind != "int":
        raise CheckpointError(f"quantization_config: data_type is {kind!r}; llmq reads int")
    for key in _REFUSED:
        if config.get(key):
            raise CheckpointError(f"quantization_config: {key} is {shown(config[key])}; llmq reads weights without it")
    reads = (awq.BITS,) if label == "awq" else gptq.BITS
    if bits not in reads:
        wanted = ", ".join(map(str, reads))
        raise CheckpointError(f"quantization_config: bits is {shown(bits)}; llmq reads {label} of {wanted} bits")
    group_size = group_size_of(config, ("group_size",), 128)
    return QuantSpec(bits, group_size, setting(config, ("sym",), bool, True, "true or false"), label)


def _label(config: Mapping[str, Any]) -> str:
    """Return the layout that a configuration names; without a name it is that of its readers' default."""
    key = "packing_format" if config.get("packing_format") is not None else "backend"
    named = setting(config, (key,), str, "auto", ", ".join(PACKING_OF.values()))
    if named == "auto":
        return "gptq"
    first, _, rest = named.partition(":")
    layout = _LAYOUTS.get(rest.partition(":")[0]) if first == "auto_round" else None
    if layout is None:
        reads = ", ".join([*PACKING_OF.values(), "auto_round", "auto_round:auto_awq"])
        raise CheckpointError(f"quantization_config: {key} is {shown(named)}; llmq reads {reads}")
    return layout


def _row(kind: tuple[int, int, bool]) -> dict[str, object]:
    """Return how a configuration writes bits, group_size and symmetry."""
    return {**dict(zip(("bits", "group_size", "sym"), kind, strict=True)), "data_type": "int"}


def _block_prefix(module: str) -> str | None:
    """Return what stands before the number of a module's block, or None if it is in no block."""
    found = re.match(r"(.+?)\.\d+\.", module)
    return found[1] if found else None


def _outside(config: Mapping[str, Any], module: str) -> bool:
    """Return whether `module` is in none of the blocks that a configuration names; without names, in none at all."""
    named = config.get("block_name_to_quantize") or config.get("to_quant_block_names")
    if not named:
        return within_block(module) is None
    return not any(module.startswith(prefix) for prefix in _prefixes(named))


def _prefixes(named: object) -> list[str]:
    """Return the beginnings of names in a text with commas, a list, or a list of lists of all blocks."""
    if isinstance(named, str):
        return [part.strip() for part in named.split(",")]
    if isinstance(named, list):
        return [prefix for part in named for prefix in _prefixes(part)]
    raise CheckpointError(f"quantization_config: block_name_to_quantize is {shown(named)}; llmq reads names of blocks")


def _inner(spec: QuantSpec) -> QuantSpec:
    """Return the same of the format whose tensors these are."""
    return replace(spec, format=_INNER.get(spec.format, spec.format))


def _without_index(by_name: dict[str, _T]) -> dict[str, _T]:
    return {name: value for name, value in by_name.items() if name != "g_idx"}
