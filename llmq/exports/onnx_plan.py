"""What of a packed model becomes which part of an ONNX graph, found before work starts; refusals included."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from llmq.errors import CheckpointError, SpecError
from llmq.exports import matmul_nbits
from llmq.families import check_causal, skeleton
from llmq.names import file_names
from llmq.places import banks_apart, placed
from llmq.preflight import model_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llmq.packed import PackedCheckpoint


class Node(NamedTuple):
    """What stands for one packed module."""

    module: str  # in the packed folder
    bits: int
    block: int
    symmetric: bool
    shape: tuple[int, int]
    columns: bool  # whether its inputs are permuted


class Plan(NamedTuple):
    """What will be drawn; nothing in it is in doubt any more."""

    model: PreTrainedModel  # on the meta device
    nodes: dict[str, Node]  # by module of the model
    dense: dict[str, str]  # name in the model: in the packed folder


def plan(packed: PackedCheckpoint) -> Plan:
    """Return what will become of `packed`.

    Raises:
        SpecError: MatMulNBits cannot hold a layer, or the model is of a kind that is not drawn.
        CheckpointError: a tensor is missing.
    """
    config = model_config(packed)
    check_causal(config, "the export to ONNX")
    if config.get_text_config() is not config:
        raise SpecError(f"models of type {config.model_type!r} see images or sound; ONNX export knows text only")
    _check_rotary(config)
    model = skeleton(config, torch.float32)
    infos = {key: packed.info(key) for key in packed}
    banks_apart(model, infos)
    by_layer = {id(layer): module for module, layer in packed.layers.items()}
    places = placed(model, infos, packed.layers)
    for name in places:
        if isinstance(model.get_submodule(name), nn.Embedding):
            raise SpecError(
                f"{name}: a packed embedding, which ONNX export does not draw; quantize without --embeddings"
            )
    nodes = {name: _node(packed, by_layer[id(layer)]) for name, layer in places.items()}
    dense = file_names(model, packed.dense)
    _check_whole(packed, model, nodes, dense)
    return Plan(model, nodes, dense)


def _check_rotary(config: PretrainedConfig) -> None:
    found: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    for rope in (found, *found.values()):  # some models have several, by kinds of layers
        if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
            kind = rope["rope_type"]
            raise SpecError(f"rope_type {kind!r}: its frequencies change with the length of a text, a graph's do not")


def _node(packed: PackedCheckpoint, module: str) -> Node:
    layer = packed.layers[module]
    spec, (n, k) = layer.stored.spec, layer.shape
    if reason := matmul_nbits.refuses(spec.bits, spec.group_columns(k), k):
        raise SpecError(f"{module}: {reason}; quantize to 2, 4 or 8 bits in groups of 16 or multiples of it")
    block = matmul_nbits.block_size(spec.bits, spec.group_columns(k), k)
    return Node(module, spec.bits, block, spec.symmetric, (n, k), packed.columns(module) is not None)


def _check_whole(
    packed: PackedCheckpoint, model: PreTrainedModel, nodes: dict[str, Node], dense: dict[str, str]
) -> None:
    optional = model._keys_to_ignore_on_load_missing or []
    for name, tensor in model.state_dict().items():
        known = name in dense or name in model.all_tied_weights_keys or name.removesuffix(".weight") in nodes
        if known or not tensor.is_meta or any(re.search(pattern, name) for pattern in optional):
            continue
        raise CheckpointError(f"{packed.path}: tensor {name} is missing")
