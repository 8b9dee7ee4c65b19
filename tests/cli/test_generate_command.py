import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmq.cli.generate import generate_command
from llmq.errors import CheckpointError, SpecError


def test_greedy_text_is_the_most_likely_one(invoke: Callable[..., Any], dense_folder: Callable[[int], Path]) -> None:
    folder = dense_folder(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [3, 7]
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert 0 not in ids, "the model ends early; choose another seed for this test"
    result = invoke(generate_command, folder, "w3 w7", "--max-new-tokens", 5)
    assert result.stdout == " ".join(f"w{i}" for i in ids) + "\n"


def test_json_has_prompt_text_and_count(invoke: Callable[..., Any], dense_folder: Callable[[int], Path]) -> None:
    result = invoke(generate_command, dense_folder(0), "w3 w7", "--max-new-tokens", 5, "--json")
    found = json.loads(result.stdout)
    assert found["prompt"] == "w3 w7"
    assert found["text"].startswith("w3 w7 ")
    assert found["new_tokens"] == 5


def test_sampled_text_follows_the_seed(invoke: Callable[..., Any], dense_folder: Callable[[int], Path]) -> None:
    def text(seed: int) -> str:
        options = ("--temperature", 1, "--seed", seed, "--max-new-tokens", 12)
        return str(invoke(generate_command, dense_folder(0), "w3", *options).stdout)

    assert text(0) == text(0)
    assert len({text(seed) for seed in range(4)}) > 1


def test_an_empty_prompt_is_refused(invoke: Callable[..., Any], dense_folder: Callable[[int], Path]) -> None:
    with pytest.raises(SpecError, match="the prompt has no tokens"):
        invoke(generate_command, dense_folder(0), "")


def test_a_missing_folder_is_refused(invoke: Callable[..., Any]) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        invoke(generate_command, "./missing", "w1")
