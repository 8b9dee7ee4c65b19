"""What closes an output folder: its configuration, and the files that go along with the weights."""

from __future__ import annotations

import re
from pathlib import Path

from llmq import environment
from llmq.checkpoint import CONFIG, FOREIGN_WEIGHTS, INDEX, CheckpointReader
from llmq.preflight import Job
from llmq.report import REPORT


def quantization_config(job: Job, stage_names: list[list[str]]) -> dict[str, object]:
    """Return config.json's quantization_config: what the format says, which modules are packed, how they were made."""
    recipe = job.recipe
    made = {"quantizer": [f"llmq:{environment.versions()['llmq']}"], "method": recipe.method}
    config = {**job.format.config(job.spec), "modules_in_block_to_quantize": stage_names}
    if job.structure.ignored:  # for GPTQModel and vLLM; "-:" excludes
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in job.structure.ignored}
    if "damp_percent" in job.solver.options:
        config["damp_percent"] = recipe.damp_percent
    return {**config, "true_sequential": job.solver.calibrated, "static_groups": True, "meta": made}


def side_files(source: CheckpointReader) -> tuple[list[Path], list[str]]:
    """Return the files to copy beside the weights, and the names of what is left out."""
    written_anew = {CONFIG, INDEX, *(source.info(key).file for key in source)}
    foreign = (*FOREIGN_WEIGHTS, ".safetensors", ".index.json")
    copies, left_out = [], []
    for path in sorted(source.path.iterdir()):
        if path.name in written_anew:
            continue
        if path.is_file() and not path.name.endswith(foreign) and path.name != REPORT:
            copies.append(path)
        else:
            left_out.append(path.name)
    return copies, left_out
