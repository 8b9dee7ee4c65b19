"""Tiny models with packed embeddings, for the tests of what is written and of what is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LLAMA, WORDS, make_llama, make_model
from torch import Tensor, nn
from transformers import Gemma3TextConfig, GPT2Config

import llmq
from llmq.driver import quantize
from llmq.recipe import Recipe

IDS = torch.randint(1, WORDS, (2, 16), generator=torch.Generator().manual_seed(0))
NAME = "model.embed_tokens"
GEMMA = Gemma3TextConfig(
    **{key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"} | {"num_key_value_heads": 1},
    head_dim=16,
    sliding_window=32,
)
Make = Callable[..., Path]


def original(kind: str, folder: Path) -> Path:
    if kind == "gemma3":
        return make_model(folder, GEMMA)
    if kind == "gpt2":
        return make_model(folder, GPT2Config(vocab_size=WORDS, n_embd=64, n_layer=2, n_head=2, n_positions=64))
    return make_llama(folder, tie_word_embeddings=kind == "tied")


def maker(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that gives a model quantized with packed embeddings, beside the original in `dense`."""
    found: dict[Any, Path] = {}

    def make(kind: str = "tied", bits: int | None = 4, *, sym: bool = False) -> Path:
        key = (kind, bits, sym)
        if key not in found:
            folder = tmp_path_factory.mktemp("embedding")
            recipe = Recipe(method="rtn", bits=4, sym=sym, group_size=32, format="llmq", embeddings=bits)
            quantize(original(kind, folder / "dense"), folder / "packed", recipe)
            found[key] = folder / "packed"
        return found[key]

    return make


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    model: nn.Module = llmq.load(folder, dtype=dtype)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits.float()
    return found
