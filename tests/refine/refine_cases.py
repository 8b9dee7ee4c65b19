"""Problems for refiners, losses in float64, and by how much float32 may misjudge one."""

from __future__ import annotations

from typing import Any

import torch
from descent_reference import U, gradient_error
from hypothesis import strategies as st
from torch import Tensor

from llmq.descent import begin
from llmq.grids.uniform import UniformGrid
from llmq.refine import Refiner
from llmq.solvers.rtn import rtn
from llmq.types import QuantizedWeight

Problem = tuple[QuantizedWeight, Tensor, Tensor]


def problem(
    n: int, k: int, group_size: int, bits: int, symmetric: bool, kind: str = "full", start: str = "rtn", seed: int = 0
) -> Problem:
    """Return (q, w, h): a weight on its grid, the weight, and an exactly symmetric Hessian.

    Args:
        kind: "full" rank, "deficient" (a third of the rank), "dead" (a quarter of the inputs never occur), "none" (all
            zeros).
        start: "rtn", or "random" codes under the scales of rtn.
    """
    draw = torch.Generator().manual_seed(seed)
    mix = (torch.eye(k) + 0.7 * torch.randn(k, k, generator=draw) / k**0.5) * (0.5 + torch.rand(k, generator=draw))
    x = (torch.randn(-(-k // 3) if kind == "deficient" else 8 * k, k, generator=draw) @ mix).double()
    h = (2 * x.T @ x / len(x)).float()
    h = (h + h.T) / 2
    if kind == "dead":
        dead = torch.rand(k, generator=draw) < 0.25
        h[dead], h[:, dead] = 0.0, 0.0
    if kind == "none":
        h = torch.zeros(k, k)
    w = torch.randn(n, k, generator=draw)
    q = rtn(w, None, UniformGrid(bits, symmetric), group_size).weight
    if start == "random":
        codes = torch.randint(0, 2**bits, (n, k), generator=draw, dtype=torch.uint8)
        q = QuantizedWeight(codes, q.scales, q.zeros, q.grid, group_size)
    return q, w, h


def problems(**fixed: Any) -> st.SearchStrategy[Problem]:
    """Return a strategy for problems; keyword arguments fix what is not to vary."""
    free: dict[str, st.SearchStrategy[Any]] = {
        "n": st.integers(1, 6),
        "k": st.integers(1, 70),
        "group_size": st.sampled_from([1, 7, 16, 32, 70]),
        "bits": st.sampled_from([2, 3, 4]),
        "symmetric": st.booleans(),
        "kind": st.sampled_from(["full", "deficient", "dead", "none"]),
        "start": st.sampled_from(["rtn", "random"]),
        "seed": st.integers(0, 10**6),
    }
    return st.builds(problem, **(free | {name: st.just(value) for name, value in fixed.items()}))


def run(refiner: Refiner, q: QuantizedWeight, w: Tensor, h: Tensor) -> QuantizedWeight:
    """Return what `refiner` makes of `q`."""
    return refiner(begin(q, w, h)).weight()


def losses(q: QuantizedWeight, w: Tensor, h: Tensor) -> Tensor:
    """Return e H eᵀ of each row, float64 [N]."""
    e = w.double() - q.dequantize().double()
    return ((e @ h.double()) * e).sum(1)


def allowance(before: QuantizedWeight, after: QuantizedWeight, w: Tensor, h: Tensor) -> Tensor:
    """Return by how much, [N], the loss of a row may rise because a refiner judges in float32.

    A refiner that compares losses: each is a sum of K² products, of relative error (2K + 4)·u before cancellation.
    One that compares distances to the lowest point of a parabola: moving q_j by Δ changes the loss by
    H_jj Δ² - 2 Δ G_j, and G_j is off by `gradient_error`; what several columns cost is the sum. Allowed are both.
    """
    a, b = before.dequantize().double(), after.dequantize().double()
    total = torch.zeros(len(w), dtype=torch.float64)
    for values in (a, b):
        e = (w.double() - values).abs()
        total += (2 * w.shape[1] + 4) * U * ((e @ h.double().abs()) * e).sum(1)
    return total + 2 * ((b - a).abs() * gradient_error(a, w.double() - a, b - a, h)).sum(1)


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Return whether both are equal in every bit."""
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and torch.equal(a.zeros, b.zeros)


def rows_of(q: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    """Return these rows of `q`."""
    return QuantizedWeight(q.codes[rows], q.scales[rows], q.zeros[rows], q.grid, q.group_size)


def different_rows(a: QuantizedWeight, b: QuantizedWeight) -> int:
    """Return the number of rows that differ in a code, scale or zero.

    Float32 sums may run in another order when a row has other neighbours or a leaf another length. That moves a
    target by some 1e-6 steps, so that of 1000 columns one crosses a tie once in 500 runs; two rows never do.
    """
    pairs = ((a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros))
    return int(torch.stack([(x != y).any(1) for x, y in pairs]).any(0).sum())
