"""``llmq quantize``: a checkpoint in, a packed checkpoint out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Display

from llmq.cli.models import DEVICE_HELP, parse_device
from llmq.cli.options import takes_recipe
from llmq.cli.plan import MAX_MEMORY_HELP, parse_limit
from llmq.cli.tables import facts, human_bytes, show_json
from llmq.joining import world_here
from llmq.recipe import Recipe
from llmq.report import CONTINUING, FALLBACKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmq.report import LayerReport, Progress, Report


@takes_recipe
def quantize_command(  # noqa: PLR0913  one parameter per option
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.", show_default=False)],
    recipe: Recipe,
    statistics: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Use what llmq collect has collected; no calibration.", show_default=False),
    ] = None,
    offload_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for hidden states; default: in the output's.", show_default=False),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help=MAX_MEMORY_HELP, show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is in the output folder, finished or not.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantize a checkpoint into a packed one that llmq and other software load.

    A run that was stopped goes on where it was when the same command is repeated.
    """
    where, limit = parse_device(device), parse_limit(max_memory)
    from llmq.driver import quantize
    from llmq.heap import return_freed_memory
    from llmq.planning.plan import check_engines
    from llmq.preflight import Job

    if not (recipe.tune_steps or recipe.tune_epochs or recipe.guidance_groups):  # gradients take and free all the time
        return_freed_memory()
    first = world_here()[0] == 0  # of the processes that torchrun has started, one speaks
    console = Console(stderr=True, highlight=False, quiet=not first)
    console.print(facts([("model", model), ("output", output), *recipe.model_dump().items()]))

    def say_engines(job: Job) -> None:
        for verdict in check_engines(job):
            console.print(verdict.line())

    if recipe.calibration is None and statistics is None and recipe.method != "rtn":
        console.print(
            "calibrating on the small general text that ships with llmq; text like what the model will read is "
            "better: --calibration FILE"
        )
    with display(console) as progress:
        report = quantize(
            model,
            output,
            recipe,
            statistics=statistics,
            offload_dir=offload_dir,
            max_memory=limit,
            device=where,
            force=force,
            checked=say_engines,
            progress=progress,
        )
    if not first:
        return
    _warn(report, console)
    if as_json:
        show_json(report.to_dict())
    else:
        Console(highlight=False).print(facts(_summary(report, output)))


@contextmanager
def display(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Yield a callback that shows progress: a bar with time left and memory, and a line for each finished layer."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
    )
    process = psutil.Process()
    with Display(*columns, console=console, transient=True) as display:
        task = display.add_task("starting", total=None, memory="")

        def show(event: Progress) -> None:
            memory = f"{process.memory_info().rss / 2**30:.2f} GiB resident"
            text = f"block {event.block + 1} of {event.blocks}, {event.phase}"
            display.update(task, description=text, completed=event.done, total=event.total, memory=memory)
            if event.phase == CONTINUING:
                where = f"block {event.block + 1} of {event.blocks}, {event.done} of {event.total} layers done"
                console.print(f"continuing an unfinished run at {where}")
            if event.layer is not None:
                layer = event.layer
                console.print(_line(layer), soft_wrap=True)

        yield show


def _line(layer: LayerReport) -> str:
    """Return what is said of a finished layer."""
    text = f"{layer.name}  weight error {layer.weight_error:.4f}"
    if layer.relative_loss is not None:
        text += f"  relative loss {layer.relative_loss:.2e}"
    if layer.held_out_loss is not None:
        text += f", held out {layer.held_out_loss:.2e}"
    notes = [*layer.remedies, *(f"{stage} undone" for stage in layer.undone)]
    return f"{text}  ({'; '.join(notes)})" if notes else text


def _warn(report: Report, console: Console) -> None:
    """Name what deserves a second look."""
    if report.calibration is not None:
        tokens, widest = report.calibration["tokens"], max(layer.in_features for layer in report.layers)
        if isinstance(tokens, int) and tokens < 4 * widest:
            console.print(
                f"warning: {tokens} calibration tokens for layers of {widest} inputs; use at least {4 * widest} "
                "(--num-samples, --seq-len)"
            )
    lost = [f"{layer.name} ({layer.remedies[-1]})" for layer in report.layers if FALLBACKS & set(layer.remedies)]
    if lost:
        console.print(f"warning: {len(lost)} layers had no usable Hessian: {', '.join(lost)}")
    short = sum(len({*bank.rounded, *bank.shrunk}) for bank in report.experts)
    if short:
        experts = sum(len(bank.tokens) for bank in report.experts)
        console.print(
            f"warning: {short} of {experts} experts got fewer tokens than they need (report.json: experts); give more "
            "or more varied text (--num-samples), or try --all-experts"
        )
    if report.files["left_out"]:
        console.print(f"not copied: {', '.join(report.files['left_out'])}")


def _coverage(report: Report) -> str:
    """Return how well the calibration text covers the experts."""
    tokens = [count for bank in report.experts for count in bank.tokens]
    rounded, shrunk = (sum(len(getattr(bank, kind)) for bank in report.experts) for kind in ("rounded", "shrunk"))
    return (
        f"{len(tokens)} in {len(report.experts)} banks, {min(tokens)} to {max(tokens)} tokens each; {shrunk} lean on "
        f"what other experts see, {rounded} rounded to nearest"
    )


def _summary(report: Report, output: Path) -> list[tuple[str, object]]:
    """Return what a person wants to know at the end."""
    before, after = report.bytes["source_tensors"], report.bytes["output_tensors"]
    weights = sum(layer.out_features * layer.in_features for layer in report.layers)
    bits = 8 * report.bytes["packed"] / weights
    losses = [layer.relative_loss for layer in report.layers if layer.relative_loss is not None]
    rows: list[tuple[str, object]] = [
        ("packed layers", f"{len(report.layers)}, {bits:.2f} bits per weight"),
        ("size", f"{human_bytes(before)} to {human_bytes(after)} ({before / after:.2f} times smaller)"),
    ]
    if losses:
        rows.append(("relative loss", f"{sum(losses) / len(losses):.2e} on average, {max(losses):.2e} at most"))
    if report.experts:
        rows.append(("experts", _coverage(report)))
    rows += [
        ("time", f"{sum(report.seconds.values()):.1f} s"),
        ("peak memory", ", ".join(f"{human_bytes(v)} {k}" for k, v in report.peak_memory_bytes.items())),
        ("written to", output),
    ]
    return rows
