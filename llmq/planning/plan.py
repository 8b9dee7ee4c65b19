"""The plan of a run: what it makes, needs and takes, and who can use the result."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from llmq.budget import Budget
from llmq.calibration import DEFAULT_SAMPLES
from llmq.engines import Result, Verdict, verdicts
from llmq.planning.machine import Machine
from llmq.planning.memory import Memory, MemoryModel, windows_of
from llmq.planning.outline import BlockOutline, Outline
from llmq.planning.seconds import TimeModel
from llmq.preflight import Job


@dataclass(frozen=True)
class Plan:
    """Everything that is known beforehand."""

    model: str
    blocks: int
    linears: int
    kinds: tuple[BlockOutline, ...]
    weights: int  # numbers that will be packed
    source_bytes: int
    output_bytes: int
    bits_per_weight: float  # packed layers, all their tensors counted
    windows: int
    tokens: int
    budget: Budget
    memory: Memory
    disk: dict[str, int]  # bytes, by what for
    seconds: dict[str, float]
    machine: str
    engines: tuple[Verdict, ...]

    @property
    def size_factor(self) -> float:
        """How many times smaller the output is."""
        return self.source_bytes / self.output_bytes


def make_plan(job: Job, machine: Machine, base: int, device: torch.device, limit: int | None = None) -> Plan:
    """Return the plan of a job.

    Args:
        job: the checked job.
        machine: how fast it is.
        base: bytes that a process has resident before work starts.
        device: what is computed on.
        limit: of host memory, bytes; None: no limit.

    Raises:
        SpecError: the job cannot stay under `limit`.
    """
    recipe = job.recipe
    windows = windows_of(job, recipe.num_samples or DEFAULT_SAMPLES) if job.solver.calibrated else 1
    model = MemoryModel(job, windows, recipe.seq_len, base, gpu=device.type == "cuda")
    budget = model.fit(limit)
    job = replace(job, budget=budget)
    outline = model.outline
    weights = sum(n * k for n, k in (linear.shape for linear in job.linears))
    return Plan(
        str(job.source.path),
        len(job.structure.blocks),
        len(job.linears),
        outline.blocks,
        weights,
        sum(job.source.info(key).nbytes for key in job.source),
        job.output_bytes,
        8 * job.packed_bytes / weights,
        windows,
        windows * recipe.seq_len if job.solver.calibrated else 0,
        budget,
        model.estimate(budget),
        _disk(job, outline, windows),
        TimeModel(job, outline, windows, recipe.seq_len, machine).phases(),
        machine.name,
        tuple(check_engines(job)),
    )


def check_engines(job: Job) -> list[Verdict]:
    """Return what engines will say to the result of a job."""
    packed = {linear.name: linear.shape for linear in job.linears}
    prefixes = job.structure.prefixes
    dense = {
        name
        for name, module in job.model.named_modules()
        if name.startswith(prefixes) and isinstance(module, torch.nn.Linear) and name not in packed
    }
    config = job.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", heads) // heads
    text = job.model.main_input_name == "input_ids"
    return verdicts(Result(job.spec, packed, frozenset(dense), text, width))


def _disk(job: Job, outline: Outline, windows: int) -> dict[str, int]:
    """Return what the disk of the output must hold at the fullest."""
    needed = {"output": job.output_bytes}
    if job.solver.calibrated:
        streams = 2 if job.needs_reference else 1
        states = windows * job.recipe.seq_len * outline.width * job.dtype.itemsize
        needed["hidden states of two blocks"] = 2 * streams * states
    block = max(block.linear_bytes // job.dtype.itemsize for block in outline.blocks)
    needed["journal"] = block * 9 // 8 * (len(job.structure.blocks) if job.recipe.tune_epochs else 1)
    return needed


def kind_name(job: Job, kind: BlockOutline) -> str:
    """Return which blocks are of a kind: model.layers.0 to 31."""
    first = job.structure.prefixes[kind.numbers[0]][:-1]
    if len(kind.numbers) == 1:
        return first
    last = re.split(r"\.", job.structure.prefixes[kind.numbers[-1]][:-1])[-1]
    whole = kind.numbers == tuple(range(kind.numbers[0], kind.numbers[-1] + 1))
    return f"{first} to {last}" if whole else f"{first}, … {last} ({len(kind.numbers)} blocks)"
