"""Time and memory of loading packed folders through llmq.hf, against the dense folder.

    python scripts/bench_load.py DENSE PACKED... [--dtype float32] [--rounds 12]

Folders are loaded in turn in one process; the first two rounds are not counted. Then each is loaded once in a fresh
process, whose peak memory is compared with what it was before. "first use" is loading and one forward pass of 8 tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import llmq.hf

WARM_UP = 2


def load(folder: Path, dtype: torch.dtype) -> tuple[float, float]:
    """Return the seconds of loading a folder, and of that and a first forward pass."""
    gc.collect()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loaded = time.perf_counter()
    with torch.no_grad():
        model(torch.ones(1, 8, dtype=torch.int64))
    return loaded - start, time.perf_counter() - start


def peak() -> int:
    """Return the most memory that the process has had, in bytes, since it last asked the kernel to forget."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def growth(folder: Path, dtype: torch.dtype) -> tuple[int, int]:
    """Return how much loading a folder adds to the peak memory of this process, and the bytes of its tensors there."""
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)  # imports what it needs
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = peak()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return peak() - before, sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="the dense folder, then packed ones")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument(
        "--memory", action="store_true", help="print bytes that loading the one folder adds, and its own"
    )
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    folders, dtype = arguments.folders, getattr(torch, arguments.dtype)
    if arguments.memory:
        print(*growth(folders[0], dtype))
        return
    times: dict[Path, list[tuple[float, float]]] = {folder: [] for folder in folders}
    for _ in range(WARM_UP + arguments.rounds):
        for folder in folders:
            times[folder].append(load(folder, dtype))
    middle = {
        folder: [median(column) for column in zip(*rows[WARM_UP:], strict=True)] for folder, rows in times.items()
    }
    print(f"{'folder':16} {'load ms':>8} {'ratio':>6} {'first use ms':>13} {'ratio':>6} {'peak MB':>8} {'tensors':>8}")
    for folder, (loaded, used) in middle.items():
        command = [sys.executable, __file__, str(folder), "--dtype", arguments.dtype, "--memory"]
        added, size = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        first = middle[folders[0]]
        times_of = f"{1e3 * loaded:8.1f} {loaded / first[0]:6.2f} {1e3 * used:13.1f} {used / first[1]:6.2f}"
        print(f"{folder.name:16} {times_of} {added / 1e6:8.2f} {size / 1e6:8.2f}", flush=True)


if __name__ == "__main__":
    assert llmq.hf.METHODS, "importing it makes transformers load packed folders"
    main()
