"""Calibration data: a text file, jsonl file, dataset or chat samples become token windows, deterministically.

This module knows how text becomes int64 ``[samples, seq_len]``; it knows nothing of models or Hessians.

The default is *packed windows*: all text is one stream of tokens that is cut into aligned windows, of which
a seeded draw takes `num_samples` different ones. No token is padding and no token is used twice, so the
Hessian of a layer is a plain sum. Drawing start positions freely, as the GPTQ authors' code does, was not
chosen: on a short text the windows overlap and the same sentences count several times without anyone
noticing.

*Response-only* samples (`llmq.responses`) are not packed: a conversation is one row, with a mask of the
predictions that count.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmq.errors import CalibrationError, SpecError
from llmq.responses import check_row, tokenize_row
from llmq.texts import jsonl_rows, looks_like_file, read_dataset, read_file, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmq.recipe import Recipe

DEFAULT_SAMPLES = 128
BUNDLED = "bundled text"  # the `source` of a Calibration for which the user named none

# Tokenizers are given blocks of about this many characters: several blocks use several threads, and one
# that treats a string in more than linear time stays bounded. A boundary costs at most one differently
# split token.
_BLOCK_CHARS = 1_000_000

# A dataset may be far larger than memory or patience; about 16 characters are read for every token that is
# needed. English has about 4 characters per token, so the windows come from a stretch about four times as
# long as they are.
_DATASET_CHARS_PER_TOKEN = 16


@dataclass(frozen=True)
class Calibration:
    """Token windows that a model is run on to see what its layers get as inputs."""

    input_ids: Tensor  # int64 [S, L]
    attention_mask: Tensor | None  # bool [S, L], True where a token counts; None: everywhere
    source: str  # the file or dataset as it was named, or BUNDLED
    fingerprint: str  # sha256 over ids and masks, hexadecimal
    loss_mask: Tensor | None = None  # bool [S, L], True where token t+1 is answer: what is predicted at t counts

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    @property
    def counted(self) -> Tensor:
        """Where the prediction of the next token counts, bool [S, L]; never in the last column or from or to padding.

        That is the loss mask or, without one, every place with a token of text behind it.
        """
        if self.loss_mask is not None:
            return self.loss_mask
        there = (
            torch.ones_like(self.input_ids, dtype=torch.bool) if self.attention_mask is None else self.attention_mask
        )
        counted = torch.zeros_like(there)
        counted[:, :-1] = there[:, :-1] & there[:, 1:]
        return counted


def calibration_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Calibration:
    """Return the windows that `recipe` asks for; errors as of `load_calibration`."""
    return load_calibration(
        recipe.calibration,
        tokenizer,
        num_samples=recipe.num_samples,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        response_only=recipe.response_only,
    )


def load_calibration(
    source: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int | None,
    seq_len: int,
    seed: int,
    response_only: bool = False,
) -> Calibration:
    """Return `num_samples` packed windows of `seq_len` tokens, drawn without overlap from `source`.

    `source` is a UTF-8 text file, a ``.jsonl`` file with a field ``text`` on every line, the name of a
    dataset (its split ``train``, column ``text``; ``name:config`` picks a configuration), or None for the
    text that ships with llmq. Where the tokenizer starts a text with a BOS token, every window starts with
    one and holds one token of text less. The same arguments give the same windows; another `seed` gives
    others. `num_samples` None stands for 128, or for as many as the text that ships with llmq holds.

    With `response_only`, `source` is a ``.jsonl`` file of conversations (`llmq.responses`). Each drawn one is
    a row of its own, cut off after `seq_len` tokens and padded on the right; `loss_mask` says where the next
    token is of an answer. Conversations of which no answer lies within `seq_len` are passed over. None then
    stands for 128, or for as many as there are.

    Raises SpecError for a `num_samples` below 1 or a `seq_len` below 2, and CalibrationError when the
    source is missing, a folder, empty, binary, without its fields, or too short for that many windows;
    response-only also without a chat template that renders its messages, or without answers.
    """
    wanted = DEFAULT_SAMPLES if num_samples is None else num_samples
    if wanted < 1 or seq_len < 2:
        raise SpecError(
            f"calibration: {wanted} samples of {seq_len} tokens; --num-samples must be at least 1 and "
            "--seq-len at least 2"
        )
    generator = torch.Generator().manual_seed(seed)
    if response_only:
        return _load_responses(source, tokenizer, num_samples, seq_len, generator)
    if source is None:
        texts: Iterable[str] = [resources.files("llmq").joinpath("data/calibration.txt").read_text("utf-8")]
    elif Path(source).exists() or looks_like_file(source):
        texts = read_file(source)
    else:
        budget = wanted * seq_len * _DATASET_CHARS_PER_TOKEN
        texts = read_dataset(source, budget=budget, generator=generator)
    name = BUNDLED if source is None else source
    stream = _tokenize("\n\n".join(texts), tokenizer)
    lead = _leading_ids(tokenizer)
    length = seq_len - len(lead)
    if source is None and num_samples is None:
        wanted = max(1, min(wanted, len(stream) // length))
    windows = _draw_windows(stream, wanted, length, source=name, generator=generator)
    ids = torch.cat([lead.expand(wanted, -1), windows], dim=1)
    return Calibration(ids, None, name, _fingerprint(ids, None))


def from_token_lists(
    lists: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    source: str,
    answers: Sequence[Sequence[bool]] | None = None,
) -> Calibration:
    """Return samples of different lengths, such as chats, as one right-padded batch with its mask.

    The mask comes from the lengths and never from comparing with `pad_token_id`, which many models share
    with EOS. Without any padding the mask is None. `answers`, of the lengths of `lists`, says which tokens
    are answers, and makes the loss mask. Raises CalibrationError when there are no samples or one of them is
    empty.
    """
    if not lists:
        raise CalibrationError(f"{source}: no calibration samples; give at least one")
    empty = [i for i, tokens in enumerate(lists) if not len(tokens)]
    if empty:
        raise CalibrationError(f"{source}: calibration sample {empty[0]} has no tokens; leave it out")
    lengths = torch.tensor([len(tokens) for tokens in lists])
    ids = torch.full((len(lists), int(lengths.max())), pad_token_id, dtype=torch.int64)
    for row, tokens in zip(ids, lists, strict=True):
        row[: len(tokens)] = torch.as_tensor(tokens, dtype=torch.int64)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    kept = None if bool(mask.all()) else mask
    predictions = None
    if answers is not None:
        predictions = torch.zeros_like(mask)
        for row, flags in zip(predictions, answers, strict=True):
            row[: len(flags) - 1] = torch.as_tensor(flags[1:], dtype=torch.bool)  # at t, token t+1 is predicted
    return Calibration(ids, kept, source, _fingerprint(ids, kept, predictions), predictions)


def random_windows(calibration: Calibration, share: float, words: int, seed: int) -> Calibration | None:
    """Return windows of tokens drawn evenly from the vocabulary, about `share` times as many as `calibration` has.

    Text of one kind leaves many tokens out. A solver moves its errors to where the Hessian sees nothing, which is where
    other text then meets them; a few windows of everything close those holes. None for a share of 0. A token that all
    windows begin with (BOS) begins these too; ids are drawn from 0 to `words` - 1.

    Raises:
        SpecError: `share` is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise SpecError(f"share of random windows is {share}; use 0 to 1")
    if share == 0:
        return None
    samples, length = calibration.input_ids.shape
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(words, (max(1, round(share * samples)), length), generator=generator)
    lead = calibration.input_ids[:, 0]
    if bool((lead == lead[0]).all()):
        ids[:, 0] = lead[0]
    return Calibration(ids, None, f"{words} tokens at random", _fingerprint(ids, None))


