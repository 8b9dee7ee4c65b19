"""Perplexity of one model on a text.

Also a script: ``python eval/llmq_eval/perplexity.py DIR --text FILE [--windows N] [--spread] [--json]``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmq.errors import LlmqError, SpecError
from llmq_eval.intervals import Interval, interval
from llmq_eval.windows import Windows, read_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows of logits that are worked on at a time: with a vocabulary of 150 000, the float32 copies that a
# softmax needs of all rows of a window would be several times what the model just returned.
ROWS = 128


@dataclass(frozen=True)
class PerplexityResult:
    """How well a model predicts the tokens of some windows."""

    nll: float  # mean negative log likelihood per token, nats
    window_nlls: tuple[float, ...]  # the same per window
    tokens: int  # predictions scored

    @property
    def ppl(self) -> float:
        """Perplexity, ``exp(nll)``; infinite where that is too large for a float."""
        return exp(self.nll)

    @property
    def ppl_interval(self) -> Interval | None:
        """95 % interval of the perplexity over the windows."""
        found = interval(self.window_nlls)
        return found and Interval(exp(found.low), exp(found.high))

    def to_dict(self) -> dict[str, object]:
        """Return the result ready for JSON, which has no infinity: None stands for it."""
        return {
            "ppl": self.ppl if math.isfinite(self.ppl) else None,
            "ppl_interval": self.ppl_interval,
            "nll": self.nll,
            "tokens": self.tokens,
        }


def perplexity(
    model: PreTrainedModel, windows: Windows, *, advance: Callable[[], object] | None = None
) -> PerplexityResult:
    """Return how well `model` predicts the tokens of `windows`, one window at a time; `advance` is called after each.

    Log likelihoods are taken in float32 whatever the model's dtype, and averaged in float64.

    Raises SpecError when the windows hold tokens or lengths that the model does not know, LlmqError when its
    logits are not finite.
    """
    check_fits(model, windows)
    nlls = []
    for index, window in enumerate(windows):
        nlls.append(_window_nll(model, window, index))
        if advance:
            advance()
    return PerplexityResult(math.fsum(nlls) / len(nlls), tuple(nlls), windows.tokens)


def logits_of(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Return the logits [L, V] of `model` for the first L tokens of `window`, int64 [L + 1], in its own dtype."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=window[None, :-1].to(model.device), use_cache=False).logits[0]
    return logits


def row_blocks(logits: Tensor, window: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield float32 log probabilities [R, V] and the int64 [R, 1] tokens to predict, a few rows at a time."""
    targets = window[1:, None].to(logits.device)
    for block, target in zip(torch.split(logits, ROWS), torch.split(targets, ROWS), strict=True):
        yield block.float().log_softmax(-1), target


def check_fits(model: PreTrainedModel, windows: Windows) -> None:
    """Raise SpecError unless `model` has embeddings for all tokens and positions of `windows`."""
    config = model.config.get_text_config()
    largest, limit = int(windows.ids.max()), getattr(config, "vocab_size", None)
    if limit is not None and largest >= limit:
        raise SpecError(
            f"{windows.source}: token {largest} is outside the model's vocabulary of {limit}; "
            "the tokenizer belongs to another model"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and windows.seq_len > longest:
        raise SpecError(f"the model reads at most {longest} tokens; lower --seq-len from {windows.seq_len}")


def check_finite(value: float, window: int) -> float:
    """Return `value`, measured in window number `window`; raise LlmqError if it is NaN or infinite."""
    if not math.isfinite(value):
        raise LlmqError(
            f"window {window}: the model's log likelihood is {value}; its weights are damaged, or its activations "
            "overflow: try --dtype float32"
        )
    return value


def exp(nll: float) -> float:
    """Return e to the power of `nll`, infinite where that is too large for a float."""
    return math.exp(nll) if nll < 709 else math.inf


def _window_nll(model: PreTrainedModel, window: Tensor, index: int) -> float:
    blocks = row_blocks(logits_of(model, window), window)
    total = sum(-logp.gather(1, target).double().sum().item() for logp, target in blocks)
    return check_finite(total / (len(window) - 1), index)


def _main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Perplexity of a dense or packed checkpoint on a text.")
    parser.add_argument("dir", help="checkpoint folder")
    parser.add_argument("--text", required=True, help="UTF-8 text file")
    parser.add_argument("--seq-len", type=int, default=512, help="predictions per window (default 512)")
    parser.add_argument("--windows", type=int, help="windows at most (default: as many as fit)")
    parser.add_argument("--spread", action="store_true", help="spread the windows evenly over the whole text")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "float16", "bfloat16"],
        help="dtype of the computation (default float32)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default cpu)")
    parser.add_argument("--json", action="store_true", help="print the result and the protocol as JSON")
    a = parser.parse_args(arguments)

    from transformers import AutoTokenizer

    from llmq.checkpoint import CheckpointReader
    from llmq.hf import load

    CheckpointReader(a.dir)  # says what is wrong with the folder before transformers guesses
    windows = read_windows(
        a.text, AutoTokenizer.from_pretrained(a.dir), seq_len=a.seq_len, windows=a.windows, spread=a.spread
    )
    result = perplexity(load(a.dir, dtype=getattr(torch, a.dtype), device=a.device), windows)
    line = f"perplexity {result.ppl:.4f} ({windows.count} windows of {windows.seq_len}, stride {windows.stride})"
    found = json.dumps({"protocol": windows.protocol(), **result.to_dict()}, indent=2) if a.json else line
    sys.stdout.write(found + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(_main(sys.argv[1:]))
    except LlmqError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
