"""The tokens that every loader is asked about: half of them drawn, half from the text that llmq brings along."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import llmq

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROWS, LENGTH = 4, 64
_SEED = 0


class Prompts(NamedTuple):
    """The same tokens for all."""

    ids: Tensor  # int64 [ROWS, L]; the first rows are text, so that what follows them can be read
    text_rows: int  # 0 where the folder has no tokenizer


def fixed_prompts(folder: Path, config: PretrainedConfig) -> Prompts:
    """Return windows of the calibration text by the tokenizer in `folder`, and windows of random tokens.

    They depend on vocabulary and tokenizer alone. L is 64, or what the model of `config` takes if that is less.
    """
    text_config = config.get_text_config()
    length = min(LENGTH, int(getattr(text_config, "max_position_embeddings", None) or LENGTH))
    draw = random.Random(_SEED)
    drawn = [[draw.randrange(text_config.vocab_size) for _ in range(length)] for _ in range(ROWS)]
    text = _text_rows(folder, length, text_config.vocab_size)
    return Prompts(torch.tensor([*text, *drawn][:ROWS]), len(text))


def _text_rows(folder: Path, length: int, vocabulary: int) -> list[list[int]]:
    """Return the first and the middle window of the text, or nothing if the folder has no tokenizer for it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError):
        return []
    text = (Path(llmq.__file__).parent / "data/calibration.txt").read_text(encoding="utf-8")
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 2 * length or max(ids) >= vocabulary:
        return []
    middle = len(ids) // 2
    return [ids[:length], ids[middle : middle + length]]