def split_held_out(calibration: Calibration, share: float, seed: int) -> tuple[Calibration, Calibration | None]:
    """Return `calibration` without about `share` of its windows, and those windows; (all, None) for a share of 0.

    Windows stay whole, and each part has at least one. As many equal stretches as windows are held out give
    one each, so that these are spread over the set. The same seed holds out the same windows.

    Raises SpecError for a `share` not in [0, 1), and CalibrationError when there is only one window to split.
    """
    if not 0 <= share < 1:
        raise SpecError(f"held-out share is {share}; use a share of the calibration windows from 0 to below 1")
    if share == 0:
        return calibration, None
    samples = calibration.input_ids.shape[0]
    if samples < 2:
        raise CalibrationError(
            f"calibration {calibration.source}: 1 window cannot be split; give more samples or hold out a share of 0"
        )
    count = min(max(round(share * samples), 1), samples - 1)
    generator = torch.Generator().manual_seed(seed)
    edges = [i * samples // count for i in range(count + 1)]
    held = torch.zeros(samples, dtype=torch.bool)
    for low, high in itertools.pairwise(edges):
        held[low + int(torch.randint(high - low, (), generator=generator))] = True
    return _select(calibration, ~held), _select(calibration, held)


def _select(calibration: Calibration, rows: Tensor) -> Calibration:
    """Return the windows at which the bool `rows` [S] holds."""
    ids = calibration.input_ids[rows]
    masks = (calibration.attention_mask, calibration.loss_mask)
    kept, predictions = (None if mask is None else mask[rows] for mask in masks)
    return Calibration(ids, kept, calibration.source, _fingerprint(ids, kept, predictions), predictions)


def _fingerprint(ids: Tensor, mask: Tensor | None, loss_mask: Tensor | None = None) -> str:
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.numpy().astype("<i8").tobytes())
    if mask is not None:
        digest.update(mask.numpy().tobytes())
    if loss_mask is not None:
        digest.update(b"loss" + loss_mask.numpy().tobytes())
    return digest.hexdigest()


