"""What solving a stage takes and holds, found by solving small ones and counting.

The solver's work is a sum of terms of known growth: N K² and N K of products, K³ of factorizations, and so on. Runs of
three small sizes give their coefficients, whatever the recipe switches on. What is held at once grows with the square
of the sizes if all of them, groups included, shrink alike: one small problem of the same proportions shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq.families import Linear
from llmq.grids.vq import VectorGrid
from llmq.hessian import HessianSum
from llmq.layers import solve_stage
from llmq.planning.counting import CACHE, Amounts, Counting, Held, Work, side
from llmq.preflight import Job
from llmq.problems import Problem
from llmq.solvers.placing import nearest
from llmq.solvers.vectors import vector_rtn
from llmq.types import QuantizedWeight

_SIZES = ((32, 128), (64, 128), (32, 192))  # rows and inputs of the problems that are counted
_COLUMNS = 32  # of their groups, at most: with wider ones what is done to a group looks like what is done to all
_HELD = 96  # inputs of the problem whose memory is looked at
_GROUPS = 8  # at most, in that problem
_MANY = 64  # tokens per input that are more than any decision of the solver asks for
_SMALL = 6  # log2 of the side of the products within groups and leaves


@dataclass(frozen=True)
class Growth:
    """Work as a function of rows N and inputs K."""

    products: dict[str, tuple[float, float]]  # flops by dtype: times N K², times N K
    factors: dict[str, tuple[float, float]]  # times K³, times K
    solves: dict[str, tuple[float, float]]  # times N K², times N K
    near: tuple[float, float]  # bytes: times N K, times K²
    whole: tuple[float, float]  # bytes of whole matrices, likewise
    calls: tuple[float, float]  # times K, once

    def at(self, n: int, k: int) -> Work:
        """Return the work of one problem of `n` rows and `k` inputs."""
        large = side(min(n, k)) - 1  # of the halves, quarters … in which a sweep goes
        work = Work(calls=self.calls[0] * k + self.calls[1])
        for kind, first in (("products", n * k * k), ("solves", n * k * k), ("factors", k**3)):
            rest = k if kind == "factors" else n * k
            for dtype, (most, few) in getattr(self, kind).items():
                amounts: Amounts = getattr(work, kind)
                amounts[dtype, large + (kind != "products")] += most * first
                amounts[dtype, _SMALL] += few * rest
        whole = self.whole[0] * n * k + self.whole[1] * k * k
        work.near = self.near[0] * n * k + self.near[1] * k * k
        if 4 * min(n, k) * k < CACHE:
            work.near += whole
        else:
            work.far += whole
        return work


def solver_growth(job: Job, *, few_tokens: bool) -> Growth:
    """Return what solving takes; `few_tokens`: whether the solver will try stronger damping for want of tokens."""

    def case(n: int, k: int) -> Callable[[], None]:
        size = job.spec.group_size
        spec = replace(job.spec, group_size=size if 0 < size <= _COLUMNS else _COLUMNS)
        small = replace(job, spec=spec, budget=replace(job.budget, solver_rows=None))
        problem = _problem(small, [(n, k)], 4 * k if few_tokens else _MANY * k)

        def run() -> None:
            for layer in solve_stage(small, 0, [problem]):
                layer.weight.dequantize()

        return run

    return _growth(case)


def packing_growth(job: Job) -> Growth:
    """Return what checking a weight and packing it takes."""

    def case(n: int, k: int) -> Callable[[], None]:
        w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(job.stored_dtype)
        columns = job.spec.group_columns(k)
        vectors = isinstance(job.grid, VectorGrid)
        if isinstance(job.grid, VectorGrid):
            q: QuantizedWeight = vector_rtn(w, None, job.grid, columns).weight
        else:
            q = nearest(job.grid, columns, w.float(), [job.grid.fit(part) for part in w.split(columns, dim=1)])

        def run() -> None:
            w.isfinite().all()
            for part in () if vectors else w.split(columns, dim=1):
                job.grid.fit(part)
            job.format.pack(q, job.spec)

        return run

    return _growth(case)


def adding(job: Job, tokens: float, inputs: int) -> Work:
    """Return what adding that many tokens to a Hessian takes, batch by batch."""
    t, k = 512, 256
    total = HessianSum(k, torch.device("cpu"), paired=job.paired)
    x = torch.randn(t, k, generator=torch.Generator().manual_seed(0)).to(job.dtype)
    reference = x.clone() if job.paired else None
    total.add_(x, None, None, reference)  # makes room for the sums
    with Counting() as counting:
        total.add_(x, None, None, reference)
    work, found = counting.work, Work()
    for (dtype, _), flops in work.products.items():
        found.products[dtype, side(inputs)] += flops / (t * k * k) * tokens * inputs * inputs
    found.far = (work.near + work.far) / (t * k) * tokens * inputs
    found.calls = work.calls * max(1.0, tokens / job.budget.batch_tokens)
    return found


def held(job: Job, shapes: Sequence[tuple[int, int]], tokens: float, *, judged: bool) -> int:
    """Return the bytes held at once while linears of these shapes, which share an input, are measured and solved."""
    k = shapes[0][1]
    scale = min(1.0, _HELD / k)
    small_k = max(1, round(k * scale))
    small = [(max(1, round(n * scale)), small_k) for n, _ in shapes]
    columns = max(job.spec.group_columns(k) * scale, small_k / _GROUPS)
    unit = job.grid.columns if isinstance(job.grid, VectorGrid) else 1
    spec = replace(job.spec, group_size=max(1, round(columns / unit)) * unit)
    rows = job.budget.solver_rows
    budget = replace(job.budget, solver_rows=None if rows is None else max(1, round(rows * scale)))
    tiny = replace(job, spec=spec, budget=budget)
    with Held() as live:
        problem = _problem(tiny, small, tokens * scale, judged=judged)
        live.peak = live.now  # what made the problem is no part of it
        solve_stage(tiny, 0, [problem])
    return int(live.peak / scale**2)


def _problem(job: Job, shapes: Sequence[tuple[int, int]], tokens: float, *, judged: bool = True) -> Problem:
    """Return a problem of random rows whose inputs are correlated as those of models are."""
    k = shapes[0][1]
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)

    def summed(count: int) -> HessianSum:
        x = torch.randn(count, k, generator=generator) @ mixing
        off = x + 0.01 * torch.randn(count, k, generator=generator)
        total = HessianSum(k, torch.device("cpu"), paired=job.paired)
        total.add_(x, None, None, off if job.paired else None)
        return total

    train = summed(4 * k)
    train.tokens = round(tokens)
    held_out = summed(2 * k) if judged and job.recipe.held_out > 0 else None
    rows = []
    for i, (n, _) in enumerate(shapes):
        module = nn.Linear(k, n, bias=False, dtype=job.dtype)
        with torch.no_grad():
            module.weight.copy_(torch.randn(n, k, generator=generator))
        rows.append((Linear(f"rows{i}", module, False), slice(0, n)))
    if not job.solver.calibrated:
        return Problem(rows, None, None, paired=False)
    return Problem(rows, train, held_out, job.paired)


def _growth(case: Callable[[int, int], Callable[[], None]]) -> Growth:
    """Return the growth of what the function does that `case` makes for a number of rows and inputs."""
    counted: list[Work] = []
    for n, k in _SIZES:
        run = case(n, k)
        with Counting(whole=int(3.9 * n * k)) as counting:  # bytes: all but a float32 matrix
            run()
        counted.append(counting.work)

    def fitted(kind: str, basis: Callable[[int, int], tuple[float, float]]) -> dict[str, tuple[float, float]]:
        dtypes = {dtype for work in counted for dtype, _ in getattr(work, kind)}
        return {
            dtype: _fit([sum(v for (d, _), v in getattr(w, kind).items() if d == dtype) for w in counted], basis)
            for dtype in sorted(dtypes)
        }

    def cubic(n: int, k: int) -> tuple[float, float]:
        return float(n * k * k), float(n * k)

    def square(n: int, k: int) -> tuple[float, float]:
        return float(n * k), float(k * k)

    return Growth(
        fitted("products", cubic),
        fitted("factors", lambda n, k: (float(k**3), float(k))),
        fitted("solves", cubic),
        _fit([w.near for w in counted], square),
        _fit([w.far for w in counted], square),
        _fit([w.calls for w in counted], lambda n, k: (float(k), 1.0)),
    )


def _fit(values: Sequence[float], basis: Callable[[int, int], tuple[float, float]]) -> tuple[float, float]:
    """Return the coefficients, not negative, of the terms of `basis` that best give `values` at `_SIZES`."""
    a: Tensor = torch.tensor([basis(n, k) for n, k in _SIZES], dtype=torch.float64)
    b = torch.tensor(values, dtype=torch.float64)
    unit = a.norm(dim=0)
    found: Any = (torch.linalg.lstsq(a / unit, b[:, None]).solution[:, 0] / unit).tolist()
    if min(found) >= 0:
        return found[0], found[1]
    alone = [max(0.0, float(a[:, i] @ b / (a[:, i] @ a[:, i]))) for i in range(2)]
    best = min((0, 1), key=lambda i: float((a[:, i] * alone[i] - b).norm()))
    return (alone[0], 0.0) if best == 0 else (0.0, alone[1])
