"""Refiners: a quantized weight to a better one on the same grid.

A refiner is one function ``(q: QuantizedWeight, w [N, K], h [K, K]) -> QuantizedWeight`` in a file of its own. It never
raises the loss ``(w - q) H (w - q)ᵀ`` of any row, and factors nothing: H need only be positive semidefinite. A row in
`REFINERS` puts it under the laws of the tests; `refine` takes them in the order of the table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmq.refine.descent import descent
from llmq.refine.refit import refit
from llmq.types import QuantizedWeight

Refiner = Callable[[QuantizedWeight, Tensor, Tensor], QuantizedWeight]

REFINERS: dict[str, Refiner] = {
    "refit": refit,  # first: it is cheap, and descent then starts from better scales
    "descent": descent,
}


def refine(q: QuantizedWeight, w: Tensor, h: Tensor, rounds: int) -> QuantizedWeight:
    """Return `q` after `rounds` rounds of all refiners, or fewer when one changes nothing any more.

    Args:
        q: the weight on its grid.
        w: the weight itself, float32 [N, K].
        h: Hessian float32 [K, K], damped as the solver's.
        rounds: at most so many; 0 returns `q`.
    """
    for _ in range(rounds):
        before = q
        for refiner in REFINERS.values():
            q = refiner(q, w, h)
        if torch.equal(q.codes, before.codes) and torch.equal(q.scales, before.scales):
            break
    return q
