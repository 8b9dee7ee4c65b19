"""Tiny random models as checkpoint folders, with a tokenizer and a text that belong to them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

WORDS = 128  # size of the vocabulary: <s> and w1 … w127

LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # far from a uniform output, so that damage shows
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def make_llama(folder: Path, *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """Write a random Llama of 2 blocks, hidden size 64, intermediate size 128 to `folder`, and return it."""
    return make_model(folder, LlamaConfig(**{**LLAMA, **overrides}), seed=seed, max_shard_size=max_shard_size)


def make_model(
    folder: Path,
    config: PretrainedConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a causal language model with random weights, and the tokenizer of `make_tokenizer`, to `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows <s> (token 0) and the words w1 … w127, separated by blanks."""
    words = {"<s>": 0, **{f"w{i}": i for i in range(1, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def make_text(path: Path, tokens: int, *, seed: int = 0) -> Path:
    """Write a text of exactly `tokens` tokens to `path` and return it.

    Words are drawn unevenly, by a random table of successors, so that inputs of layers are correlated as real ones are.
    """
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(1, WORDS, (WORDS, 4), generator=generator)
    choices = torch.randint(4, (tokens,), generator=generator).tolist()
    words, word = [], 1
    for choice in choices:
        word = int(successors[word, choice])
        words.append(f"w{word}")
    path.write_text(" ".join(words), encoding="utf-8")
    return path
