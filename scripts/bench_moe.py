#!/usr/bin/env python
"""Packed experts run at once against the same experts run one by one, and against dense ones, on a CPU.

    scripts/bench_moe.py
    scripts/bench_moe.py --shape mixtral --bits 4 --tokens 1 4 512 --threads 2 --repeats 15

One block of experts with random weights and a random router, in bfloat16. `at once` is what a loaded model does, `one
by one` the same bank without it, `dense` a loop over dense experts. They take turns within each repeat; milliseconds of
the processor, over threads, and of these the median. A figure in brackets is the speed over `one by one`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait take no time of the processor

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from llmq.formats import bits as bitstream
from llmq.formats.streams import Stream
from llmq.moe import Bank, Names
from llmq.nn import QuantLinear
from llmq.packed_experts import gather_
from llmq.rows import KERNELS
from llmq.types import QuantSpec


class Shape(NamedTuple):
    """Sizes of a block of experts."""

    experts: int
    picked: int  # by each token
    width: int
    inner: int


# halves and quarters of the models': dense copies of whole ones do not fit a small machine
SHAPES = {
    "qwen3": Shape(64, 8, 2048, 768),
    "mixtral": Shape(8, 2, 2048, 3584),
}


class Fused(torch.nn.Module):
    """What a bank stands for: gate and up joined, SiLU."""

    is_concatenated, is_transposed, has_gate, has_bias = True, False, True, False

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        e, _, width, inner = shape
        self.gate_up_proj = torch.nn.Parameter(torch.empty(e, 2 * inner, width, device="meta", dtype=torch.bfloat16))
        self.down_proj = torch.nn.Parameter(torch.empty(e, width, inner, device="meta", dtype=torch.bfloat16))

    def _apply_gate(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, dim=-1)
        return silu(gate) * up


def main() -> None:
    args = arguments()
    shape = SHAPES[args.shape]
    torch.manual_seed(0)
    with torch.no_grad():
        bank = packed(shape, args.bits, args.group_size)
        runs = {"at once": bank, "one by one": alone(bank), "dense": dense(shape, bank)}
        for threads in args.threads:
            torch.set_num_threads(threads)
            print(f"\n{args.shape}: {shape.experts} experts, {shape.picked} picked, {shape.width} x {shape.inner}, "
                  f"{args.bits} bits, groups of {args.group_size}, {threads} threads; ms")  # fmt: skip
            print("     M" + "".join(f"{name:>20}" for name in runs))
            for tokens in args.tokens:
                print(f"{tokens:6}" + "".join(times(runs, shape, tokens, threads, args.repeats)), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3", choices=SHAPES)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    return parser.parse_args()


def packed(shape: Shape, bits: int, group_size: int) -> Bank:
    """Return a bank of random packed experts, run at once."""
    bank = Bank(Fused(shape), Names("gate_proj", "up_proj", "down_proj"))
    spec = QuantSpec(bits, group_size, True, "gptq")
    for expert in range(shape.experts):
        parent = bank.get_submodule(str(expert))
        for name, module in list(parent.named_children()):
            n, k = module.out_features, module.in_features
            new = QuantLinear(k, n, spec, bias=False, dtype=torch.bfloat16, device=None)
            words = bitstream.pack(torch.randint(2**bits, (n, k), dtype=torch.uint8), bits)
            scales = torch.rand(n, k // group_size).half() / (64 * k**0.5)
            kernel = "cpu_native"
            made = KERNELS[kernel].pack(Stream(words, scales, None), new.layer, torch.bfloat16)
            new.hold_(kernel, torch.bfloat16, made)
            setattr(parent, name, new)
    gather_(bank, torch.bfloat16)
    return bank


def alone(bank: Bank) -> Callable[..., Tensor]:
    """Return a bank's forward without what runs its experts at once."""

    def run(*inputs: Tensor) -> Tensor:
        together, bank.together = bank.together, None
        try:
            return bank(*inputs)
        finally:
            bank.together = together

    return run


def dense(shape: Shape, bank: Bank) -> Callable[..., Tensor]:
    """Return the plain loop over dense experts, picked tokens at a time."""
    first = torch.randn(shape.experts, 2 * shape.inner, shape.width, dtype=torch.bfloat16)
    last = torch.randn(shape.experts, shape.width, shape.inner, dtype=torch.bfloat16)

    def run(x: Tensor, picked: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in picked.unique().tolist():
            tokens, slots = (picked == expert).nonzero(as_tuple=True)
            y = linear(bank.activated(linear(x[tokens], first[expert])), last[expert])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out

    return run


def times(runs: dict[str, Callable[..., Tensor]], shape: Shape, tokens: int, threads: int, repeats: int) -> list[str]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(3, repeats if tokens < 64 else repeats // 3)):
        x = torch.randn(tokens, shape.width).bfloat16()
        scores, picked = torch.rand(tokens, shape.experts).topk(shape.picked)  # others each time: weights are cold
        for name, run in runs.items():
            start = time.process_time()
            run(x, picked, scores.bfloat16())
            taken[name].append((time.process_time() - start) / threads)
    middle = {name: median(found) for name, found in taken.items()}
    return [f"{1e3 * s:12.2f} ({middle['one by one'] / s:4.2f})" for s in middle.values()]


if __name__ == "__main__":
    main()
