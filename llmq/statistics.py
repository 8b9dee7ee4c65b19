"""What calibration leaves behind for solvers, in files: Hessians collected once, for any number of outputs.

A folder holds a file of sums for every problem (linears that share an input, an expert, a group of outputs) and
statistics.json, which says what they are of. They are taken from the original model: no layer sees what the layers
before it have lost to rounding, since that depends on bits and grid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from llmq.disk import disk_errors, write_file
from llmq.errors import CheckpointError, SpecError
from llmq.families import Linear
from llmq.hessian import HessianSum
from llmq.preflight import Job
from llmq.problems import Problem
from llmq.stream import Stage

MANIFEST = "statistics.json"
VERSION = 1


def keep_problem(problem: Problem, file: Path) -> dict[str, Any]:
    """Write the sums of a measured problem to `file`, and return its entry in the manifest.

    Raises:
        CheckpointError: the disk does not take it.
    """
    entry: dict[str, Any] = {
        "file": file.name,
        "rows": [[linear.name, rows.start, rows.stop] for linear, rows in problem.rows],
        "routed": problem.routed,
        "remedies": list(problem.remedies),
    }
    tensors = {}
    for name, total in (("train", problem.train), ("held_out", problem.held_out)):
        if total is not None:
            tensors[name], entry[name] = total.state()
    content = save({name: tensor.cpu() for name, tensor in tensors.items()})
    entry["sha256"] = hashlib.sha256(content).hexdigest()
    with disk_errors(file.parent):
        write_file(file, content)
    return entry


def check_collected(job: Job, statistics: Statistics) -> None:
    """Check that a job can do with statistics alone.

    Raises:
        SpecError: it has stages that run the model, or another number of blocks.
    """
    for stage in ("rotation", "scaling", "tune_steps", "tune_epochs", "guidance_groups"):
        if getattr(job.recipe, stage) not in (0, "none"):
            raise SpecError(
                f"{stage} runs the model, which statistics do without; quantize with --calibration, or without {stage}"
            )
    if not job.solver.calibrated:
        raise SpecError(f"method {job.recipe.method} uses no data; leave out --statistics")
    if len(statistics.manifest["blocks"]) != len(job.structure.blocks):
        raise SpecError(f"{statistics.folder}: was collected from another model ({statistics.manifest['source']})")


class Statistics:
    """A folder of statistics, opened.

    Raises:
        CheckpointError: it is none, is not finished, or comes from another version of llmq.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        try:
            content = path.read_bytes()
            self.manifest: dict[str, Any] = json.loads(content)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder}: holds no finished statistics ({error}); make them with llmq collect"
            ) from error
        if self.manifest.get("version") != VERSION:
            found = self.manifest.get("version")
            raise CheckpointError(f"{path}: has version {found}, this llmq reads {VERSION}; collect them again")
        self.fingerprint = hashlib.sha256(content).hexdigest()
        for entry in (entry for block in self.manifest["blocks"] for stage in block for entry in stage["problems"]):
            if not (self.folder / entry["file"]).is_file():
                raise CheckpointError(f"{self.folder}: {entry['file']} is missing; collect them again")

    def check_weights(self, sha256: str) -> None:
        """Check that the statistics are of the model with these weights.

        Raises:
            SpecError: they are of another one.
        """
        if self.manifest["weights"] != sha256:
            raise SpecError(
                f"{self.folder}: was collected from another model ({self.manifest['source']}); its weights are not "
                "the same"
            )

    def stages(self, block: int, linears: list[Linear]) -> list[Stage]:
        """Return the stages of a block, in order.

        Raises:
            SpecError: a linear has no statistics.
        """
        by_name = {linear.name: linear for linear in linears}
        stages = [
            Stage([by_name[name] for name in stage["linears"] if name in by_name], calls=0)
            for stage in self.manifest["blocks"][block]
        ]
        found = {linear.name for stage in stages for linear in stage.linears}
        for name in by_name:
            if name not in found:
                raise SpecError(f"{self.folder}: has no statistics of {name}; leave it out with --ignore")
        return [stage for stage in stages if stage.linears]

    def problems(self, block: int, stage: Stage, device: torch.device) -> Iterator[Problem]:
        """Yield the problems of a stage, each read when it is asked for.

        Raises:
            CheckpointError: a file is damaged.
        """
        by_name = {linear.name: linear for linear in stage.linears}
        entries = next(s for s in self.manifest["blocks"][block] if stage.linears[0].name in s["linears"])["problems"]
        for entry in entries:
            rows = [(by_name[name], slice(start, stop)) for name, start, stop in entry["rows"] if name in by_name]
            if rows:
                sums = self._sums(entry, device)
                train, held_out = sums.get("train"), sums.get("held_out")
                remedies = tuple(entry["remedies"])
                yield Problem(rows, train, held_out, False, entry["routed"], remedies)

    def _sums(self, entry: dict[str, Any], device: torch.device) -> dict[str, HessianSum]:
        """Return the sums of an entry of the manifest, by kind."""
        path = self.folder / entry["file"]
        try:
            content = path.read_bytes()
            tensors = load(content)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); collect them again") from error
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{path}: is not what was collected; collect them again")
        return {kind: HessianSum.of_state(tensor.to(device), entry[kind]) for kind, tensor in tensors.items()}
