"""Jobs and machines to plan with."""

from pathlib import Path
from typing import Any

from llmq.planning.machine import Machine
from llmq.preflight import Job, prepare
from llmq.recipe import make_recipe

# one flop, byte or call per second, but for products: whatever is missing or counted twice shows
SLOW = Machine("slow", {"float32": {4: 1.0}}, {"float32": {4: 1.0}}, {}, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def job_of(folder: Path, **fields: Any) -> Job:
    """Return the job of quantizing the model in `folder` with groups of 32 and these fields of a recipe."""
    return prepare(folder, make_recipe({"group_size": 32, **fields}))
