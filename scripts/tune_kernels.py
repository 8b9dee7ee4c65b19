"""Time the rows that a table of tile sizes could have on the GPU at hand, and write the table of its family.

    python scripts/tune_kernels.py [--output kernels/llmq_kernels/configs] [--kernels w4a16] [--shapes 4096x14336]

For each number of tokens every candidate multiplies with weights of the given shapes (N x K), inside a CUDA graph, with
copies of the weight taking turns so that none is found in the cache: bfloat16, in groups of 128, vectors by `vq4` at 2
bits with one scale per row. The geometric mean over the shapes decides. A few minutes per kernel; nothing else should
run on the GPU. Look at scripts/sass_report.py afterwards: it compiles what was chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmq_kernels import few, layout, many, tables, tiling, vector_product, w2a16, w4a16, w8a16
from llmq_kernels.tables import Few, Tile

SHAPES = ("6144x4096", "4096x4096", "28672x4096", "4096x14336", "10240x8192", "57344x8192", "8192x28672")
GROUP = 128
FEW_TOKENS = (1, 2, 4)
TILE_TOKENS = (16, 32, 64, 128, 512)
MANY_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)
COLD = 512 << 20  # bytes of weights that take turns: ten times the cache of an H200
CALLS = 20  # in one graph
REPEATS = 10

Row = Few | Tile | None  # None: dequantize, and multiply densely
Measure = Callable[[Row, int, str], float]  # a row, tokens, a shape; seconds, infinite where it cannot run


def few_rows(m: int) -> Iterator[Few]:
    """Yield the candidates for exactly `m` tokens."""
    for block_n, num_warps in product((16, 32, 64, 128), (1, 2, 4)):
        yield Few(m, block_n, num_warps)


def tile_rows(m: int) -> Iterator[Tile]:
    """Yield the candidates for up to `m` tokens: partial sums are scaled only where registers allow."""
    for block_m, block_n, num_warps, num_stages in product((16, 32, 64, 128), (64, 128), (4, 8), (3, 4, 5)):
        if block_m <= m:
            for post_scale in (True, False) if block_m <= 32 else (False,):
                yield Tile(m, block_m, block_n, num_warps, num_stages, post_scale)


def cost(measure: Measure, row: Row, m: int, shapes: list[str]) -> float:
    """Return the mean of the logarithms of the seconds over `shapes`."""
    return sum(math.log(measure(row, m, shape)) for shape in shapes) / len(shapes)


def tune(measure: Measure, shapes: list[str]) -> dict[str, Any]:
    """Return the best table of a kernel, ready for JSON."""

    def best(rows: Iterator[Few] | Iterator[Tile], m: int) -> tuple[float, Any]:
        return min(((cost(measure, row, m, shapes), row) for row in rows), key=lambda pair: pair[0])

    chosen = [best(tile_rows(m), m) for m in TILE_TOKENS]
    tiles = [row for found, row in chosen if found < math.inf]
    sums: list[Few] = []
    for m in FEW_TOKENS:
        found, row = best(few_rows(m), m)
        if tiles and found >= cost(measure, tiles[0], m, shapes):
            break  # from here on a tile is faster
        sums.append(row)
    dense_from = MANY_TOKENS[-1] + 1 if tiles else FEW_TOKENS[-1] + 1  # beyond what is timed: dense
    for m in reversed(MANY_TOKENS if tiles else ()):
        tile = next((tile for tile in tiles if m <= tile.max_m), tiles[-1])
        if cost(measure, None, m, shapes) > cost(measure, tile, m, shapes):
            break  # from the next one on dense is faster
        dense_from = m
    return {"few": [asdict(row) for row in sums], "tiles": [asdict(row) for row in tiles], "many_from": dense_from}


def text(table: dict[str, Any]) -> str:
    """Return a file of tables, one row per line."""
    rows = re.sub(
        r"\{\s*(\"max_m\"[^{}]*?)\s*\}",
        lambda found: "{" + re.sub(r"\s*\n\s*", " ", found[1]) + "}",
        json.dumps(table, indent=2),
    )
    return rows + "\n"


class Kernel(NamedTuple):
    """What is timed: random operands of an N x K weight, and their product with x by a row of the table."""

    pack: Callable[[int, int, torch.device], tuple[Tensor, ...]]
    multiply: Callable[[Tensor, tuple[Tensor, ...], int, Row], Tensor]


def weight_only(module: Any) -> Kernel:
    """Return the kernel of a module of llmq_kernels."""

    def pack(n: int, k: int, device: torch.device) -> tuple[Tensor, ...]:
        codes = torch.randint(2**module.LAYOUT.bits, (n, k), dtype=torch.uint8, device=device)
        scales = torch.rand(n, k // GROUP, device=device) / 64
        return tuple(module.pack(codes, scales, None, GROUP, torch.bfloat16).tensors())

    def multiply(x: Tensor, tensors: tuple[Tensor, ...], n: int, row: Row) -> Tensor:
        weight = layout.Weight(module.LAYOUT, layout.Packed(*tensors), n, x.shape[1], GROUP)
        if row is None:
            return many.matmul(x, weight, None)
        return few.matmul(x, weight, None, row) if isinstance(row, Few) else tiling.matmul(x, weight, None, row)

    return Kernel(pack, multiply)


def _pack_vectors(n: int, k: int, device: torch.device) -> tuple[Tensor, ...]:
    codes = torch.randint(256, (n, k // 4), dtype=torch.uint8, device=device)
    book = torch.randint(-127, 128, (256, 4), dtype=torch.int8, device=device)
    scales = torch.rand(n, 1, device=device).half() / 4096
    return vector_product.pack(codes, book, scales, vector_product.Kind(n, k, 4, 8, k))


def _multiply_vectors(x: Tensor, tensors: tuple[Tensor, ...], n: int, row: Row) -> Tensor:
    kind = vector_product.Kind(n, x.shape[1], 4, 8, x.shape[1])
    weight = vector_product.Weight(vector_product.Packed(*tensors), kind)
    if row is None:
        return vector_product.by_rows(x, weight, None)
    return (
        vector_product.few(x, weight, None, row) if isinstance(row, Few) else vector_product.tiled(x, weight, None, row)
    )


KERNELS = {
    **{name: weight_only(module) for name, module in (("w2a16", w2a16), ("w4a16", w4a16), ("w8a16", w8a16))},
    vector_product.NAME: Kernel(_pack_vectors, _multiply_vectors),
}


def on_gpu(kernel: Kernel) -> Measure:
    """Return what measures the rows of `kernel` on the current GPU."""
    weights: dict[str, list[tuple[Tensor, ...]]] = {}

    def measure(row: Row, m: int, shape: str) -> float:
        n, k = map(int, shape.split("x"))
        if shape not in weights:
            weights.clear()
            weights[shape] = copies(kernel.pack(n, k, torch.device("cuda")))
        turns = weights[shape]
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        try:
            return seconds(lambda i: kernel.multiply(x, turns[i % len(turns)], n, row))
        except Exception as error:  # Triton raises types of its own, which change, where a tile does not fit
            print(f"{row} at {m} tokens: {error}", file=sys.stderr)
            return math.inf

    return measure


def copies(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Return the operands of a weight as often as it takes to fill more than the caches."""
    count = 1 + COLD // tensors[0].nbytes
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(count)]


def seconds(call: Callable[[int], object]) -> float:
    """Return the least seconds of one of `CALLS` calls in a CUDA graph."""
    call(0)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(i)
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / CALLS)
    return min(times)


def main(arguments: list[str] | None = None) -> int:
    """Tune, and write the table."""
    summary, *rest = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        description=summary, epilog="\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=tables.FOLDER, help="folder of tables")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="N x K of the weights")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no GPU to time kernels on")
    family = tables.family(torch.cuda.get_device_capability())
    path = options.output / f"{family}.json"
    known = path if path.exists() else tables.FOLDER / f"{family}.json"
    table = json.loads(known.read_text(encoding="utf-8"))
    for name in options.kernels:
        table[name] = tune(on_gpu(KERNELS[name]), options.shapes)
    table["timed"] = torch.cuda.get_device_name()
    path.write_text(text(table), encoding="utf-8")
    print(f"{path}: tuned on {table['timed']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
