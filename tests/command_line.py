"""The command line as tests call it, and what every failure must look like."""

import os
import subprocess
import sys
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from llmq.cli.app import app

SMALL = ("--group-size", 32, "--num-samples", 8, "--seq-len", 64)  # a run of a tenth of a second on tiny models


def llmq(*arguments: object) -> Result:
    """Run the command line in this process; what it raises passes, unless it is an exit."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python `script` in a process of its own, with `arguments`, and pipes for its output."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_fails(code: int, stdout: str, stderr: str, *words: str, expected: int = 1) -> None:
    """Check the exit code, and that stderr ends in one line of error that holds all `words`."""
    errors = [line for line in stderr.splitlines() if line.lower().startswith("error")]
    assert code == expected, stderr
    assert "Traceback" not in stderr
    assert len(errors) == 1, stderr
    assert stderr.rstrip().splitlines()[-1] == errors[0]
    for word in words:
        assert word in errors[0]
    assert stdout == ""


def assert_nothing_finished(folder: Path) -> None:
    """Check that no folder at or below `folder` looks like a checkpoint."""
    assert not list(folder.rglob("config.json"))
