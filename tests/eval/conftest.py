from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmq_eval.windows import Windows, cut_windows

VOCAB = 64


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Return a function that makes a random Llama of two layers from a seed."""

    def make(seed: int, vocab_size: int = VOCAB) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            # wide enough that the predictions of two seeds are far from uniform and from each other
            initializer_range=0.3,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def windows() -> Windows:
    """Return four windows of 150 predictions, more than one block of rows, with gaps between them."""
    ids = torch.randint(VOCAB, (700,), generator=torch.Generator().manual_seed(5))
    return cut_windows(ids, seq_len=150, windows=4, spread=True)
