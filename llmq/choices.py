"""Which kernel would run each layer of a packed folder, and why not a better one; and which layers are one product.

The first is known from headers alone; for the second a model of the folder's configuration runs without its weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmq import fusion, ops
from llmq.families import skeleton
from llmq.moe import has_fused, unfuse_
from llmq.names import file_names
from llmq.packed import PackedCheckpoint
from llmq.preflight import model_config
from llmq.shared_inputs import sharing

_OF_EXPERTS = re.compile(r"\.experts\.\d+\.[^.]+$")  # of a bank, as files name its layers
TOKENS = (1, 4, 16, 64, 512)  # of a step: one conversation, some, many; a prompt


@dataclass(frozen=True)
class Choice:
    """Layers that are alike, and how they are run."""

    layer: ops.Layer
    layers: int  # how many there are
    example: str  # the name of one
    kernel: str  # row of `ops.KERNELS`
    paths: dict[int, str]  # what it does, by the number of tokens; nothing where that is always the same
    refused: dict[str, str]  # the rows before it, and why they do not run the layer
    experts: str | None = None  # how the experts of a bank are run, of which these layers are


@dataclass(frozen=True)
class Together:
    """Layers of one module that see the same input."""

    names: tuple[str, ...]  # within the module
    groups: int  # how many such modules there are
    outputs: int  # of all of them
    tokens: int  # up to how many one product computes them all
    refused: str | None  # why none does


def choices(
    folder: str | Path, device: torch.device, dtype: torch.dtype, tokens: Sequence[int] = TOKENS
) -> list[Choice]:
    """Return how the layers of a packed `folder` are run on `device` with activations of `dtype`, the most first.

    Raises:
        CheckpointError: the folder is not a packed checkpoint.
        KernelError: no kernel runs a layer.
    """
    alike: dict[tuple[ops.Layer, bool], list[str]] = {}
    checkpoint = PackedCheckpoint(folder)
    for name in checkpoint.layers:
        kind = _layer(checkpoint, name), _OF_EXPERTS.search(name) is not None
        alike.setdefault(kind, []).append(name)
    found = [_choice(layer, names, device, dtype, tokens) for (layer, _), names in alike.items()]
    return sorted(found, key=lambda choice: -choice.layers)


def together(folder: str | Path, device: torch.device, dtype: torch.dtype) -> list[Together]:
    """Return which layers of a packed `folder` see the same input, and whether they are one product on `device`.

    Those that differ in bits, groups or symmetry are left out.

    Raises:
        CheckpointError: the folder is not a packed checkpoint.
        KernelError: no kernel runs a layer.
        SpecError: transformers does not know the model.
    """
    checkpoint = PackedCheckpoint(folder)
    model = skeleton(model_config(checkpoint), torch.float32)
    if has_fused(model):
        unfuse_(model)
    marker = f".{next(iter(checkpoint.layers.values())).format.marker}"
    keys = file_names(model, checkpoint, packed_suffix=marker)
    modules = {name.removesuffix(".weight"): key.removesuffix(marker) for name, key in keys.items()}
    tokens = fusion.TOKENS.get(device.type, 0)
    found: dict[tuple[tuple[str, ...], int, str | None], int] = {}
    for group in sharing(model, modules):
        layers = {name: _layer(checkpoint, modules[name]) for name in group}
        for names in fusion.alike_in(layers):
            own = [modules[name] for name in names]
            outputs = sum(layers[name].out_features for name in names)
            local = tuple(name.rpartition(".")[2] for name in names)
            kind = local, outputs, _apart(checkpoint, own, device, dtype)
            found[kind] = found.get(kind, 0) + 1
    return [Together(names, count, outputs, tokens, why) for (names, outputs, why), count in found.items()]


def _apart(checkpoint: PackedCheckpoint, names: list[str], device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why layers that differ in their number of outputs only are not one product."""
    kernels = dict.fromkeys(ops.choose(_layer(checkpoint, name), device, dtype) for name in names)
    if len(kernels) > 1:
        return f"kernels differ: {', '.join(kernels)}"
    [kernel] = kernels
    row = ops.KERNELS[kernel]
    if row.outputs is None:
        return f"{kernel} does not divide its arrangement"
    ragged = [n for n in (checkpoint.layers[name].shape[0] for name in names) if n % row.rows]
    if ragged and device.type == "cpu":  # those of GPUs are padded
        return f"{kernel} arranges {row.rows} outputs together; {ragged[0]} is no multiple"
    if not fusion.in_one_order([checkpoint.columns(name) for name in names]):
        return "columns are in different orders"
    return None


def _layer(checkpoint: PackedCheckpoint, name: str) -> ops.Layer:
    spec, (n, k) = checkpoint.layers[name].stored.spec, checkpoint.layers[name].shape
    return ops.Layer(spec.bits, spec.group_columns(k), spec.symmetric, n, k, spec.grid)


def _choice(
    layer: ops.Layer, names: list[str], device: torch.device, dtype: torch.dtype, tokens: Sequence[int]
) -> Choice:
    name = ops.choose(layer, device, dtype)
    refused = {}
    for other, kernel in ops.KERNELS.items():
        if other == name:
            break
        refused[other] = str(kernel.refuses(layer, device, dtype))
    path = ops.KERNELS[name].path
    paths = {} if path is None else {count: path(layer, count, dtype) for count in tokens}
    experts = None
    if _OF_EXPERTS.search(names[0]):
        experts = "one by one" if ops.KERNELS[name].grouped is None else "at once"
    return Choice(layer, len(names), names[0], name, paths, refused, experts)
