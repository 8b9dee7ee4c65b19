"""Refiners: a quantized weight to a better one on the same grid.

A refiner is one function from one complete `llmq.descent.State` to another, in a file of its own. It never raises the
loss ``(w - q) H (w - q)ᵀ`` of any row, and H need only be positive semidefinite. The state carries the
gradient of the loss from one to the next, so that none has to multiply by H what another already has. A row in
`REFINERS` puts it under the laws of the tests; `refine` takes them in the order of the table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmq.descent import State, begin, complete, descent, take
from llmq.refine.relevel import relevel
from llmq.refine.rescale import rescale
from llmq.types import QuantizedWeight
from llmq.weights import select_rows, stacked

Refiner = Callable[[State], State]

REFINERS: dict[str, Refiner] = {
    "rescale": rescale,
    "relevel": relevel,
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
        before = _placed(state)
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
    return select_rows(stacked([part for _, part in finished]), order)


def _placed(state: State) -> list[Tensor]:
    """Return values and all that places them, [·, N] each."""
    learned = [] if state.levels is None else [state.levels.transpose(1, 2).flatten(0, 1)]
    return [state.values, state.scales, state.zeros, *learned]


def _moved(before: list[Tensor], after: State) -> Tensor:
    """Return in which rows something of `_placed` differs, bool [N]."""
    pairs = zip(before, _placed(after), strict=True)
    return torch.stack([(a != b).any(dim=0) for a, b in pairs]).any(dim=0)
