"""Time every solver on one random layer: against the textbook's column loop and against its own matrix products.

    python scripts/bench_solver.py [--size N K] [--group-size G] [--bits B] [--threads T] [--repeats R] [--only TEXT]

One line per solver, orders and scale searches of the sweep included:

    seconds   median of the whole call
    of loop   the call, given the factor, over the textbook's loop given the factor: row-major, blocks of 128
    of chain  the call over that loop and the three factorizations in front of it
    of GEMMs  the call over its own matrix products, triangular solves and factorizations, recorded and run alone;
              0 for a solver that has none

Ratios are taken within a repeat, in which everything runs in turn, because other processes may share the cores; shown
are their medians and, in brackets, their minima.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmq.grids.uniform import UniformGrid
from llmq.hessian import Factor, factorize
from llmq.solvers import SOLVERS
from llmq.solvers.orders import ORDERS
from llmq.types import Solution

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm_", "linalg_solve_triangular", "cholesky_inverse")
FACTORIZATIONS = ("linalg_cholesky_ex", "linalg_cholesky")
OBQ_LIMIT = 512  # beyond, one run takes minutes


@dataclass(frozen=True)
class Row:
    """One solver's line; ratios as (median, minimum)."""

    solver: str
    seconds: float
    of_loop: tuple[float, float]
    of_chain: tuple[float, float]
    of_gemms: tuple[float, float]


