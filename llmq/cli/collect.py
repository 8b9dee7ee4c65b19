"""``llmq collect``: a checkpoint in, what solvers need to know of it out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from llmq.cli.models import DEVICE_HELP, parse_device
from llmq.cli.options import takes_recipe
from llmq.cli.quantize import display
from llmq.cli.tables import facts, human_bytes
from llmq.recipe import COLLECTED_BY, Recipe


@partial(takes_recipe, only=COLLECTED_BY)
def collect_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.", show_default=False)],
    recipe: Recipe,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
) -> None:
    """Collect a model's statistics once; llmq quantize --statistics DIR then needs no calibration, whatever the bits.

    No layer sees there what the layers before it lose to rounding, which costs some accuracy (docs/big-models.md).
    """
    where = parse_device(device)
    from llmq.collecting import collect
    from llmq.heap import return_freed_memory

    return_freed_memory()
    console = Console(stderr=True, highlight=False)
    with display(console) as progress:
        manifest = collect(model, output, recipe, device=where, progress=progress)
    problems = sum(len(stage["problems"]) for block in manifest["blocks"] for stage in block)
    size = sum(file.stat().st_size for file in output.iterdir())
    rows = [
        ("blocks", len(manifest["blocks"])),
        ("problems", problems),
        ("size", human_bytes(size)),
        ("written to", output),
    ]
    Console(highlight=False).print(facts(rows))
