"""Small models as ONNX folders, and how they became so."""

from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA, WORDS
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from llmq.checkpoint import CheckpointReader
from llmq.exports.onnx import export
from llmq.packed import PackedCheckpoint

ONE = {**LLAMA, "num_hidden_layers": 1}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "norm_topk_prob": True}
GPT2 = {"vocab_size": WORDS, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}


class Case(NamedTuple):
    """A model and how it is quantized."""

    config: PretrainedConfig
    recipe: dict[str, Any]
    dtype: torch.dtype = torch.float32


CASES = {
    # tied embeddings in bfloat16, zeros, columns out of order, a layer that stays dense
    "llama": Case(
        LlamaConfig(**{**ONE, "tie_word_embeddings": True}),
        {"bits": 4, "sym": False, "ignore": ["up_proj"]},
        torch.bfloat16,
    ),
    "gpt2": Case(GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0), {"bits": 2, "sym": False}),  # biases, Conv1D
    # attention of Qwen3, with norms of its own; whole rows in one group
    "qwen3": Case(Qwen3MoeConfig(**ONE, **EXPERTS, head_dim=32), {"bits": 8, "sym": True, "group_size": -1}),
}


class Exported(NamedTuple):
    """A packed folder and what became of it."""

    packed: PackedCheckpoint
    folder: Path
    types: dict[str, str]
    read_early: int  # bytes of the largest tensor that was read before the file was begun


def shuffle(folder: Path) -> None:
    """Put the columns of some layers out of order, as act-order of others does."""
    content = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in content if name.endswith(("q_proj.g_idx", "down_proj.g_idx"))]:
        content[name] = content[name][torch.randperm(len(content[name]), generator=draw)]
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def watched(packed: PackedCheckpoint, target: Path, patch: pytest.MonkeyPatch) -> Exported:
    """Export, and watch what is read before anything is written."""
    sizes, early = [0], [0]
    read, save = CheckpointReader.read, ir.save

    def reads(self: CheckpointReader, name: str, *args: Any) -> Tensor:
        found = read(self, name, *args)
        sizes.append(found.nbytes)
        return found

    def saves(*args: Any, **kwargs: Any) -> None:
        early[0] = max(sizes)
        save(*args, **kwargs)

    patch.setattr(CheckpointReader, "read", reads)
    patch.setattr(ir, "save", saves)
    return Exported(packed, target, export(packed, target), early[0])
