"""The protocol: which tokens of a text a model has to predict, and what it sees before each of them.

A text becomes one list of tokens, as its tokenizer writes it (with a BOS token at the start or not). From
it, `count` windows of ``seq_len + 1`` tokens are taken at equal distances (the stride); in each the model
sees the first `seq_len` tokens and predicts the `seq_len` that follow them. Windows stand end to end from
the start of the text (stride = seq_len, the usual protocol), or are spread evenly over all of it, which makes
a few of them speak for a long text. The first predictions of a window have little to go by, which makes the
perplexity higher than a sliding window would; what counts is that both models get the same windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from llmq.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Windows:
    """Windows over the tokens of a text; iterating yields int64 [seq_len + 1] each."""

    ids: Tensor  # int64 [T], all tokens of the text
    seq_len: int  # predictions per window
    count: int
    stride: int  # tokens from the start of a window to the start of the next
    bos: bool  # whether the tokenizer put a BOS token before the text
    source: str  # the text file

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.count * self.stride, self.stride):
            yield self.ids[start : start + self.seq_len + 1]

    @property
    def tokens(self) -> int:
        """Number of predictions that are scored."""
        return self.count * self.seq_len

    def protocol(self) -> dict[str, object]:
        """Return what is needed to repeat the measurement, ready for JSON."""
        return {
            "text": self.source,
            "text_tokens": len(self.ids),
            "tokens_scored": self.tokens,
            "windows": self.count,
            "seq_len": self.seq_len,
            "stride": self.stride,
            "bos": self.bos,
        }


def read_windows(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int = 512,
    windows: int | None = None,
    spread: bool = False,
) -> Windows:
    """Return the windows of the UTF-8 text file `path`; see `cut_windows`.

    Raises SpecError when the file is missing, not text, or too short for one window.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"--text {path}: not UTF-8 text (byte {error.start}); give a plain text file") from error
    except OSError as error:
        raise SpecError(f"--text {path}: cannot be read ({error.strerror}); give a plain text file") from error
    # not verbose: a text longer than the model's context is what windows are for, and no reason for a warning
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0].long()
    bos = tokenizer.bos_token_id is not None and ids[:1].tolist() == [tokenizer.bos_token_id]
    return cut_windows(ids, seq_len=seq_len, windows=windows, spread=spread, bos=bos, source=str(path))


def cut_windows(
    ids: Tensor,
    *,
    seq_len: int,
    windows: int | None = None,
    spread: bool = False,
    bos: bool = False,
    source: str = "tokens",
) -> Windows:
    """Return at most `windows` windows (None: as many as fit without overlap) over `ids`, int64 [T].

    They stand end to end from the first token on, or with `spread` at equal distances over all tokens.

    Raises SpecError when `seq_len` or `windows` is below 1 or `ids` has fewer than ``seq_len + 1`` tokens.
    """
    if seq_len < 1 or (windows is not None and windows < 1):
        raise SpecError(f"--seq-len {seq_len} and --windows {windows}: both must be at least 1")
    fit = (len(ids) - 1) // seq_len
    if fit < 1:
        raise SpecError(
            f"{source}: {len(ids)} tokens are too few for one window of {seq_len}, which needs {seq_len + 1}; "
            "lower --seq-len or give a longer text"
        )
    count = fit if windows is None else min(windows, fit)
    stride = (len(ids) - 1) // count if spread else seq_len
    return Windows(ids, seq_len, count, stride, bos, source)
