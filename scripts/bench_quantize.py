"""How long `llmq quantize` takes: per phase, against one plain forward pass, and against peers in the same run.

    python scripts/bench_quantize.py MODEL --calibration FILE [--preset default] [--bits 4] [--group-size 128]
        [--num-samples 64] [--seq-len 512] [--runs 5] [--peers llmcompressor=PYTHON,gptqmodel=PYTHON]

Every run is a process of its own, llmq and the peers in turn, all with OMP_NUM_THREADS threads and the same windows.
"inside" is from the loaded libraries to the written checkpoint, "whole" the life of the process. Medians over the runs;
ratios are llmq's over the peer's. PYTHON is the interpreter of an environment that has the peer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmq.calibration import load_calibration

PEERS = Path(__file__).parent / "peers"
OWN = """
import json, sys, time
from pathlib import Path
import llmq.driver
from llmq.presets import preset_fields
from llmq.recipe import make_recipe
model, output, fields = sys.argv[1:]
fields = json.loads(fields)
recipe = make_recipe({**preset_fields(fields.pop("preset")), **fields})
start = time.perf_counter()
report = llmq.driver.quantize(model, output, recipe)
print(json.dumps({"seconds": time.perf_counter() - start, "phases": report.seconds}))
"""


def timed(command: list[str], output: Path) -> dict[str, Any]:
    """Run `command`, which prints JSON last, and return that with the seconds of the process as `whole`."""
    shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    whole = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:2])} failed:\n{done.stderr[-2000:]}")
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**said, "whole": whole}


def forward_seconds(model: str, ids: list[list[int]], runs: int) -> float:
    """Return the median time of a plain forward pass over all windows, eight at a time."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype="auto").base_model.eval()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        with torch.no_grad():
            for part in torch.tensor(ids).split(8):
                net(input_ids=part, use_cache=False)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def median(results: list[dict[str, Any]], name: str) -> float:
    return statistics.median(float(result[name]) for result in results)


def show(results: Mapping[str, list[dict[str, Any]]], forward: float) -> None:
    """Print the table of phases, and that of the peers."""
    own = results["llmq"]
    inside, whole = median(own, "seconds"), median(own, "whole")
    print(f"{'phase':16} {'s':>8} {'of all':>8} {'forward passes':>15}")
    for phase in own[0]["phases"]:
        seconds = statistics.median(result["phases"].get(phase, 0.0) for result in own)
        print(f"{phase:16} {seconds:8.2f} {seconds / inside:8.0%} {seconds / forward:15.1f}")
    print(f"{'inside':16} {inside:8.2f} {'':8} {inside / forward:15.1f}")
    print(f"\none forward pass of the calibration set: {forward:.2f} s\n")
    print(f"{'tool':16} {'inside s':>9} {'whole s':>9} {'llmq inside':>12} {'llmq whole':>12}")
    for name, found in results.items():
        theirs = median(found, "seconds"), median(found, "whole")
        print(f"{name:16} {theirs[0]:9.1f} {theirs[1]:9.1f} {inside / theirs[0]:12.2f} {whole / theirs[1]:12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", default="", help="name=python of the peer's environment, separated by commas")
    arguments = parser.parse_args()
    fields = {name: getattr(arguments, name) for name in ("preset", "bits", "group_size", "num_samples", "seq_len")}
    fields |= {"sym": False, "calibration": str(Path(arguments.calibration).resolve())}
    windows = load_calibration(
        arguments.calibration,
        AutoTokenizer.from_pretrained(arguments.model),
        num_samples=arguments.num_samples,
        seq_len=arguments.seq_len,
        seed=0,
    ).input_ids.tolist()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "windows.json").write_text(json.dumps(windows))
        commands = {"llmq": [sys.executable, "-c", OWN, arguments.model, str(folder / "llmq"), json.dumps(fields)]}
        for peer in filter(None, arguments.peers.split(",")):
            tool, _, python = peer.partition("=")
            common = [arguments.model, str(folder / tool), str(folder / "windows.json")]
            script = str(PEERS / f"{tool}_gptq.py")
            commands[tool] = [python, script, *common, str(arguments.bits), str(arguments.group_size)]
        results: dict[str, list[dict[str, Any]]] = {tool: [] for tool in commands}
        for _ in range(arguments.runs):
            for tool, command in commands.items():
                results[tool].append(timed(command, folder / tool))
    show(results, forward_seconds(arguments.model, windows, arguments.runs))


if __name__ == "__main__":
    main()
