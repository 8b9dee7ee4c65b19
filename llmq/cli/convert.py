"""``llmq convert``: a packed folder in another format, with the same codes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmq.cli.models import parse_bytes
from llmq.cli.tables import facts, human_bytes, show, show_json
from llmq.errors import SpecError

if TYPE_CHECKING:
    from llmq.convert import Conversion


def convert_command(  # noqa: PLR0913  one parameter per option
    packed: Annotated[str, typer.Argument(metavar="DIR", help="Packed checkpoint folder or hub id.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; a file for gguf.", show_default=False)],
    format: Annotated[
        str | None,
        typer.Option(
            help="gptq, gptq_v2, awq, compressed-tensors(-padded), auto-round, llmq, gguf or onnx.", show_default=False
        ),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write ordinary weights, for software that reads nothing else.")
    ] = False,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Round scales that the format does not hold as they are.")
    ] = False,
    shard_size: Annotated[str, typer.Option(help="Largest size of one output file, e.g. 500MB, 4GB.")] = "4GB",
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the output folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a packed checkpoint again in another format, codes unchanged and compared, or refuse to."""
    from llmq.convert import DENSE, convert

    if (format is None) == (not dequantize):
        raise SpecError("give either --format or --dequantize")
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task("starting", total=None)
        done = convert(
            packed,
            output,
            DENSE if format is None else format,
            allow_lossy=allow_lossy,
            shard_bytes=parse_bytes("--shard-size", shard_size),
            force=force,
            progress=lambda what, number, total: display.update(task, description=what, completed=number, total=total),
        )
    if done.rounded:
        worst = max(done.rounded, key=lambda module: done.rounded[module])
        console.print(
            f"warning: scales of {len(done.rounded)} layers were rounded, by up to {done.rounded[worst]:.1e} ({worst})"
        )
    if as_json:
        show_json({**asdict(done), "output": str(output)})
    else:
        show(facts(_summary(done, output)))


def _summary(done: Conversion, output: Path) -> list[tuple[str, object]]:
    size = f"{human_bytes(done.source_bytes)} to {human_bytes(done.output_bytes)}"
    kept = "weights, rounded to the model's dtype" if done.format == "dense" else "codes, read back and compared"
    return [
        ("format", done.format),
        ("packed layers", f"{done.layers}, {kept}"),
        ("size", size),
        ("written to", output),
    ]
