"""Make a second model from a first: the same function, with outlier channels planted in its activations.

    python scripts/make_outlier_model.py SOURCE OUTPUT [--seed 0]

Every fold of every block (norm into the linears that read it, v_proj into o_proj, up_proj into down_proj) gets a few
channels whose activations are multiplied by a factor, log-uniform between 2 and 50, and whose columns are divided by
it. That is what large models have by themselves and small ones lack. Weights are written in float32, in which the
logits change by rounding only: in bfloat16 each factor would cost the eight bits that its weights have. How far they
changed is printed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmq.families import find_structure
from llmq.transforms import apply_scales_, find_wiring

SHARE = 0.03  # of the channels of each fold, at least one
SMALLEST, LARGEST = 2.0, 50.0
TOKENS = 64


def plant_(model: PreTrainedModel, seed: int) -> dict[str, float]:
    """Plant outliers in a float32 `model` and return the largest factor of every fold."""
    structure, generator = find_structure(model), torch.Generator().manual_seed(seed)
    largest = {}
    probes = list(zip(structure.blocks, structure.linears, _calls(model, list(structure.blocks)), strict=True))
    for block, linears, (run, x) in probes:
        for fold in find_wiring(block, linears, run, x).folds:
            count = math.ceil(SHARE * fold.channels)
            chosen = torch.randperm(fold.channels, generator=generator)[:count]
            spread = torch.rand(count, generator=generator, dtype=torch.float64)
            factors = torch.ones(fold.channels, dtype=torch.float64)
            factors[chosen] = SMALLEST * (LARGEST / SMALLEST) ** spread
            apply_scales_(fold, 1 / factors)
            largest[fold.name] = float(factors.max())
    return largest


def random_tokens(model: PreTrainedModel) -> Tensor:
    """Return one window of random tokens."""
    return torch.randint(model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _calls(model: PreTrainedModel, blocks: list[nn.Module]) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Return for each block how to run it alone, and the hidden states that enter it in a pass of the model."""
    found = []

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def run(x: Tensor) -> Tensor:
            out: Any = block(x, *args[1:], **kwargs)
            return out[0] if isinstance(out, tuple) else out

        found.append((run, args[0]))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    model(input_ids=random_tokens(model), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="checkpoint folder of a Llama or the like")
    parser.add_argument("output", type=Path, help="folder to make; it must not exist")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.output.exists():
        print(f"{options.output}: exists; remove it or choose another folder", file=sys.stderr)
        return 1
    model = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.float32).eval()
    model.requires_grad_(False)
    before = model(random_tokens(model)).logits
    planted = plant_(model, options.seed)
    after = model(random_tokens(model)).logits
    print(f"{len(planted)} folds, activations of some channels up to {max(planted.values()):.1f} times as large")
    print(f"logits changed by {float((after - before).norm() / before.norm()):.1e}, relatively")
    model.save_pretrained(options.output)
    AutoTokenizer.from_pretrained(options.source).save_pretrained(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
