"""Which token goes to which expert, as `grouped` reads it: made once for all products of a bank, by PyTorch alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ALONE = 8  # rows that are tiles of their own even if experts are fewer: sorting takes several launches


class Routes(NamedTuple):
    """Which rows go to which expert, as the kernel reads it."""

    rows: Tensor  # experts of the rows, or numbers of rows sorted by expert, [R]
    firsts: (
        Tensor | None
    )  # int64 [E + 1], where in it those of each expert, and of none, begin; None: nothing is sorted


def route(picked: Tensor, experts: int) -> Routes:
    """Return the routes of rows that pick the experts `picked` [R]; numbers from `experts` up pick none.

    Nothing waits for the device, and shapes depend on those of the arguments alone.
    """
    if len(picked) <= max(ALONE, experts):
        return Routes(picked, None)
    found, rows = torch.sort(picked, stable=True)
    numbers = torch.arange(experts + 1, device=picked.device, dtype=picked.dtype)
    return Routes(rows, torch.searchsorted(found, numbers))
