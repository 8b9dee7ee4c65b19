#!/usr/bin/env python
"""Packed linear layers on a GPU against dense ones and against the kernels of others.

    scripts/bench_gpu.py                                   # Llama-3-8B and 70B, fused, 4 bits, groups of 128
    scripts/bench_gpu.py --bits 8 --group-size -1
    scripts/bench_gpu.py --grid vq4 --bits 2 --group-size -1
    scripts/bench_gpu.py --device cpu --repeats 1 --sizes tiny --output /tmp    # the same road, by the clock

Every candidate multiplies with weights that take turns, so that none is found in the cache, all of them in one CUDA
graph; the median of the replays counts. Before it is timed, a candidate has to have the right product. A table of
speeds over the dense layer is printed, and all figures go to a CSV file in docs/bench, with GPU, driver, versions and
commit. It is written after each layer, and has the name it keeps only when it is whole. Nothing else should run on the
GPU.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gc
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_rivals import CANDIDATES, DENSE, Candidate, Weight, random_weight

from llmq import ops
from llmq.environment import machine, versions
from llmq.grids.vq import VECTORS, vector_bits

ROOT = Path(__file__).resolve().parents[1]
# Layers of one input are one matrix: q, k and v, and gate and up.
SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "llama-3-8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "llama-3-70b": {
        "qkv": (10240, 8192),
        "o": (8192, 8192),
        "gate_up": (57344, 8192),
        "down": (8192, 28672),
    },
    "tiny": {"square": (256, 256), "wide": (384, 512)},
}
TOKENS = (1, 4, 16, 32, 64, 128, 512, 2048)
COLD = 512 << 20  # bytes of weights that take turns: four times the largest cache, ten times that of an H200
TINY_COLD = 1 << 20
CALLS = 20  # at least, in one graph
WRONG = 0.02  # of the norm of the product: several times what bfloat16 and scales in it are off

Timer = Callable[[Callable[[int], object], int], float]  # (call number i, calls) -> seconds of one


class Turns(NamedTuple):
    """Copies of one packed weight that take turns."""

    candidate: Candidate
    weight: Weight
    copies: list[Any]

    def multiply(self, x: Tensor, i: int) -> Tensor:
        """Return the product of `x` with copy i, counted around."""
        return self.candidate.multiply(x, self.copies[i % len(self.copies)], self.weight)


@dataclass(frozen=True)
class Figure:
    """One line of the CSV file, without what all lines share."""

    model: str
    layer: str
    n: int
    k: int
    grid: str
    bits: int
    group_size: int
    symmetric: bool
    dtype: str
    tokens: int
    candidate: str
    row: str  # which of its kernels
    microseconds: float | None  # None: it was not timed
    over_dense: float | None  # speed
    gigabytes_per_second: float | None  # of packed weight
    reason: str  # why not


def nbytes(packed: Any) -> int:
    """Return the bytes of a packed weight: tensors, or a module that has them."""
    tensors = (*packed.parameters(), *packed.buffers()) if isinstance(packed, nn.Module) else packed
    return sum(tensor.nbytes for tensor in tensors)


def turns(candidate: Candidate, weight: Weight, cold: int) -> Turns:
    """Return as many copies of a weight as it takes to fill `cold` bytes, and one more.

    Raises:
        ValueError: its product is wrong.
    """
    packed = candidate.pack(weight)
    made = Turns(candidate, weight, [packed])
    x = torch.randn(16, weight.layer.in_features, device=weight.device).to(weight.dtype)
    expected = x.float() @ weight.dequantize().T
    off = float((made.multiply(x, 0).float() - expected).norm() / expected.norm())
    if not off <= WRONG:
        raise ValueError(f"its product is off by {off:.1%}")
    made.copies.extend(copy.deepcopy(packed) for _ in range(cold // nbytes(packed)))
    return made


def graph_timer(repeats: int) -> Timer:
    """Return what times calls inside a CUDA graph: the median of `repeats` replays after one that does not count."""

    def seconds(call: Callable[[int], object], calls: int) -> float:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and allocates what is kept
            call(0)
            call(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for i in range(calls):
                call(i)
        times = []
        for _ in range(1 + repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / calls)
        return median(times[1:])

    return seconds


def clock_timer(repeats: int) -> Timer:
    """Return what times calls one after another by the clock: the median of `repeats` rounds after one call."""

    def seconds(call: Callable[[int], object], calls: int) -> float:
        call(0)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for i in range(calls):
                call(i)
            times.append((time.perf_counter() - start) / calls)
        return median(times)

    return seconds


class Plan(NamedTuple):
    """What is timed, on what, and how."""

    dtype: torch.dtype
    device: torch.device
    tokens: Sequence[int]
    candidates: Sequence[str]
    cold: int
    timer: Timer


def figures(model: str, name: str, layer: ops.Layer, plan: Plan) -> list[Figure]:
    """Time all candidates on one layer, token count by token count; the dense one comes first."""
    weight = random_weight(layer, plan.dtype, plan.device)
    ready, reasons = {}, {}
    for key in (DENSE, *(key for key in plan.candidates if key != DENSE)):
        candidate = CANDIDATES[key]
        reason = candidate.refuses(weight)
        if reason is None:
            try:
                ready[key] = turns(candidate, weight, plan.cold)
            except Exception as error:  # packages of others raise whatever they like
                reason = first_line(error)
        reasons[key] = reason or ""
    found = []
    for tokens in plan.tokens:
        x = torch.randn(tokens, layer.in_features, device=plan.device).to(plan.dtype)
        dense: float | None = None
        for key, refused in reasons.items():
            seconds, reason = timed(ready.get(key), x, plan.timer) if not refused else (None, refused)
            dense = seconds if key == DENSE else dense
            moved = nbytes(ready[key].copies[0]) if key in ready else 0
            found.append(
                Figure(
                    model=model,
                    layer=name,
                    n=layer.out_features,
                    k=layer.in_features,
                    grid=layer.grid,
                    bits=layer.bits,
                    group_size=layer.group_size,
                    symmetric=layer.symmetric,
                    dtype=str(plan.dtype).removeprefix("torch."),
                    tokens=tokens,
                    candidate=key,
                    row=CANDIDATES[key].row(weight),
                    microseconds=None if seconds is None else seconds * 1e6,
                    over_dense=None if seconds is None or dense is None else dense / seconds,
                    gigabytes_per_second=None if seconds is None else moved / seconds / 1e9,
                    reason=reason,
                )
            )
    return found


def timed(made: Turns | None, x: Tensor, timer: Timer) -> tuple[float | None, str]:
    """Return the seconds of one product, or why there are none."""
    assert made is not None, "nothing refused it"
    try:
        return timer(lambda i: made.multiply(x, i), max(CALLS, len(made.copies))), ""
    except Exception as error:
        return None, first_line(error)


def first_line(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


def surroundings(device: torch.device, timer: str) -> dict[str, str]:
    """Return what all lines of a CSV file share."""
    packages = {name: version(name) for name in ("vllm", "gptqmodel") if find_spec(name) is not None}
    found = versions()
    return {
        "gpu": str(machine(device)["device_name"]),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "none",
        "cuda": torch.version.cuda or "none",
        "torch": found["torch"],
        "triton": found.get("triton", "none"),
        "llmq": found["llmq"],
        "commit": commit(),
        "others": " ".join(f"{name} {number}" for name, number in packages.items()),
        "timed by": timer,
    }


def commit() -> str:
    """Return the commit of the working tree, marked where it is changed."""
    found = output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{found or 'unknown'}{'-changed' if changed else ''}"


def output(*command: str) -> str:
    """Return the first line that `command` prints; nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return next(iter(run.stdout.splitlines()), "").strip() if run.returncode == 0 else ""