def _load_responses(
    source: str | None,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int | None,
    seq_len: int,
    generator: torch.Generator,
) -> Calibration:
    """Return drawn conversations of the ``.jsonl`` file `source` with the mask of their answers."""
    if source is None or not source.endswith(".jsonl"):
        raise CalibrationError(
            f"response-only calibration from {source or BUNDLED}: only a .jsonl file says what is prompt and what is "
            "answer; name one with --calibration"
        )
    rows = list(jsonl_rows(read_text(source), source))
    for number, row in rows:
        check_row(row, f"{source}, line {number}")
    lead = _leading_ids(tokenizer).tolist()
    lists: list[list[int]] = []
    answers: list[list[bool]] = []
    for i in torch.randperm(len(rows), generator=generator).tolist():
        number, row = rows[i]
        ids, answer = tokenize_row(row, tokenizer, lead, f"{source}, line {number}")
        if any(answer[1:seq_len]):
            lists.append(ids[:seq_len])
            answers.append(answer[:seq_len])
        if len(lists) == (num_samples or DEFAULT_SAMPLES):
            break
    if not lists or len(lists) < (num_samples or 1):
        advice = f"lower --num-samples to {len(lists)} or give" if lists else "give"
        raise CalibrationError(
            f"calibration {source}: {len(lists)} of {len(rows)} conversations have an answer within {seq_len} tokens, "
            f"{num_samples or 1} needed; {advice} more of them, or raise --seq-len"
        )
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    return from_token_lists(lists, pad_token_id=pad, source=source, answers=answers)


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the tokens of `text` without special ones, int64 [T]."""
    pieces = [torch.empty(0, dtype=torch.int64)]
    for block in _blocks(text):  # one at a time: what tokenizers return takes a hundred bytes for every character
        ids = tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append(torch.tensor(ids, dtype=torch.int64))
    return torch.cat(pieces)


def _blocks(text: str) -> Iterator[str]:
    """Yield `text` in pieces that end at an empty line, of `_BLOCK_CHARS` characters or a paragraph more."""
    start = 0
    while start < len(text):
        gap = text.find("\n\n", start + _BLOCK_CHARS)
        stop = len(text) if gap < 0 else gap + 2
        yield text[start:stop]
        start = stop


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return what the tokenizer puts before every text: int64 [1] with its BOS token, or [0]."""
    bos = tokenizer.bos_token_id
    first = tokenizer("a")["input_ids"][:1]
    return torch.tensor(first if first == [bos] else [], dtype=torch.int64)


def _draw_windows(stream: Tensor, num_samples: int, length: int, *, source: str, generator: torch.Generator) -> Tensor:
    """Return different aligned windows of `stream` [T], counted from a drawn token: [num_samples, length]."""
    available = len(stream) // length
    if available < num_samples:
        raise CalibrationError(
            f"calibration {source} is too short: it has {len(stream)} tokens, and {num_samples} windows of "
            f"{length} need {num_samples * length}; " + _how_to_fit(len(stream), available, num_samples, length)
        )
    offset = int(torch.randint(len(stream) - available * length + 1, (), generator=generator))
    windows = stream[offset : offset + available * length].view(available, length)
    return windows[torch.randperm(available, generator=generator)[:num_samples]]


def _how_to_fit(tokens: int, available: int, num_samples: int, length: int) -> str:
    options = []
    if available:
        options.append(f"lower --num-samples to {available} or less")
    if tokens // num_samples >= 2:
        options.append(f"lower --seq-len to {tokens // num_samples} or less")
    return ", ".join([*options, "or give more text with --calibration"]) if options else "give more text"
