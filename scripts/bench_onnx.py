"""Tokens per second of one sequence on one thread: onnxruntime, llmq.hf, and the dense original in PyTorch.

    scripts/bench_onnx.py PACKED ORIGINAL

The ways take turns, 64 tokens after a prompt of 32 each time; a line has the median and the best of nine rounds, and
the median over that of the dense model. The folder is exported with exact and with 8-bit activations.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import llmq.hf
from llmq.exports.onnx import EXACT, FAST, export
from llmq.packed import PackedCheckpoint

sys.path.insert(0, str(Path(llmq.hf.__file__).parent / "loaders"))  # as the loader's own process has it
from use_onnxruntime import Session  # type: ignore[import-not-found]

PROMPT, NEW, ROUNDS = 32, 64, 9
Way = Callable[[], float]


def onnx(folder: Path, ids: torch.Tensor) -> Way:
    session = Session(str(folder))

    def decode() -> float:
        logits, past = session.run(ids.numpy(), session.empty(1))
        start = time.perf_counter()
        for _ in range(NEW):
            logits, past = session.run(np.array([[logits[0, -1].argmax()]], dtype=np.int64), past)
        return NEW / (time.perf_counter() - start)

    return decode


def torch_model(folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> Way:
    model = llmq.hf.load(folder, dtype=dtype)

    @torch.no_grad()
    def decode() -> float:
        out = model(ids, use_cache=True)
        start = time.perf_counter()
        for _ in range(NEW):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return NEW / (time.perf_counter() - start)

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path)
    parser.add_argument("original", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    packed = PackedCheckpoint(options.packed)
    ids = torch.randint(1, packed.config["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as work:
        ways = {}
        for name, level in (("onnxruntime", EXACT), ("onnxruntime, 8-bit activations", FAST)):
            export(packed, Path(work, name), accuracy_level=level)
            ways[name] = onnx(Path(work, name), ids)
        for dtype in (torch.float32, torch.bfloat16):
            label = str(dtype).removeprefix("torch.")
            ways[f"llmq.hf, {label}"] = torch_model(options.packed, ids, dtype)
            ways[f"dense, {label}"] = torch_model(options.original, ids, dtype)
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                found[name].append(way())
    medians = {name: statistics.median(speeds) for name, speeds in found.items()}
    for name, speeds in found.items():
        ratio = medians[name] / medians["dense, float32"]
        print(f"{name:32} {medians[name]:8.1f} tokens/s (best {max(speeds):.1f})  {ratio:.2f} of dense float32")


if __name__ == "__main__":
    main()
