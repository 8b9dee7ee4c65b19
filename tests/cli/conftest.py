from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

WORDS = 64


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Return a function that runs one command with arguments, and lets what it raises pass."""

    def run(command: Callable[..., Any], *arguments: object) -> Result:
        app = typer.Typer()
        app.command()(command)
        return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)

    return run


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a function that gives the folder of a random dense Llama, made from a seed, with its tokenizer."""
    made: dict[int, Path] = {}

    def make(seed: int) -> Path:
        if seed not in made:
            made[seed] = tmp_path_factory.mktemp(f"dense-{seed}")
            torch.manual_seed(seed)
            config = LlamaConfig(
                vocab_size=WORDS,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.3,
                bos_token_id=0,
                eos_token_id=0,
            )
            LlamaForCausalLM(config).save_pretrained(made[seed])
            tokenizer = Tokenizer(
                models.WordLevel({"<s>": 0, **{f"w{i}": i for i in range(1, WORDS)}}, unk_token="<s>")
            )
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
            wrapped.save_pretrained(made[seed])
        return made[seed]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text of 501 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    ids = torch.randint(1, WORDS, (501,), generator=torch.Generator().manual_seed(1)).tolist()
    path.write_text(" ".join(f"w{i}" for i in ids), encoding="utf-8")
    return path
