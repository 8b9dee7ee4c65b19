from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from llmq.cli.chat import chat_command
from llmq.errors import CheckpointError

TEMPLATE = "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}{{ m.content }} {% endfor %}w3"


@pytest.fixture
def folder(dense_folder: Callable[[int], Path], tmp_path: Path) -> Path:
    """Return a checkpoint whose tokenizer writes conversations as words."""
    AutoModelForCausalLM.from_pretrained(dense_folder(0)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(dense_folder(0))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def answers(folder: Path, lines: list[str], *options: object) -> list[str]:
    app = typer.Typer()
    app.command()(chat_command)
    arguments = [str(folder), "--max-new-tokens", "4", *map(str, options)]
    result = CliRunner().invoke(app, arguments, input="\n".join(lines) + "\n", catch_exceptions=False)
    assert result.exit_code == 0
    return [line for line in result.stdout.splitlines() if line]


def continued(folder: Path, prompt: str) -> str:
    """Return the four most likely words after `prompt`, one after another."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = [int(word[1:]) for word in prompt.split()]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert 0 not in ids, "the model ends early; choose other words for this test"
    return " ".join(f"w{i}" for i in ids[-4:])


def test_each_turn_sees_the_ones_before(folder: Path) -> None:
    first, second = answers(folder, ["w7", "w9"], "--temperature", 0)
    assert first == continued(folder, "w1 w7 w3")
    assert second == continued(folder, f"w1 w7 w2 {first} w1 w9 w3")


def test_clear_forgets_all_but_the_system_prompt(folder: Path) -> None:
    found = answers(folder, ["w7", "/clear", "", "w7", "/exit", "w7"], "--temperature", 0, "--system", "w5")
    assert found == [continued(folder, "w2 w5 w1 w7 w3")] * 2


def test_sampled_answers_follow_the_seed(folder: Path) -> None:
    def said(seed: int) -> list[str]:
        return answers(folder, ["w7"], "--temperature", 1, "--seed", seed)

    assert said(0) == said(0)
    assert len({tuple(said(seed)) for seed in range(4)}) > 1


def test_a_model_without_a_chat_template_is_refused(
    invoke: Callable[..., Any], dense_folder: Callable[[int], Path]
) -> None:
    with pytest.raises(CheckpointError, match=r"no chat template.*use llmq generate"):
        invoke(chat_command, dense_folder(0))
