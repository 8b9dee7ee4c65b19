"""Which kernel would run each layer of a packed folder, and why not a better one: known from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmq import ops
from llmq.packed import PackedCheckpoint

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


def choices(
    folder: str | Path, device: torch.device, dtype: torch.dtype, tokens: Sequence[int] = TOKENS
) -> list[Choice]:
    """Return how the layers of a packed `folder` are run on `device` with activations of `dtype`, the most first.

    Raises:
        CheckpointError: the folder is not a packed checkpoint.
        KernelError: no kernel runs a layer.
    """
    alike: dict[ops.Layer, list[str]] = {}
    for name, packed in PackedCheckpoint(folder).layers.items():
        spec, (n, k) = packed.stored.spec, packed.shape
        layer = ops.Layer(spec.bits, spec.group_columns(k), spec.symmetric, n, k)
        alike.setdefault(layer, []).append(name)
    found = [_choice(layer, names, device, dtype, tokens) for layer, names in alike.items()]
    return sorted(found, key=lambda choice: -choice.layers)


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
    return Choice(layer, len(names), names[0], name, paths, refused)
