"""The model that a packed folder is for: what it needs, and what the files have of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from llmq.checkpoint import TensorInfo
from llmq.errors import LlmqError
from llmq.families import skeleton
from llmq.formats import Format
from llmq.names import file_names
from llmq.places import banks_apart
from llmq.preflight import model_config


@dataclass(frozen=True)
class Anatomy:
    """Names of the model against names in the files."""

    parameters: dict[str, str | None]  # by name in the model, the tensor of the files, None: there is none
    packed: dict[str, str]  # by module of the model, its name in the files
    linears: frozenset[str]  # modules of the model
    sizes: dict[str, tuple[int, int]]  # outputs and inputs, by module of the model that is packed
    experts: tuple[str, ...]  # prefixes of banks
    head: str | None  # module
    embedding: str | None
    tied: bool
    head_width: int
    text_only: bool


class Opened(Protocol):
    """A folder as far as it matters here."""

    path: Path
    config: dict[str, Any]
    infos: dict[str, TensorInfo]

    @property
    def method(self) -> Format:
        """Its layout."""
        ...


def anatomy_of(patient: Opened) -> Anatomy | str:
    """Return what transformers' model of this config.json needs, or why it has none."""
    from transformers.pytorch_utils import Conv1D

    try:
        config = model_config(patient)  # type: ignore[arg-type]  # reads path and config only
        model = skeleton(config, torch.float32)
        banks = banks_apart(model, patient.infos)
        names = file_names(model, patient.infos, merged=False)
        marker = f".{patient.method.marker}"
        packed = {
            name.removesuffix(".weight"): key.removesuffix(marker)
            for name, key in file_names(model, patient.infos, packed_suffix=marker).items()
        }
    except LlmqError as error:
        return str(error)
    modules = {id(module): name for name, module in model.named_modules()}
    shapes = {name: tuple(model.get_parameter(f"{name}.weight").shape) for name in packed}
    turned = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Anatomy(
        {name: names.get(name) for name, _ in model.named_parameters()},
        packed,
        frozenset(name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))),
        {name: (shape[-1], shape[0]) if name in turned else (shape[0], shape[-1]) for name, shape in shapes.items()},
        tuple(f"{name}." for name in banks),
        modules.get(id(head)),
        modules.get(id(embedding)),
        bool(getattr(text, "tie_word_embeddings", False)),
        int(width),
        model.main_input_name == "input_ids",
    )