def problem(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, and Hessian and cross moment of inputs that share directions."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2 * k, k, generator=draw) * (0.3 + torch.rand(k, generator=draw))
    x += torch.randn(2 * k, 32, generator=draw) @ torch.randn(32, k, generator=draw) * 0.3
    other = x + 0.1 * torch.randn(2 * k, k, generator=draw)
    return torch.randn(n, k, generator=draw), x.T @ x / k, (other - x).T @ x / k


def textbook_loop(w: Tensor, u: Tensor, grid: UniformGrid, group_size: int, block: int = 128) -> tuple[Tensor, Tensor]:
    """Return result and losses of Frantar et al. 2022, algorithm 1, as it is usually written; H⁻¹ = Uᵀ U."""
    w, result, losses = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
    for lo in range(0, w.shape[1], block):
        hi = min(lo + block, w.shape[1])
        part, factor = w[:, lo:hi].clone(), u[lo:hi, lo:hi]
        rounded, errors, lost = (torch.zeros_like(part) for _ in range(3))
        for i in range(hi - lo):
            if (lo + i) % group_size == 0:
                at = grid.fit(w[:, lo + i : lo + i + group_size])
            column, d = part[:, i], factor[i, i]
            code = torch.clamp(torch.round(column.unsqueeze(1) / at.scale) + at.zero, 0, 2**grid.bits - 1)
            q = (at.scale * (code - at.zero)).flatten()
            rounded[:, i] = q
            lost[:, i] = (column - q) ** 2 / d**2
            error = (column - q) / d
            part[:, i:] -= error.unsqueeze(1).matmul(factor[i, i:].unsqueeze(0))
            errors[:, i] = error
        result[:, lo:hi] = rounded
        losses[:, lo:hi] = lost / 2
        w[:, hi:] -= errors.matmul(u[lo:hi, hi:])
    return result, losses


def textbook_chain(h: Tensor) -> Tensor:
    """Return U with H⁻¹ = Uᵀ U, by way of H⁻¹."""
    lower = torch.linalg.cholesky(h + 0.01 * h.diagonal().mean() * torch.eye(len(h)))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


class Recorder(TorchDispatchMode):
    """Remembers every matrix product and factorization, by the layouts of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in PRODUCTS + FACTORIZATIONS:
            self.calls.append((func, tuple(_layout(a) for a in args), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _layout(value: Any) -> Any:
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def replay(recorder: Recorder) -> Callable[[], None]:
    """Return a function that runs what was recorded, on other numbers."""
    stock: dict[Any, Tensor] = {}

    def make(layout: Any, factorized: bool) -> Any:
        if not isinstance(layout, tuple):
            return layout
        key = (layout, factorized)
        if key not in stock:
            shape, stride, dtype = layout
            tensor = torch.empty_strided(shape, stride, dtype=dtype).uniform_(-1e-3, 1e-3)
            if factorized:  # positive definite, or the routine stops at the first column
                tensor.diagonal(dim1=-2, dim2=-1).fill_(float(shape[-1]))
            stock[key] = tensor
        return stock[key]

    square = (*FACTORIZATIONS, "linalg_solve_triangular", "cholesky_inverse")
    calls = [
        (func, [make(a, i == 0 and func._schema.name.removeprefix("aten::") in square) for i, a in enumerate(args)], kw)
        for func, args, kw in recorder.calls
    ]

    def run() -> None:
        for func, args, kwargs in calls:
            func(*args, **kwargs)

    return run


def given_factor(run: Callable[[], Solution]) -> Callable[[], Solution]:
    """Return `run` with every factorization answered from memory."""
    known: dict[float, Factor | None] = {}

    def remembered(h: Tensor, damp_percent: float, order: Tensor | None = None) -> Factor | None:
        if damp_percent not in known:
            known[damp_percent] = factorize(h, damp_percent, order)
        return known[damp_percent]

    def call() -> Solution:
        with ExitStack() as stack:
            for name in ("sweep", "obq"):
                stack.enter_context(patch.object(import_module(f"llmq.solvers.{name}"), "factorize", remembered))
            return run()

    call()
    return call


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cases(n: int, k: int, group_size: int, bits: int) -> dict[str, Callable[[], Solution]]:
    """Return what is timed: each solver, and the sweep in each order and with each search."""
    w, h, cross = problem(n, k)
    grid = UniformGrid(bits, symmetric=False)
    runs: dict[str, Callable[[], Solution]] = {}
    for name, row in SOLVERS.items():
        if name == "obq" and max(n, k) > OBQ_LIMIT:
            continue
        run = partial(row.run, w, h, grid, group_size, **({"cross": cross} if row.paired else {}))
        plain = {"scale_search": "none"} if "scale_search" in row.options else {}
        if "order" not in row.options:
            runs[name] = partial(run, **plain)
        else:
            runs |= {f"{name} {order}": partial(run, order=order, **plain) for order in ORDERS}
        if plain:
            runs[f"{name} searched"] = partial(run, scale_search="hessian")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1024), metavar=("N", "K"))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="solvers whose line starts so")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    n, k = options.size
    w, h, _ = problem(n, k)
    grid = UniformGrid(options.bits, symmetric=False)
    u = textbook_chain(h)
    rows = []
    if not options.json:
        print(f"{'':20} {'seconds':>9}  {'of loop':>15}  {'of chain':>15}  {'of GEMMs':>15}")
    for name, run in cases(n, k, options.group_size, options.bits).items():
        if not name.startswith(options.only):
            continue
        recorder = Recorder()
        with recorder:
            run()
        products, inner = replay(recorder), given_factor(run)
        times = []
        for _ in range(options.repeats):
            loop = seconds(lambda: textbook_loop(w, u, grid, options.group_size))
            times.append((loop, seconds(lambda: textbook_chain(h)), seconds(run), seconds(inner), seconds(products)))
        ratios = [(i / a, s / (a + c), s / p if recorder.calls else 0.0) for a, c, s, i, p in times]
        of = [(round(median(r), 3), round(min(r), 3)) for r in zip(*ratios, strict=True)]
        rows.append(Row(name, round(median(t[2] for t in times), 4), *of))
        if not options.json:
            shown = "  ".join(f"{m:8.2f} ({least:.2f})" for m, least in of)
            print(f"{name:20} {rows[-1].seconds:9.3f}  {shown}", flush=True)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
