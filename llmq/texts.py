"""Where calibration text comes from: UTF-8 files, ``.jsonl`` rows and datasets, with errors that say what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmq.errors import CalibrationError

_DATASET_ROWS = 1000  # rows fetched at a time


def looks_like_file(source: str) -> bool:
    """Whether a `source` that does not exist was meant as a file, so that the error speaks of a file."""
    return source.startswith((".", "/", "~")) or source.endswith((".txt", ".jsonl", ".md", ".text"))


def read_file(source: str) -> list[str]:
    """Return the documents in the file `source`: one for a text file, one per line for jsonl."""
    text = read_text(source)
    if not source.endswith(".jsonl"):
        return [text]
    documents = []
    for number, row in jsonl_rows(text, source):
        if not isinstance(row.get("text"), str):
            found = f"its fields are {', '.join(row) or '(none)'}"
            raise CalibrationError(f'{source}, line {number}: no text in a field "text"; {found}')
        documents.append(row["text"])
    if not any(document.strip() for document in documents):
        raise CalibrationError(f"calibration file {source} is empty (no text in any line); it must hold text")
    return documents


def read_text(source: str) -> str:
    """Return what the UTF-8 file `source` holds, which is not only blanks."""
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
    if not text.strip():
        raise CalibrationError(f"calibration file {source} is empty ({len(raw)} bytes); it must hold text")
    return text


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


def jsonl_rows(text: str, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and object of every line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{source}, line {number}: not JSON ({error.msg}); one object per line") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{source}, line {number}: not an object but {str(row)[:40]!r}; one object per line")
        yield number, row


def read_dataset(source: str, *, budget: int, generator: torch.Generator) -> list[str]:
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
