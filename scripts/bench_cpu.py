#!/usr/bin/env python
"""Packed linear layers on a CPU against dense ones, row by row of the kernel table.

    scripts/bench_cpu.py
    scripts/bench_cpu.py --bits 8 --group-size -1 --size 4096 --threads 2 --tokens 1 16 128
    scripts/bench_cpu.py --dtype float32 --bits 2 3 4 8
    scripts/bench_cpu.py --grid codebook --bits 2 3 4

Weights are cold: copies of more than the caches hold take turns. All candidates take turns too, and the least of the
repeats counts. Time is that of the processor, over threads, so that what else runs on the machine is seen little; for
several threads that leaves out what they wait for each other. A figure in brackets is the speed over the dense layer.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from itertools import cycle

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait take no time of the processor

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmq import ops
from llmq.formats import bits as bitstream
from llmq.formats.streams import Stream
from llmq.grids import GRIDS, make_grid

COLD = 160 << 20  # bytes that take turns: several times the third-level cache of the machine


def main() -> None:
    args = arguments()
    dtype = getattr(torch, args.dtype)
    for threads in args.threads:
        torch.set_num_threads(threads)
        for size in args.size:
            for bits in args.bits:
                group = size if args.group_size < 0 else args.group_size
                symmetric = not args.asym if args.grid == "uniform" else GRIDS[args.grid].symmetric[0]
                layer = ops.Layer(bits, group, symmetric, size, size, args.grid)
                kind = f"{args.grid}, {bits} bits, groups of {group}"
                print(f"\n{kind}, N = K = {size}, {args.dtype}, {threads} threads; µs")
                table(layer, dtype, args, threads)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--size", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--grid", default="uniform", choices=list(GRIDS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--rows", nargs="+", help="rows of the kernel table; all that run the layer, but for reference")
    return parser.parse_args()


def table(layer: ops.Layer, dtype: torch.dtype, args: argparse.Namespace, threads: int) -> None:
    device = torch.device("cpu")
    names = args.rows or [
        name for name, row in ops.KERNELS.items() if name != "reference" and row.refuses(layer, device, dtype) is None
    ]
    names = list({ops.KERNELS[name].matmul: name for name in reversed(names)}.values())[::-1]  # two rows share theirs
    runs = {"dense": dense(layer, dtype)} | {name: packed(name, layer, dtype) for name in names}
    print("     M" + "".join(f"{name:>22}" for name in runs))
    for tokens in args.tokens:
        x = torch.randn(tokens, layer.in_features).to(dtype)
        best = fastest(runs, x, max(3, args.repeats if tokens <= 32 else args.repeats // 4))
        shown = "".join(f"{1e6 * s / threads:14.0f} ({best['dense'] / s:5.2f})" for s in best.values())
        print(f"{tokens:6}{shown}", flush=True)


def dense(layer: ops.Layer, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return a function that multiplies with the next of several dense weights."""
    weight = torch.randn(layer.out_features, layer.in_features).to(dtype)
    turns = cycle([weight.clone() for _ in range(-(-COLD // weight.nbytes))])
    return lambda x: linear(x, next(turns))


def packed(name: str, layer: ops.Layer, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return a function that multiplies with the next of several packed weights, by row `name`."""
    bits, group, symmetric, n, k, grid_name = layer
    grid = make_grid(grid_name, bits, symmetric)
    words = bitstream.pack(torch.randint(2**bits, (n, k), dtype=torch.uint8), bits)
    groups = (n, -(-k // group))
    lowest, highest = grid.zeros
    zeros = torch.randint(lowest, highest + 1, groups).to(torch.uint8 if bits < 8 else torch.int16)
    levels = torch.randn(*groups, 2**bits).half() / 64 if grid.learns else None
    scales = torch.ones(groups).half() if grid.learns else torch.rand(groups).half() / 64
    made = ops.KERNELS[name].pack(Stream(words, scales, None if symmetric else zeros, levels), layer, dtype)
    copies = -(-COLD // sum(tensor.nbytes for tensor in made))
    turns = cycle([[tensor.clone() for tensor in made] for _ in range(copies)])
    return lambda x: ops.KERNELS[name].matmul(x, next(turns), None, layer)


def fastest(runs: dict[str, Callable[[Tensor], Tensor]], x: Tensor, repeats: int) -> dict[str, float]:
    """Return the least seconds of the processor that each run took."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run(x)
            best[name] = min(best[name], time.process_time() - start)
    return best


if __name__ == "__main__":
    main()
