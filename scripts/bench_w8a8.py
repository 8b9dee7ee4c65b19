#!/usr/bin/env python
"""8-bit weights times 8-bit activations on a CPU, against dense layers in bfloat16 and float32.

    scripts/bench_w8a8.py
    scripts/bench_w8a8.py --size 4096 --threads 1 --tokens 1 16 128

Activations are bfloat16 (float32 for the dense layer of float32), and quantizing them is part of the time. How it is
taken, and what figures in brackets are, as in bench_cpu.py: the speed over the dense layer in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle

import bench_cpu
import torch
from torch import Tensor
from torch.nn.functional import linear

from llmq_kernels.native import w8a8


def main() -> None:
    args = arguments()
    for threads in args.threads:
        torch.set_num_threads(threads)
        for size in args.size:
            print(f"\nN = K = {size}, {threads} threads; µs")
            table(size, args, threads)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=30)
    return parser.parse_args()


def table(size: int, args: argparse.Namespace, threads: int) -> None:
    runs = {"dense": dense(size, torch.bfloat16), "float32": dense(size, torch.float32), "w8a8": quantized(size)}
    print("     M" + "".join(f"{name:>22}" for name in runs))
    for tokens in args.tokens:
        x = torch.randn(tokens, size).bfloat16()
        best = bench_cpu.fastest(runs, x, max(3, args.repeats if tokens <= 32 else args.repeats // 4))
        shown = "".join(f"{1e6 * s / threads:14.0f} ({best['dense'] / s:5.2f})" for s in best.values())
        print(f"{tokens:6}{shown}", flush=True)


def dense(size: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return a function that multiplies with the next of several dense weights."""
    weight = torch.randn(size, size).to(dtype)
    turns = cycle([weight.clone() for _ in range(-(-bench_cpu.COLD // weight.nbytes))])
    return lambda x: linear(x.to(dtype), next(turns))


def quantized(size: int) -> Callable[[Tensor], Tensor]:
    """Return a function that multiplies with the next of several weights of 8 bits."""
    codes = torch.randint(-127, 128, (size, size), dtype=torch.int8)
    words, scales = w8a8.pack(codes, torch.rand(size) / 64)
    turns = cycle([words.clone() for _ in range(-(-bench_cpu.COLD // words.nbytes))])
    return lambda x: w8a8.matmul(x, next(turns), scales, None)


if __name__ == "__main__":
    main()
