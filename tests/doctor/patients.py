"""Sound packed folders of tiny models in all formats, made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_models import WORDS, make_llama, make_model
from transformers import GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config, Qwen3MoeConfig

from llmq.convert import convert
from llmq.doctor import diagnose
from llmq.driver import quantize
from llmq.grids.vq import VECTORS
from llmq.recipe import Recipe

MOE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
BIASED = {**MOE, "intermediate_size": 128}
BIASED.pop("num_experts_per_tok")
TIED: dict[str, Any] = {**BIASED, "tie_word_embeddings": True}
MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: make_llama(folder),
    "tied": lambda folder: make_model(folder, LlamaConfig(**TIED)),
    "qwen2": lambda folder: make_model(folder, Qwen2Config(**BIASED)),
    "gpt2": lambda folder: make_model(
        folder, GPT2Config(vocab_size=WORDS, n_embd=64, n_layer=2, n_head=2, n_positions=64)
    ),
    "qwen3_moe": lambda folder: make_model(
        folder, Qwen3MoeConfig(**MOE, head_dim=16, num_experts=4, moe_intermediate_size=32)
    ),
    "mixtral": lambda folder: make_model(folder, MixtralConfig(**MOE, num_local_experts=4)),
}


class Ward:
    """Packed folders below `folder`, by model, format, bits and symmetry; nobody writes to them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[Any, Any] = {}

    def __call__(self, model: str = "llama", format: str = "gptq", bits: int = 4, *, sym: bool = True) -> Path:
        key = (model, format, bits, sym)
        if key not in self._made:
            folder = self._folder / "-".join(map(str, key))
            if format in VECTORS:
                quantize(self.dense(model), folder, Recipe(method="rtn", grid=format, bits=bits))
            elif format in ("gptq", "gptq_v2") and (format == "gptq_v2") != sym:
                recipe = Recipe(method="rtn", bits=bits, sym=sym, group_size=32, format=format)
                quantize(self.dense(model), folder, recipe)
            else:
                convert(self(model, "gptq" if sym else "gptq_v2", bits, sym=sym), folder, format)
            self._made[key] = folder
        return self._made[key]

    def names(self, model: str, format: str, bits: int, sym: bool) -> set[str]:
        """Return what the doctor says of a folder as it was made."""
        key = ("names", model, format, bits, sym)
        if key not in self._made:
            self._made[key] = {finding.name for finding in diagnose(self(model, format, bits, sym=sym))}
        return self._made[key]

    def dense(self, model: str) -> Path:
        """Return the model that the others are made of."""
        if model not in self._made:
            self._made[model] = MODELS[model](self._folder / f"dense-{model}")
        return self._made[model]
