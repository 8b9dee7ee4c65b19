"""Problems for solvers, and what one can say about two answers in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.types import QuantizedWeight


def correlated(n: int, k: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Return weights [n, k] and the Hessian [k, k] of correlated inputs, both float32.

    Inputs share directions and differ threefold in energy, as those of real layers do; with the default of 8k tokens
    the condition of H is in the hundreds.
    """
    draw = torch.Generator().manual_seed(seed)
    mix = (torch.eye(k) + 0.7 * torch.randn(k, k, generator=draw) / k**0.5) * (0.5 + torch.rand(k, generator=draw))
    x = (torch.randn(tokens or 8 * k, k, generator=draw) @ mix).double()
    return torch.randn(n, k, generator=draw), (2 * x.T @ x / len(x)).float()


def losses(w: Tensor, h: Tensor, found: QuantizedWeight) -> Tensor:
    """Return e H eᵀ of each row, float64 [N]."""
    e = w.double() - found.dequantize().double()
    return ((e @ h.double()) * e).sum(1)


def different_rows(a: QuantizedWeight, b: QuantizedWeight) -> int:
    """Return the number of rows that are not equal in every code, scale and zero."""
    pairs = ((a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros))
    return int(torch.stack([(x != y).any(1) for x, y in pairs]).any(0).sum())


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    """Fail unless both are equal in every bit."""
    assert (a.grid, a.group_size) == (b.grid, b.group_size)
    assert different_rows(a, b) == 0


def assert_same_but_for_a_tie(a: QuantizedWeight, b: QuantizedWeight) -> None:
    """Fail unless at most one row differs.

    Float32 sums may run in another order when a row has other neighbours or a leaf another length, and move a
    compensated weight by some 1e-5 steps. Of N·K = 2000 weights that stand anywhere between two levels one then
    crosses a tie once in 50 runs, and takes the rest of its row along; two rows do once in 5000 runs, a bug always.
    """
    assert (a.grid, a.group_size) == (b.grid, b.group_size)
    assert different_rows(a, b) <= 1
