"""Calibration data: a text file, jsonl file, dataset or chat samples become token windows, deterministically.

This module knows how text becomes int64 ``[samples, seq_len]``; it knows nothing of models, Hessians or
recipes.

The default is *packed windows*: all text is one stream of tokens that is cut into aligned windows, of which
a seeded draw takes `num_samples` different ones. No token is padding and no token is used twice, so the
Hessian of a layer is a plain sum. Drawing start positions freely, as the GPTQ authors' code does, was not
chosen: on a short text the windows overlap and the same sentences count several times without anyone
noticing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmq.errors import CalibrationError, SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
_DATASET_ROWS = 1000  # rows fetched at a time


@dataclass(frozen=True)
class Calibration:
    """Token windows that a model is run on to see what its layers get as inputs."""

    input_ids: Tensor  # int64 [S, L]
    attention_mask: Tensor | None  # bool [S, L], True where a token counts; None: everywhere
    source: str  # the file or dataset as it was named, or BUNDLED
    fingerprint: str  # sha256 over ids and mask, hexadecimal

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


def load_calibration(
    source: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int | None,
    seq_len: int,
    seed: int,
) -> Calibration:
    """Return `num_samples` packed windows of `seq_len` tokens, drawn without overlap from `source`.

    `source` is a UTF-8 text file, a ``.jsonl`` file with a field ``text`` on every line, the name of a
    dataset (its split ``train``, column ``text``; ``name:config`` picks a configuration), or None for the
    text that ships with llmq. Where the tokenizer starts a text with a BOS token, every window starts with
    one and holds one token of text less. The same arguments give the same windows; another `seed` gives
    others. `num_samples` None stands for 128, or for as many as the text that ships with llmq holds.

    Raises SpecError for a `num_samples` below 1 or a `seq_len` below 2, and CalibrationError when the
    source is missing, a folder, empty, binary, without its text field, or too short for that many windows.
    """
    wanted = DEFAULT_SAMPLES if num_samples is None else num_samples
    if wanted < 1 or seq_len < 2:
        raise SpecError(
            f"calibration: {wanted} samples of {seq_len} tokens; --num-samples must be at least 1 and "
            "--seq-len at least 2"
        )
    generator = torch.Generator().manual_seed(seed)
    if source is None:
        texts: Iterable[str] = [resources.files("llmq").joinpath("data/calibration.txt").read_text("utf-8")]
    elif Path(source).exists() or _looks_like_file(source):
        texts = _read_file(source)
    else:
        budget = wanted * seq_len * _DATASET_CHARS_PER_TOKEN
        texts = _read_dataset(source, budget=budget, generator=generator)
    name = BUNDLED if source is None else source
    stream = _tokenize("\n\n".join(texts), tokenizer)
    lead = _leading_ids(tokenizer)
    length = seq_len - len(lead)
    if source is None and num_samples is None:
        wanted = max(1, min(wanted, len(stream) // length))
    windows = _draw_windows(stream, wanted, length, source=name, generator=generator)
    ids = torch.cat([lead.expand(wanted, -1), windows], dim=1)
    return Calibration(ids, None, name, _fingerprint(ids, None))


def from_token_lists(lists: Sequence[Sequence[int]], *, pad_token_id: int, source: str) -> Calibration:
    """Return samples of different lengths, such as chats, as one right-padded batch with its mask.

    The mask comes from the lengths and never from comparing with `pad_token_id`, which many models share
    with EOS. Without any padding the mask is None. Raises CalibrationError when there are no samples or one
    of them is empty.
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
    return Calibration(ids, kept, source, _fingerprint(ids, kept))


def _fingerprint(ids: Tensor, mask: Tensor | None) -> str:
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.numpy().astype("<i8").tobytes())
    if mask is not None:
        digest.update(mask.numpy().tobytes())
    return digest.hexdigest()


def _looks_like_file(source: str) -> bool:
    """Whether a `source` that does not exist was meant as a file, so that the error speaks of a file."""
    return source.startswith((".", "/", "~")) or source.endswith((".txt", ".jsonl", ".md", ".text"))


def _read_file(source: str) -> list[str]:
    """Return the documents in the file `source`: one for a text file, one per line for jsonl."""
    path = Path(source)
    if not path.exists():
        raise CalibrationError(f"calibration file {source} does not exist; check the path given to --calibration")
    if path.is_dir():
        raise CalibrationError(f"calibration {source} is a folder; name one text or .jsonl file in it")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"calibration file {source} cannot be read: {error.strerror}") from error
    text = _decode(raw, source)
    documents = _parse_jsonl(text, source) if path.suffix == ".jsonl" else [text]
    if not any(document.strip() for document in documents):
        raise CalibrationError(f"calibration file {source} is empty ({len(raw)} bytes); it must hold text")
    return documents


def _decode(raw: bytes, source: str) -> str:
    advice = "--calibration takes UTF-8 text or .jsonl"
    zero = raw.find(b"\0")
    if zero >= 0:
        raise CalibrationError(f"calibration file {source} is binary (NUL at byte {zero}); {advice}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"calibration file {source} is not UTF-8 (0x{raw[error.start]:02x} at byte {error.start}); {advice}"
        ) from error
    return text.replace("\r\n", "\n").removeprefix("\ufeff")


def _parse_jsonl(text: str, source: str) -> list[str]:
    """Return field ``text`` of every line that is not blank."""
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{source}, line {number}: not JSON ({error.msg}); one object per line") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            found = f"its fields are {', '.join(row) or '(none)'}" if isinstance(row, dict) else "not an object"
            raise CalibrationError(f'{source}, line {number}: no text in a field "text"; {found}')
        documents.append(row["text"])
    return documents


def _read_dataset(source: str, *, budget: int, generator: torch.Generator) -> list[str]:
    """Return rows of the dataset `source` from a drawn row onwards, until they hold `budget` characters.

    Rows stay in order because in many datasets, wikitext among them, a document spans several of them.
    """
    rows = _open_dataset(source)
    if "text" not in rows.column_names:
        raise CalibrationError(
            f'dataset {source}: no column "text" (it has {", ".join(rows.column_names)}); '
            "write the text to a file and name that file"
        )
    total = len(rows)
    texts: list[str] = []
    chars = 0
    first = int(torch.randint(max(total, 1), (), generator=generator))
    for batch in _circular_batches(total, first):
        read = [text for text in rows[batch.start : batch.stop]["text"] if text and text.strip()]
        texts += read
        chars += sum(map(len, read))
        if chars >= budget:
            break
    if not chars:
        raise CalibrationError(f"dataset {source} is empty ({total} rows without text); name another one")
    return texts


def _circular_batches(total: int, first: int) -> Iterator[range]:
    """Yield ranges of rows that cover ``first … total`` and then ``0 … first``."""
    for begin, end in ((first, total), (0, first)):
        for start in range(begin, end, _DATASET_ROWS):
            yield range(start, min(start + _DATASET_ROWS, end))


def _open_dataset(source: str) -> Any:
    import datasets

    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split="train")
    # What loading a dataset raises when the network, the name, the configuration or the split is wrong:
    # OSError (ConnectionError, DatasetNotFoundError), ValueError (unknown configuration or split) and its
    # own base class.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"calibration {source}: no file of that name here, and no dataset of that name could be loaded "
            f"({reason}); check the name, go online once to download it, or name a text file"
        ) from error


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the tokens of `text` without special ones, int64 [T]."""
    batches = tokenizer(list(_blocks(text)), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for batch in batches for token in batch], dtype=torch.int64)


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