def write(path: Path, found: Iterable[Figure], shared: dict[str, str]) -> None:
    """Write a CSV file: what all lines share, then the figures; an empty cell for what was not timed."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*shared, *(field.name for field in fields(Figure))], lineterminator="\n")
        writer.writeheader()
        for figure in found:
            cells = {
                key: f"{value:.4g}" if isinstance(value, float) else value for key, value in asdict(figure).items()
            }
            writer.writerow({**shared, **cells})


def table(found: Sequence[Figure]) -> Table:
    """Return the speed over the dense layer, and the microseconds of the dense layer itself."""
    tokens = sorted({figure.tokens for figure in found})
    shown = Table("layer", "N x K", "", *(f"M={count}" for count in tokens), box=None, pad_edge=False)
    rows: dict[tuple[str, str, str], dict[int, Figure]] = {}
    for figure in found:
        key = (f"{figure.model} {figure.layer}", f"{figure.n} x {figure.k}", figure.candidate)
        rows.setdefault(key, {})[figure.tokens] = figure
    for key, cells in rows.items():
        if all(figure.microseconds is None for figure in cells.values()):
            continue  # its reason is said beside the table
        shown.add_row(*key, *(cell(cells.get(count)) for count in tokens))
    return shown


def cell(figure: Figure | None) -> str:
    """Return a cell of the table."""
    if figure is None or figure.microseconds is None:
        return "-"
    if figure.candidate == DENSE or figure.over_dense is None:
        return f"{figure.microseconds:.1f} µs"
    return f"{figure.over_dense:.2f}"


def reasons(found: Sequence[Figure]) -> list[str]:
    """Return why something was not timed, each reason once."""
    said: dict[str, list[str]] = {}
    for figure in found:
        if figure.reason:
            said.setdefault(f"{figure.candidate}: {figure.reason}", []).append(f"{figure.layer} at {figure.tokens}")
    return [f"not timed: {reason} ({len(places)} times, first {places[0]})" for reason, places in said.items()]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["llama-3-8b", "llama-3-70b"], choices=list(SIZES))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--bits", type=int, default=4, choices=range(1, 9))
    parser.add_argument("--grid", default="uniform", choices=["uniform", *VECTORS])
    parser.add_argument("--group-size", type=int, default=128, help="-1: one group per row")
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "bench", help="folder of the CSV file")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --repeats 1 --sizes tiny only shows that everything runs")
    if options.repeats < 1 or min(options.tokens) < 1:
        parser.error("--repeats and --tokens have to be 1 or more")
    if options.bits not in (vector_bits(options.grid) if options.grid in VECTORS else range(2, 9)):
        parser.error(f"the {options.grid} grid has no {options.bits} bits")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Time everything, write the file and print the table; 1 if llmq itself or the dense layer could not be timed."""
    options = parse(arguments)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    shared = surroundings(device, "cuda graph" if on_gpu else "clock")
    timer = (graph_timer if on_gpu else clock_timer)(options.repeats)
    cold = COLD if on_gpu else TINY_COLD
    plan = Plan(getattr(torch, options.dtype), device, options.tokens, options.candidates, cold, timer)
    grid = "" if options.grid == "uniform" else f"{options.grid}-"
    kind = f"{grid}{options.bits}bit-{'row' if options.group_size < 0 else f'g{options.group_size}'}"
    name = f"{re.sub('[^a-z0-9]+', '-', shared['gpu'].lower()).strip('-')}-{kind}-{'asym' if options.asym else 'sym'}"
    path = options.output / f"{name}-{options.dtype}.csv"
    unfinished = path.with_suffix(".csv.part")
    console = Console(width=None if sys.stdout.isatty() else 200)
    found: list[Figure] = []
    for model in options.sizes:
        for layer, (n, k) in SIZES[model].items():
            group = k if options.group_size < 0 else options.group_size
            found += figures(model, layer, ops.Layer(options.bits, group, not options.asym, n, k, options.grid), plan)
            write(unfinished, found, shared)
            print(f"{model} {layer} {n} x {k}: done", file=sys.stderr, flush=True)
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()  # copies of the next weight have other sizes
    unfinished.replace(path)
    console.print(table(found))
    for line in reasons(found):
        print(line)
    print(path)
    return int(any(figure.microseconds is None for figure in found if figure.candidate in (DENSE, "llmq")))


if __name__ == "__main__":
    raise SystemExit(main())
