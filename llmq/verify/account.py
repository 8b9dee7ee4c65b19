"""Where every tensor of the original went."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmq.checkpoint import CheckpointReader
from llmq.families import skeleton
from llmq.names import file_names
from llmq.packed import PackedCheckpoint
from llmq.places import banks_apart
from llmq.preflight import model_config
from llmq.report import REPORT
from llmq.types import QuantSpec
from llmq.unfused import take_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Account:
    """Names of tensors by what became of them; experts that the original holds fused go by the names of their parts."""

    packed: dict[str, list[str]] = field(default_factory=dict)  # by bits, groups and format
    copied: list[str] = field(default_factory=list)  # bit by bit
    rewritten: list[str] = field(default_factory=list)  # changed or made by transforms, as report.json says
    tied: list[str] = field(default_factory=list)  # left out, since another tensor stands for them
    changed: list[str] = field(default_factory=list)  # and nothing says why
    missing: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """Return a line per tensor that is not accounted for."""
        reasons = {
            "changed": "is not the original's, and report.json does not say why",
            "missing": "of the original is missing",
            "added": "is not in the original, and report.json does not say why",
        }
        return [f"tensor {name} {reason}" for kind, reason in reasons.items() for name in getattr(self, kind)]


def settle(original: CheckpointReader, packed: PackedCheckpoint) -> Account:
    """Return what became of every tensor of `original` in `packed`, which has the same names.

    Raises:
        CheckpointError: a tensor cannot be read.
        SpecError: transformers does not know the model.
    """
    model = skeleton(model_config(original), torch.float32)
    source, _ = take_apart(original, model)
    in_model = {key: name for name, key in file_names(model, source.keys()).items()}
    tied: dict[str, str] = dict(model.all_tied_weights_keys)  # the name that stands for it
    rewritten = _rewritten(packed)
    found = Account()
    dense = set(packed.dense)
    for key in sorted(source):
        module = key.removesuffix(".weight")
        if module in packed.layers and key != module:
            found.packed.setdefault(described(packed.layers[module].stored.spec), []).append(key)
        elif key not in dense:
            (found.tied if in_model.get(key) in tied else found.missing).append(key)
        elif _same(source, packed, key):
            found.copied.append(key)
        else:
            (found.rewritten if in_model.get(key) in rewritten else found.changed).append(key)
    new = _in_model(packed)
    for key in sorted(dense - set(source)):
        name = new.get(key, key)
        made = name in rewritten or tied.get(name) in rewritten  # the latter: no longer tied
        (found.rewritten if made else found.added).append(key)
    return found


def described(spec: QuantSpec) -> str:
    """Return `spec` in words: 4 bits, groups of 128, symmetric, gptq."""
    groups = "one group per row" if spec.group_size == -1 else f"groups of {spec.group_size}"
    return f"{spec.bits} bits, {groups}, {'symmetric' if spec.symmetric else 'asymmetric'}, {spec.format}"


def _in_model(packed: PackedCheckpoint) -> dict[str, str]:
    """Return the name in the model of each dense tensor of `packed`."""
    model: PreTrainedModel = skeleton(model_config(packed), torch.float32)
    banks_apart(model, {key: packed.info(key) for key in packed})
    return {key: name for name, key in file_names(model, packed.dense).items()}


def _rewritten(packed: PackedCheckpoint) -> set[str]:
    """Return the names in the model of what report.json says was rewritten."""
    try:
        report: Any = json.loads((packed.path / REPORT).read_bytes())
        return set(report["dense"]["rewritten"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()  # no report, or none that tells


def _same(a: CheckpointReader, b: CheckpointReader, key: str) -> bool:
    """Return whether tensor `key` is the same in both, bit by bit."""
    one, other = a.info(key), b.info(key)
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pairs = zip(a.pieces(key), b.pieces(key), strict=True)
    return all(torch.equal(_bits(x), _bits(y)) for (_, x), (_, y) in pairs)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
