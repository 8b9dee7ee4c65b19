"""What grids of vectors lose, layer by layer, and how fast they multiply: the figures of docs/grids/vectors.md.

    python scripts/bench_vectors.py losses MODEL STATISTICS BLOCK…   STATISTICS is a folder of `llmq collect`
    python scripts/bench_vectors.py speed

Losses are shares of the layers' energy, on the held-out tokens of the statistics, after two rounds of refinement.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear

from llmq import ops
from llmq.formats import streams
from llmq.grids.uniform import UniformGrid
from llmq.grids.vq import MAX_ENTRY, VectorGrid, VectorWeight
from llmq.hessian import HessianSum
from llmq.refine import refine
from llmq.solvers.gptq import gptq
from llmq.solvers.vectors import vector_gptq
from llmq.vectors.refining import refined

_DAMP = 0.05
_REPEATS = 15


def layers(model: Path, statistics: Path, blocks: list[int]) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield name, weight and both Hessians of each linear of these blocks."""
    weights = {name: t for file in model.glob("*.safetensors") for name, t in load_file(file).items()}
    manifest = json.loads((statistics / "statistics.json").read_text())
    for block in blocks:
        for problem in (problem for stage in manifest["blocks"][block] for problem in stage["problems"]):
            sums = load_file(statistics / problem["file"])
            train, held_out = (
                HessianSum.of_state(sums[kind], problem[kind]).mean(kind) for kind in ("train", "held_out")
            )
            for name, start, stop in problem["rows"]:
                yield name, weights[f"{name}.weight"][start:stop].float(), train, held_out


def losses(model: Path, statistics: Path, blocks: list[int]) -> None:
    """Print what each way loses, the geometric mean of its ratio to the uniform grid's loss, and seconds of a core."""
    ratios: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for name, w, h, judge in layers(model, statistics, blocks):
        k, damped = w.shape[1], h.clone()
        damped.diagonal().add_(_DAMP * h.diagonal().mean())
        uniform = gptq(w, h, UniformGrid(2, False), 128, damp_percent=_DAMP, scale_search="hessian").weight
        found = {"uniform g128": refine(uniform, w, damped, 2)}
        for label, grid, size, order in (
            ("vq2", VectorGrid(2, 2), k, "act"),
            ("vq4", VectorGrid(2, 4), k, "act"),
            ("vq4 natural", VectorGrid(2, 4), k, "natural"),
            ("vq4 g128", VectorGrid(2, 4), 128, "act"),
        ):
            start = time.process_time()
            q = vector_gptq(w, h, grid, size, damp_percent=_DAMP, order=order).weight
            assert isinstance(q, VectorWeight)
            found[label] = refined(q, w, damped, 2)
            seconds[label] = seconds.get(label, 0.0) + time.process_time() - start
        energy = float(((w @ judge) * w).sum())
        lost = {}
        for label, q in found.items():
            error = w - q.dequantize()
            lost[label] = float(((error @ judge) * error).sum()) / energy
            ratios.setdefault(label, []).append(lost[label] / lost["uniform g128"])
        print(name, *(f"{label} {value:.4f}" for label, value in lost.items()), sep="  ", flush=True)
    for label, values in ratios.items():
        took = f", {seconds[label]:.1f} s" if label in seconds else ""
        print(f"{label}: {torch.tensor(values).log().mean().exp():.3f} of the uniform grid's{took}")


def speed() -> None:
    """Print how long one product by vectors and by dense weights takes."""
    wide = VectorGrid(2, 4)
    for grid, group_size in ((wide, None), (wide, 128), (VectorGrid(4, 2), None), (VectorGrid(1, 8), None)):
        for size in (2048, 4096):
            group = group_size or size
            draw = torch.Generator().manual_seed(0)
            codes = torch.randint(0, grid.entries, (size, size // grid.columns), generator=draw).to(torch.uint8)
            book = torch.randint(-MAX_ENTRY, MAX_ENTRY + 1, (grid.entries, grid.columns), generator=draw).float()
            scales = torch.full((size, size // group), 2.0**-10)
            zeros = torch.zeros_like(scales)
            _speed(VectorWeight(codes, scales, zeros, grid, group, codebook=book, in_features=size), grid)


def _speed(weight: VectorWeight, grid: VectorGrid) -> None:
    """Print medians in milliseconds of a square layer, those of all rows in turn."""
    size, group = weight.in_features, weight.group_size
    layer = ops.Layer(grid.bits, group, True, size, size, grid.name)
    stream = streams.of(weight, grid.bits, symmetric=True)
    for dtype in (torch.bfloat16, torch.float32):
        dense = weight.dequantize().to(dtype)
        for tokens in (1, 4, 16, 64):
            x = torch.randn(tokens, size).to(dtype)
            runs: dict[str, Callable[[], Tensor]] = {"dense": partial(linear, x, dense)}
            for name in ("cpu_vectors", "vectors"):
                row = ops.KERNELS[name]
                runs[name] = partial(row.matmul, x, row.pack(stream, layer, dtype), None, layer)
            shown = ", ".join(f"{name} {milliseconds:.2f} ms" for name, milliseconds in _medians(runs).items())
            print(
                f"{size}, {grid.name} {grid.bits} bits, groups of {group}, {dtype}, {tokens} tokens: {shown}",
                flush=True,
            )


def _medians(runs: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_REPEATS + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: 1e3 * median(each[1:]) for name, each in seconds.items()}


if __name__ == "__main__":
    if sys.argv[1] == "speed":
        speed()
    else:
        losses(Path(sys.argv[2]), Path(sys.argv[3]), [int(block) for block in sys.argv[4:]])
