"""Orders in which a sweep visits the columns. Groups are contiguous original columns in all of them, so no `g_idx`.

An order whose groups stay whole lets the sweep place each group when it gets there, by weights that already make up
for the errors before; where the groups are mixed they are all placed beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.errors import SolverError


class Order(NamedTuple):
    """One row of `ORDERS`."""

    permutation: Callable[[Tensor, int], Tensor]  # (h [K, K], group size) -> int64 [K], the columns as they are visited
    whole_groups: bool  # whether the columns of a group follow each other


_PANEL = 64  # columns that are eliminated before the remainder is brought up to date in one product
_RIDGE = 0.01  # of the mean diagonal, so that the pivots of a rank-deficient H are not rounding errors


def natural(h: Tensor, group_size: int) -> Tensor:
    """Return the columns as they are."""
    del group_size
    return torch.arange(len(h), device=h.device)


def act(h: Tensor, group_size: int) -> Tensor:
    """Return the columns by falling energy H_jj: what matters most is rounded while most others can still answer."""
    del group_size
    return torch.argsort(h.diagonal(), descending=True, stable=True)


def group(h: Tensor, group_size: int) -> Tensor:
    """Return the groups by their largest energy H_jj, falling, and the columns of each by theirs.

    Group-aware reordering (GAR) of GPTQModel: an activation order that leaves the groups whole.
    """
    parts = h.diagonal().split(group_size)
    groups = torch.argsort(torch.stack([part.max() for part in parts]), descending=True, stable=True).tolist()
    inside = [torch.argsort(part, descending=True, stable=True) + g * group_size for g, part in enumerate(parts)]
    return torch.cat([inside[g] for g in groups])


def pivot(h: Tensor, group_size: int) -> Tensor:
    """Return the columns, chosen from the last to the first, each the one with the least energy given those behind it.

    That is the order of a Cholesky factorization with minimum pivots: greedily it keeps Σ R_jj² small, by which the
    loss of a sweep is bounded. O(K³), in panels like LAPACK's ``pstrf``.
    """
    del group_size
    k = len(h)
    rest = 0.5 * (h + h.T)  # the Schur complement of what is chosen, but for the columns of the panel
    rest.diagonal().add_(_RIDGE * rest.diagonal().mean())
    energy = rest.diagonal().clone()
    chosen = torch.empty(k, dtype=torch.int64, device=h.device)
    for start in range(0, k, _PANEL):
        width = min(_PANEL, k - start)
        panel = torch.zeros(k, width, device=h.device)
        for i in range(width):
            j = energy.argmin()
            column = torch.addmv(rest[j], panel[:, :i], panel[j, :i], alpha=-1) / energy[j].clamp(min=1e-30).sqrt()
            panel[:, i] = column
            energy.addcmul_(column, column, value=-1)
            energy[j] = torch.inf
            chosen[start + i] = j
        rest.addmm_(panel, panel.T, alpha=-1)
    return chosen.flip(0)


ORDERS: dict[str, Order] = {
    "natural": Order(natural, whole_groups=True),
    "act": Order(act, whole_groups=False),
    "group": Order(group, whole_groups=True),
    "pivot": Order(pivot, whole_groups=False),
}


def find_order(name: str) -> Order:
    """Return the row of `ORDERS` with this name.

    Raises:
        SolverError: there is none.
    """
    if name not in ORDERS:
        raise SolverError(f"order is {name!r}; use {', '.join(ORDERS)}")
    return ORDERS[name]
