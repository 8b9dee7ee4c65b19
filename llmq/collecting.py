"""Statistics once, outputs many: the Hessians of a model's layers, collected into a folder.

The walk is that of `llmq.driver` without its solving: calibration windows pass block after block of the original model,
and what a solver would need is written down. It stops and goes on in the same way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmq.calibration import Calibration
from llmq.checkpoint import STAGING
from llmq.disk import disk_errors, sync_path, write_file
from llmq.driver import identify
from llmq.errors import CheckpointError
from llmq.experts import problems_of
from llmq.journal import Journal
from llmq.lock import LOCK, FolderLock
from llmq.preflight import prepare
from llmq.problems import Observed
from llmq.recipe import COLLECTED_BY, Recipe
from llmq.report import Progress
from llmq.run import Run
from llmq.statistics import MANIFEST, VERSION, keep_problem


def collect(
    model: str | Path,
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    calibration: Calibration | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Collect the statistics of checkpoint `model` in the folder `output`, and return what statistics.json says.

    Args:
        model: a checkpoint folder or a hub id.
        output: the folder to make.
        recipe: what to calibrate on; of its fields those of `COLLECTED_BY` count.
        calibration: token windows to use instead of the recipe's `calibration` source.
        device: torch device that one block at a time runs on.
        progress: called at every step.

    Raises:
        LlmqError: see `llmq.errors`.
    """
    given = (recipe or Recipe()).model_dump(include=set(COLLECTED_BY))
    # every layer can be collected, whatever group size and format it will get
    job = prepare(model, Recipe(**given, group_size=-1, shift=0.0))
    output, staging = Path(output), Path(output) / STAGING
    if output.exists() and (not output.is_dir() or any(entry.name != STAGING for entry in output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not empty; choose another --output")
    with disk_errors(output):
        lock = FolderLock(staging)
    try:
        run = Run(job, torch.device(device), Journal(staging), progress, staging / "states")
        identify(run, calibration, None)
        run.resume()
        run.start_streams()
        for index in range(run.block, len(job.structure.blocks)):
            _collect_block(run, index, staging)
        run.drop_states()
        manifest = _manifest(run)
        _place(manifest, staging, output)
        lock.remove_folder()
    finally:
        lock.release()
    return manifest


def _collect_block(run: Run, index: int, staging: Path) -> None:
    """Write down the statistics of one block's stages, and move the hidden states past it."""
    assert run.stream is not None, "what is collected comes from a stream"
    run.block = index
    with run.timed("load"):
        block = run.loader.block(index)
    with run.timed("forward"):
        stages = run.stream.stages(block, index, run.job.structure.linears[index])
        seen = Observed(run.stream, block, index)
    for number, stage in enumerate(stages):
        if run.journal.find("statistics", block=index, stage=number):
            continue
        with run.timed("collect"):
            problems = problems_of(run.job, seen, stage, None, run.token_weights)
            entries = [
                keep_problem(problem, staging / f"{index:04d}-{number:02d}-{part:04d}.safetensors")
                for part, problem in enumerate(problems)
            ]
        run.done += len(stage.linears)
        names = [linear.name for linear in stage.linears]
        run.journal.append("statistics", block=index, stage=number, linears=names, problems=entries)
    with run.timed("forward"):
        run.stream.advance(block, index)
    run.keep_block(index)
    run.loader.release(index)


def _manifest(run: Run) -> dict[str, Any]:
    """Return what is known of the statistics."""
    blocks: list[list[dict[str, Any]]] = [[] for _ in run.job.structure.blocks]
    for record in run.journal.all("statistics"):
        blocks[record["block"]].append({"linears": record["linears"], "problems": record["problems"]})
    return {
        "version": VERSION,
        "source": str(run.job.source.path),
        "weights": run.journal.records[0]["identity"]["weights"],
        "versions": run.report.versions,
        "recipe": run.job.recipe.model_dump(mode="json", include=set(COLLECTED_BY)),
        "calibration": run.report.calibration,
        "blocks": blocks,
    }


def _place(manifest: dict[str, Any], staging: Path, output: Path) -> None:
    """Move the files to where they belong, the manifest last: without it a folder holds no statistics."""
    with disk_errors(output):
        for block in manifest["blocks"]:
            for entry in (entry for stage in block for entry in stage["problems"]):
                if (staging / entry["file"]).exists():  # not moved before by a run that was stopped
                    os.replace(staging / entry["file"], output / entry["file"])
        sync_path(output)
        write_file(staging / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        os.replace(staging / MANIFEST, output / MANIFEST)
        sync_path(output)
        for file in staging.iterdir():
            if file.is_file() and file.name != LOCK:
                file.unlink()
