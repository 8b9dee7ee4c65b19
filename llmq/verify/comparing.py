"""Two sets of logits in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmq.errors import SpecError

# Largest difference over largest logit up to which a loader is said to compute the same function: twice 2^-11, what
# rounding to float16 changes a number by, relatively. A loader that holds dequantized weights as float16 stays below,
# since the errors of many weights have random signs; sums of float32 in another order end near 1e-6. What must not pass
# lies above: bfloat16 rounds by up to 2^-8 = 3.9e-3, activations in 8 bits by as much, and a zero that is off by one in
# 4 bits moves weights by a fifteenth of their range.
EXACT = 1e-3


@dataclass(frozen=True)
class Comparison:
    """How far logits are from those of the reference."""

    finite: bool
    max: float | None  # of the absolute differences; None where something is not finite
    mean: float | None
    relative: float | None  # max over the largest logit of the reference
    kl: float | None  # mean KL(reference || other) per position, nats
    agreement: float | None  # share of positions with the same most likely token
    positions: int


def compare(reference: Tensor, other: Tensor) -> Comparison:
    """Return how far `other` [B, P, V'] is from `reference` [B, L, V] at the first P positions.

    Vocabularies may be padded: V' may be larger than V, and the rest is left out.

    Raises:
        SpecError: the shapes do not fit.
    """
    if other.ndim != 3 or len(other) != len(reference) or not 0 < other.shape[1] <= reference.shape[1]:
        raise SpecError(f"logits of shape {list(other.shape)} where {list(reference.shape)} was expected")
    if other.shape[2] < reference.shape[2]:
        raise SpecError(f"logits for {other.shape[2]} tokens; the reference has {reference.shape[2]}")
    before = reference[:, : other.shape[1]].double()
    after = other[..., : reference.shape[2]].double()
    positions = before.shape[0] * before.shape[1]
    if not bool(after.isfinite().all()):
        return Comparison(False, None, None, None, None, None, positions)
    difference = (before - after).abs()
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return Comparison(
        finite=True,
        max=float(difference.max()),
        mean=float(difference.mean()),
        relative=float(difference.max() / before.abs().max()),
        kl=float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0)),  # -1e-17 of rounding is no divergence
        agreement=float((before.argmax(-1) == after.argmax(-1)).double().mean()),
        positions=positions,
    )
