#!/usr/bin/env python
"""One decoding step of a packed model on a CPU, with layers that share an input fused and apart.

    scripts/bench_fusion.py DIR
    scripts/bench_fusion.py DIR --tokens 1 2 4 --dtype float32 --repeats 50

Both ways take turns. Time is that of the processor, so that what else runs on the machine is seen little: one thread.
Ratios are medians over pairs; more than 1 means that fused is faster.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

import llmq
from llmq.nn import QuantLinear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 16], help="sequences decoded at once")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = llmq.load(args.directory, dtype=getattr(torch, args.dtype))
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    groups = {linear: linear.fused for linear in linears}
    for group in {group for group in groups.values() if group is not None}:
        group._tokens = max(args.tokens)  # whatever the limit is
    for tokens in args.tokens:
        apart, fused = zip(*measured(model, groups, tokens, args.repeats), strict=True)
        ratio = median(a / b for a, b in zip(apart, fused, strict=True))
        print(f"{tokens} tokens: apart {1e3 * median(apart):.3f} ms, fused {1e3 * median(fused):.3f} ms, {ratio:.3f}")


@torch.no_grad()
def measured(
    model: torch.nn.Module, groups: dict[QuantLinear, object], tokens: int, repeats: int
) -> list[tuple[float, float]]:
    """Return the seconds of a step apart and fused, so many times."""
    ids = torch.randint(1, 100, (tokens, 64), generator=torch.Generator().manual_seed(0))
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    found = []
    for turn in range(repeats + 2):
        seconds = {}
        for fused in (True, False) if turn % 2 else (False, True):
            for linear, group in groups.items():
                linear.fused = group if fused else None  # type: ignore[assignment]
            start = time.process_time()
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
            seconds[fused] = time.process_time() - start
            cache.crop(-1)
        found.append((seconds[False], seconds[True]))
    return found[2:]


if __name__ == "__main__":
    main()
