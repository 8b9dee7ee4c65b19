"""Runs of ``llmq quantize`` on a tiny model, and what they leave behind."""

import json
from pathlib import Path

from command_line import SMALL, llmq
from torch import Tensor

from llmq.checkpoint import CheckpointReader


def quantize(made: Path, output: Path, *options: object, source: Path | None = None) -> tuple[str, str]:
    """Quantize the model into `output`, expect success, and return stdout and stderr."""
    calibration = ("--calibration", made / "text.txt")
    result = llmq("quantize", source or made / "model", "--output", output, *SMALL, *calibration, *options)
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in `folder` but the report, which holds times."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "report.json"}


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader}
