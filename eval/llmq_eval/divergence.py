"""How far a packed model is from its original: both run over the same windows in one pass.

Perplexity alone is a noisy judge: a packed model can be luckier on a text than its original. The KL
divergence of the two predicted distributions compares them at every token and cannot be negative, so a few
dozen windows tell apart what perplexity needs a whole corpus for. Everything is paired by window, which
removes the difference between easy and hard passages from the intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from llmq.errors import SpecError
from llmq_eval.intervals import Interval, interval
from llmq_eval.perplexity import PerplexityResult, check_finite, check_fits, exp, logits_of, row_blocks
from llmq_eval.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DivergenceResult:
    """Two models on the same windows."""

    original: PerplexityResult
    packed: PerplexityResult
    window_kls: tuple[float, ...]  # mean KL(original || packed) per token of each window, nats
    window_agreements: tuple[float, ...]  # share of tokens whose most likely prediction is the same

    @property
    def kl(self) -> float:
        """Mean KL(original || packed) per token, in nats."""
        return _mean(self.window_kls)

    @property
    def kl_interval(self) -> Interval | None:
        """95 % interval of `kl`."""
        return interval(self.window_kls)

    @property
    def agreement(self) -> float:
        """Share of tokens, 0 to 1, for which both models find the same token most likely."""
        return _mean(self.window_agreements)

    @property
    def agreement_interval(self) -> Interval | None:
        """95 % interval of `agreement`."""
        return interval(self.window_agreements)

    @property
    def ppl_ratio(self) -> float:
        """Perplexity of the packed model over that of the original."""
        return exp(self.packed.nll - self.original.nll)

    @property
    def ppl_ratio_interval(self) -> Interval | None:
        """95 % interval of `ppl_ratio`, from the differences within each window."""
        pairs = zip(self.packed.window_nlls, self.original.window_nlls, strict=True)
        found = interval([after - before for after, before in pairs])
        return found and Interval(exp(found.low), exp(found.high))

    def to_dict(self) -> dict[str, object]:
        """Return the result ready for JSON."""
        return {
            "original": self.original.to_dict(),
            "packed": self.packed.to_dict(),
            "ppl_ratio": self.ppl_ratio,
            "ppl_ratio_interval": self.ppl_ratio_interval,
            "kl": self.kl,
            "kl_interval": self.kl_interval,
            "agreement": self.agreement,
            "agreement_interval": self.agreement_interval,
            "tokens": self.packed.tokens,
        }


class _WindowScore(NamedTuple):
    """Means over the tokens of one window."""

    original_nll: float
    packed_nll: float
    kl: float
    agreement: float


def divergence(
    original: PreTrainedModel,
    packed: PreTrainedModel,
    windows: Windows,
    *,
    advance: Callable[[], object] | None = None,
) -> DivergenceResult:
    """Return how far `packed` is from `original` on `windows`, holding the logits of one window at a time.

    Log probabilities are float32 whatever the models' dtypes; means are float64. `advance` is called after
    each window.

    Raises SpecError when the windows hold tokens or lengths that a model does not know or when the
    vocabularies differ in size, LlmqError when logits are not finite.
    """
    for model in (original, packed):
        check_fits(model, windows)
    scores = []
    for index, window in enumerate(windows):
        before, after = logits_of(original, window), logits_of(packed, window)
        if before.shape != after.shape:
            raise SpecError(
                f"the original predicts {before.shape[-1]} tokens and the packed model {after.shape[-1]}; "
                "--against must name the model that was quantized"
            )
        score = _score(before, after, window)
        for value in score:
            check_finite(value, index)
        scores.append(score)
        if advance:
            advance()
    original_nlls, packed_nlls, kls, agreements = zip(*scores, strict=True)
    return DivergenceResult(
        original=PerplexityResult(_mean(original_nlls), original_nlls, windows.tokens),
        packed=PerplexityResult(_mean(packed_nlls), packed_nlls, windows.tokens),
        window_kls=kls,
        window_agreements=agreements,
    )


def _score(before: Tensor, after: Tensor, window: Tensor) -> _WindowScore:
    """Return the score of logits `before` and `after` [L, V] for `window`, int64 [L + 1]."""
    totals = [0.0, 0.0, 0.0, 0.0]
    pairs = zip(row_blocks(before, window), row_blocks(after.to(before.device), window), strict=True)
    for (old, target), (new, _) in pairs:
        rows = (
            -old.gather(1, target),
            -new.gather(1, target),
            (old.exp() * (old - new)).sum(-1),
            old.argmax(-1) == new.argmax(-1),
        )
        totals = [total + row.double().sum().item() for total, row in zip(totals, rows, strict=True)]
    return _WindowScore(*(total / len(before) for total in totals))


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values)
