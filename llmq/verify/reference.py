"""The function that a packed folder stands for: codes to float32 weights by llmq's readers, run by plain transformers.

No kernel and no packed layer takes part, so that this judges llmq's own as well as anybody else's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmq.checkpoint import CheckpointReader
from llmq.errors import CheckpointError
from llmq.families import skeleton
from llmq.packed import PackedCheckpoint
from llmq.places import banks_apart, placed
from llmq.preflight import model_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reference_model(packed: PackedCheckpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the dense model of a packed folder; in float32, which is exact, it takes 4 bytes per weight.

    Raises:
        CheckpointError: a tensor of the model is missing, or does not fit.
    """
    state = {name: packed.read(name) for name in packed.dense}
    state |= {f"{module}.weight": packed.dequantized(module) for module in packed.layers}
    for module in _transposed(packed):
        state[f"{module}.weight"] = state[f"{module}.weight"].T.contiguous()
    return _loaded(packed, state, dtype)


def original_model(original: CheckpointReader) -> PreTrainedModel:
    """Return the model of a dense folder in float32; errors as for `reference_model`."""
    return _loaded(original, {name: original.read(name) for name in original}, torch.float32)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return what a causal model predicts after each of `ids` [B, L]: float32 [B, L, V]."""
    found: Tensor = model(ids).logits
    return found.float()


def _loaded(source: CheckpointReader, state: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    config = model_config(source)
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    kind: Any = type(skeleton(model_config(source), torch.float32))
    model, info = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    optional = model._keys_to_ignore_on_load_missing or []
    missing = [key for key in _names(info["missing_keys"]) if not any(re.search(rule, key) for rule in optional)]
    if wrong := [*missing, *_names(info["mismatched_keys"])]:
        raise CheckpointError(f"{source.path}: tensor {wrong[0]} is missing or has another shape ({len(wrong)} such)")
    found: PreTrainedModel = model.eval()
    return found


def _names(found: Any) -> list[str]:
    """Return names of tensors in a list of transformers, whose entries may be tuples that begin with one."""
    return sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in found)


def _transposed(packed: PackedCheckpoint) -> list[str]:
    """Return the packed modules that the model keeps as [K, N]."""
    model = skeleton(model_config(packed), torch.float32)
    infos = {key: packed.info(key) for key in packed}
    banks_apart(model, infos)
    files = {id(layer): module for module, layer in packed.layers.items()}
    places, kinds = placed(model, infos, packed.layers), (nn.Linear, nn.Embedding)
    return [files[id(layer)] for name, layer in places.items() if not isinstance(model.get_submodule(name), kinds)]


def folder_of(path: Path) -> CheckpointReader:
    """Return the dense folder at `path`, opened.

    Raises:
        CheckpointError: it is packed.
    """
    reader = CheckpointReader(path)
    if reader.config.get("quantization_config") is not None:
        raise CheckpointError(f"{path}: is packed; --against names the model that was quantized")
    return reader
