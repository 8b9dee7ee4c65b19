"""Packed layers of files in their places in a model: which module each is for, and what stays dense."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmq.checkpoint import TensorInfo
from llmq.errors import CheckpointError
from llmq.families import skeleton
from llmq.moe import Bank, fuse_, has_fused, routers_of, unfuse_
from llmq.names import file_names
from llmq.packed import PackedLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def placed(
    model: PreTrainedModel, infos: Mapping[str, TensorInfo], layers: Mapping[str, PackedLayer]
) -> dict[str, PackedLayer]:
    """Return packed layers by the names of the modules of `model` that they are for, instead of those in the files.

    Raises:
        CheckpointError: a layer has other sizes than its module, or belongs to no linear layer or embedding of it.
    """
    marker = f".{next(iter(layers.values())).format.marker}"
    found: dict[str, PackedLayer] = {}
    for weight_name, key in file_names(model, infos, packed_suffix=marker).items():
        name, layer = weight_name.removesuffix(".weight"), layers[key.removesuffix(marker)]
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding) and not layer.format.embeddings:
            raise CheckpointError(f"{name}: a packed embedding, which llmq reads in its own format only")
        if layer.shape != (shape := linear_shape(module, name)):
            raise CheckpointError(
                f"{infos[key].file}: packed layer {key.removesuffix(marker)} has {layer.shape[0]} outputs and "
                f"{layer.shape[1]} inputs; {name} of the model has {shape[0]} and {shape[1]}"
            )
        found[name] = layer
    used = {id(layer) for layer in found.values()}
    stray = [module for module, layer in layers.items() if id(layer) not in used]
    if stray:
        raise CheckpointError(f"packed layer {stray[0]} belongs to no linear layer of the model ({len(stray)} such)")
    return found


def banks_apart(model: PreTrainedModel, infos: Mapping[str, TensorInfo]) -> dict[str, Bank]:
    """Put banks of linear layers in the place of the fused experts that the files have apart, and return them."""
    if not has_fused(model):
        return {}
    whole = file_names(model, infos, merged=False)
    banks = unfuse_(model)
    for name, bank in list(banks.items()):
        if any(f"{name}.{part.parameter}" in whole for part in bank.parts()):
            fuse_(model, banks.pop(name), name)
    return banks


def dense_linears(config: PretrainedConfig, packed: Collection[str]) -> list[str]:
    """Return the names of the linears, routers and whole banks of experts that are not `packed` in a model."""
    from transformers.pytorch_utils import Conv1D

    model = skeleton(config, torch.float32)
    banks = unfuse_(model)
    whole = [name for name in banks if not any(module.startswith(f"{name}.") for module in packed)]
    inside = tuple(f"{name}." for name in whole)
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    single = [name for name in linears if not name.startswith(inside)]
    return [name for name in dict.fromkeys([*single, *routers_of(model, banks), *whole]) if name not in packed]


def linear_shape(module: nn.Module, name: str) -> tuple[int, int]:
    """Return outputs and inputs of a linear layer, or rows and columns of an embedding."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        k, n = module.weight.shape
        return n, k
    kind = type(module).__name__
    raise CheckpointError(f"{name}: the files hold a packed weight for a {kind}, which is no linear layer or embedding")
