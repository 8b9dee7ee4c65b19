"""``llmq plan``: what quantizing a checkpoint will make, need and take, from config.json and headers alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer
from rich.table import Table

from llmq.cli.models import DEVICE_HELP, parse_bytes, parse_device
from llmq.cli.options import takes_recipe
from llmq.cli.tables import facts, human_bytes, show, show_json
from llmq.recipe import Recipe

if TYPE_CHECKING:
    from llmq.planning.plan import Plan
    from llmq.preflight import Job

MAX_MEMORY_HELP = "Host memory that the run must stay under, e.g. 8GiB."


@takes_recipe
def plan_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")],
    recipe: Recipe,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    machine: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Speeds to reckon with; measured and kept there if it does not exist."),
    ] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", help=MAX_MEMORY_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Say what quantizing would make, need and take, and which engines would run the result; reads no weights."""
    limit = parse_limit(max_memory)
    import torch

    known = machine is not None and machine.exists()  # speeds of another machine say what devices it has
    where = torch.device(device) if known and device.startswith("cuda") else parse_device(device)
    import llmq.driver  # noqa: F401  what a run has in memory before it starts
    from llmq.planning.machine import machine_of
    from llmq.planning.plan import make_plan
    from llmq.preflight import prepare

    job = prepare(model, recipe)
    if job.solver.calibrated:
        import tokenizers  # noqa: F401  as above
    base = psutil.Process().memory_info().rss
    speeds, source = machine_of(where, machine)
    plan = make_plan(job, speeds, base, where, limit)
    if as_json:
        show_json(to_dict(plan) | {"machine_source": source})
    else:
        show(facts(_summary(plan, source)), "", _blocks_table(plan, job), "", facts(_memory(plan)), "", *_engines(plan))


def parse_limit(size: str | None) -> int | None:
    """Return the bytes of ``--max-memory``; raise SpecError if it is no size."""
    return None if size is None else parse_bytes("--max-memory", size)


def to_dict(plan: Plan) -> dict[str, object]:
    """Return a plan as what JSON can hold."""
    content = {name: value for name, value in vars(plan).items() if name not in ("kinds", "memory", "engines")}
    return content | {
        "budget": asdict(plan.budget),
        "size_factor": plan.size_factor,
        "kinds": [
            {
                "blocks": list(kind.numbers),
                "weight_bytes": kind.weight_bytes,
                "stages": [
                    {"linears": list(s.names), "shapes": [list(shape) for shape in s.shapes], "copies": s.copies}
                    for s in kind.stages
                ],
            }
            for kind in plan.kinds
        ],
        "memory": {
            "host": plan.memory.host,
            "host_total": plan.memory.total,
            "device": plan.memory.device,
            "device_total": plan.memory.device_total,
        },
        "seconds_total": sum(plan.seconds.values()),
        "engines": [
            {
                "engine": verdict.engine,
                "accepted": verdict.accepted,
                "clashes": list(verdict.clashes),
                "tensor_parallel": dict(verdict.ranks),
                "note": verdict.note,
            }
            for verdict in plan.engines
        ],
    }


def duration(seconds: float) -> str:
    """Return a time as a person reads it: 42 s, 7 min, 3 h 20 min, 2 days 4 h."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def _summary(plan: Plan, source: str) -> list[tuple[str, object]]:
    phases = ", ".join(f"{name} {duration(value)}" for name, value in plan.seconds.items() if value >= 0.01)
    disk = ", ".join(f"{human_bytes(size)} {name}" for name, size in plan.disk.items())
    budget = plan.budget
    how = "hidden states in memory" if budget.cached else "hidden states in files"
    how += f", batches of {budget.batch_tokens} tokens"
    how += f", {budget.solver_rows} rows solved at a time" if budget.solver_rows else ""
    smaller = f"{plan.size_factor:.2f} times smaller"
    return [
        ("model", plan.model),
        ("to pack", f"{plan.linears} linears in {plan.blocks} blocks, {plan.weights / 1e9:.3g} billion weights"),
        ("size", f"{human_bytes(plan.source_bytes)} to {human_bytes(plan.output_bytes)} ({smaller})"),
        ("bits per weight", f"{plan.bits_per_weight:.3f}, all tensors counted"),
        ("calibration", f"{plan.windows} windows, {plan.tokens} tokens, with random ones and those held out"),
        ("disk", f"{human_bytes(sum(plan.disk.values()))}: {disk}"),
        ("memory", _totals(plan)),
        ("budget", how),
        ("time", f"{duration(sum(plan.seconds.values()))}: {phases}"),
        ("machine", f"{plan.machine}; {source}"),
    ]


def _totals(plan: Plan) -> str:
    text = f"{human_bytes(plan.memory.total)} at the peak"
    return f"{text}, {human_bytes(plan.memory.device_total)} on the device" if plan.memory.device else text


def _memory(plan: Plan) -> list[tuple[str, object]]:
    """Return the parts of the peak, the largest first."""
    places = (("memory", plan.memory.host), ("device", plan.memory.device))
    return [
        (f"{place}: {name}", human_bytes(size))
        for place, parts in places
        for name, size in sorted(parts.items(), key=lambda part: -part[1])
        if size
    ]


def _blocks_table(plan: Plan, job: Job) -> Table:
    from llmq.planning.plan import kind_name

    table = Table(title="what shares an input", title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("blocks", overflow="fold")
    table.add_column("linears", overflow="fold")
    table.add_column("outputs x inputs", justify="right")
    for kind in plan.kinds:
        name = kind_name(job, kind)
        for stage in kind.stages:
            shapes = " + ".join(str(n) for n, _ in stage.shapes)
            of = f", {stage.copies} experts" if stage.copies > 1 else ""
            table.add_row(name, ", ".join(stage.names) + of, f"{shapes} x {stage.inputs}")
            name = ""
    return table


def _engines(plan: Plan) -> list[str]:
    own = "the layout is what is judged; whether an engine has this architecture is its own matter"
    return [*(verdict.line() for verdict in plan.engines), own]
