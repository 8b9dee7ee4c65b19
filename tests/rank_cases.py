"""Runs that several processes share, as tests start them: without torchrun, which only sets the same variables."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny_models import LLAMA, make_model, make_text
from transformers import LlamaConfig, Qwen3MoeConfig

from llmq import driver
from llmq.budget import Budget
from llmq.cli.app import app
from llmq.errors import SolverError
from llmq.journal import Journal
from llmq.preflight import prepare
from llmq.recipe import Recipe

SMALLER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
COMMON = {"bits": 3, "sym": False, "group_size": 16, "num_samples": 10, "seq_len": 32, "shard_size": "20KB"}
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "plain": {"shift": 0.0, "refine_rounds": 0, "random_windows": 0.0, "held_out": 0.0},
    "default": {},
    "best": {"guidance_groups": 1, "tune_steps": 4, "tune_epochs": 2, "scaling": "smooth", "dtype": "float32"},
    "moe": {"guidance_groups": 2},
    "moe, all experts": {"all_experts": True},
}
EXPERTS = {"num_hidden_layers": 1, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2}


def make_sources(folder: Path) -> None:
    """Write a Llama, a mixture of experts and a text to `folder`."""
    make_text(folder / "text.txt", 1000)
    make_model(folder / "llama", LlamaConfig(**{**LLAMA, **SMALLER}), dtype=torch.bfloat16)
    make_model(folder / "moe", Qwen3MoeConfig(**{**LLAMA, **SMALLER, **EXPERTS, "moe_intermediate_size": 32}))


@contextmanager
def small_pieces() -> Iterator[None]:
    """Let tiny runs have several batches, and linears several pieces."""

    def prepared(*arguments: Any) -> Any:
        return replace(prepare(*arguments), budget=Budget(batch_tokens=32, solver_rows=24))

    with patch.object(driver, "prepare", prepared), patch("llmq.run.TOKENS_PER_STEP", 64):
        yield


def run(source: Path, output: Path, kind: str) -> None:
    """Quantize by one of `RECIPES`."""
    recipe = Recipe(**COMMON | {"calibration": str(source / "text.txt")} | RECIPES[kind])
    with small_pieces():
        driver.quantize(source / ("moe" if kind.startswith("moe") else "llama"), output, recipe)


def content(folder: Path) -> dict[str, bytes]:
    """Return all files; of the report what does not depend on the clock."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files.pop("report.json"))
    del report["seconds"], report["peak_memory_bytes"]
    return {**files, "report.json": json.dumps(report).encode()}


def command(source: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of ``llmq`` for kind "default"."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in COMMON.items() if name != "sym"]
    text = f"--calibration={source / 'text.txt'}"
    return ["quantize", str(source / "llama"), "--output", str(output), "--asym", text, *options, *more]


def kill_at(stage: int) -> Any:
    """Return what kills this process after it has put so many stages on record."""
    append = Journal.append

    def killing(self: Journal, kind: str, **entries: Any) -> None:
        append(self, kind, **entries)
        if len(self.all("stage")) == stage:
            os.kill(os.getpid(), signal.SIGKILL)

    return patch.object(Journal, "append", killing)


def fail_to_solve() -> Any:
    """Return what lets the solver of this process fail."""

    def failing(*_: Any) -> Any:
        raise SolverError("here and nowhere else")

    return patch.object(driver, "solve_stage", failing)


def main() -> None:
    """Do what the command line of this process says: call `function` of this module with the arguments that follow."""
    function, *arguments = sys.argv[1:]
    globals()[function](*arguments)


def run_all(source: str, output: str, *kinds: str) -> None:
    for kind in kinds:
        run(Path(source), Path(output) / kind, kind)


def speak(what: str, source: str, *outputs: str) -> None:
    """Run the command line for each of `outputs`; rank 1 does `what` on its way. End with the last exit code."""
    rank, code = int(os.environ["RANK"]), None
    mischief = {"killed": lambda: kill_at(5), "failing": fail_to_solve}[what]
    for output in outputs:
        with small_pieces(), mischief() if rank == 1 else small_pieces():
            try:
                app(command(Path(source), Path(output)))
            except SystemExit as end:
                code = end.code
    sys.exit(code)


def start(*command: object, **variables: str) -> subprocess.Popen[str]:
    """Start Python with these arguments."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_ranks(world: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """Start `main` in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    return [start("rank_cases", *arguments, **there, RANK=str(rank)) for rank in range(world)]


def ended(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Return exit code, stdout and stderr of each process."""
    found = []
    for process in ranks:
        out, err = process.communicate(timeout=300)
        found.append((process.returncode, out, err))
    return found


@contextmanager
def ending(*ranks: subprocess.Popen[str]) -> Iterator[None]:
    """Kill what still runs at the end of the context."""
    try:
        yield
    finally:
        for process in ranks:
            with process:
                process.kill()


if __name__ == "__main__":
    main()
