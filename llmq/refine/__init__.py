"""Refiners: a quantized weight to a better one on the same grid.

A refiner is one function from one complete `llmq.descent.State` to another, in a file of its own. It never raises the
loss ``(w - q) H (w - q)ᵀ`` of any row, and H need only be positive semidefinite. The state carries the
gradient of the loss from one to the next, so that none has to multiply by H what another already has. A row in
`REFINERS` puts it under the laws of the tests; `refine` takes them in the order of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llmq.descent import State, begin, complete, descent, take
from llmq.refine.rescale import rescale
from llmq.types import QuantizedWeight

Refiner = Callable[[State], State]

REFINERS: dict[str, Refiner] = {
    "rescale": rescale,
    "descent": descent,
}

_WORTH_DROPPING = 0.125  # of the rows: fewer finished ones cost less than moving the others together


def refine(q: QuantizedWeight, w: Tensor, h: Tensor, rounds: int) -> QuantizedWeight:
    """Return `q` after `rounds` rounds of all refiners; a row that none changes is finished earlier.

    Args:
        q: the weight on its grid.
        w: the weight itself, float32 [N, K].
        h: Hessian float32 [K, K], damped as the solver's.
        rounds: at most so many; 0 returns `q`.
    """
    if rounds == 0:
        return q
    state = begin(q, w, h)
    rows = torch.arange(len(w), device=w.device)
    finished: list[tuple[Tensor, QuantizedWeight]] = []
    for _ in range(rounds):
        before = state.values, state.scales, state.zeros
        for refiner in REFINERS.values():
            state = refiner(complete(state))
        moving = _moved(before, state)
        if moving.sum() <= (1 - _WORTH_DROPPING) * len(rows):
            still = (~moving).nonzero()[:, 0]
            finished.append((rows[still], take(state, still).weight()))
            going = moving.nonzero()[:, 0]
            rows, state = rows[going], take(state, going)
            if not len(rows):
                break
    finished.append((rows, state.weight()))
    order = torch.cat([part for part, _ in finished]).argsort()
    codes, scales, zeros = (
        torch.cat([getattr(part, name) for _, part in finished])[order] for name in ("codes", "scales", "zeros")
    )
    return replace(q, codes=codes, scales=scales, zeros=zeros)


def _moved(before: tuple[Tensor, ...], after: State) -> Tensor:
    """Return in which rows values, scales or zeros differ, bool [N]."""
    pairs = zip(before, (after.values, after.scales, after.zeros), strict=True)
    return torch.stack([(a != b).any(dim=0) for a, b in pairs]).any(dim=0)
