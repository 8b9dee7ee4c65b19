"""``llmq bench``: tokens per second of a packed model next to a dense one."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmq.cli.models import DEVICE_HELP, DTYPE_HELP, parse_device, parse_dtype
from llmq.cli.tables import facts, human_bytes, show, show_json
from llmq.errors import SpecError

if TYPE_CHECKING:
    from llmq.benchmark import Benchmark


def bench_command(  # noqa: PLR0913  one parameter per option
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Packed checkpoint folder.")],
    against: Annotated[
        str | None,
        typer.Option(help="Dense checkpoint to compare with. Default: the folder's own weights.", show_default=False),
    ] = None,
    batch: Annotated[list[int], typer.Option(min=1, help="Sequences decoded at once; may be given again.")] = [  # noqa: B006
        1,
        4,
        16,
        64,
    ],
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prefill, and in front of decoded ones.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each measurement.")] = 15,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of a CPU. Default: as PyTorch has them.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure decoding and prefill of a packed model and a dense one in turns; shown are medians of wall-clock time."""
    import torch
    from transformers.utils import logging

    from llmq.benchmark import Plan, benchmark

    where = parse_device(device)
    precision = parse_dtype(dtype, where)
    assert precision is not None, "it was named"
    if threads is not None:
        if where.type != "cpu":
            raise SpecError(f"--threads {threads} is about a CPU; leave it out with --device {device}")
        torch.set_num_threads(threads)
    logging.disable_progress_bar()
    found = benchmark(directory, Plan(batch, prompt, repeats), dtype=precision, device=where, against=against)
    if as_json:
        show_json(asdict(found))
    else:
        show(facts(_facts(found)), "", _table(found))


def _facts(found: Benchmark) -> list[tuple[str, object]]:
    peak = ", ".join(f"{human_bytes(count)} on the {name}" for name, count in found.peak_memory.items())
    return [
        ("packed", f"{found.path}, {human_bytes(found.packed_bytes)} of weights in memory"),
        ("dense", f"{found.dense}, {human_bytes(found.dense_bytes)}"),
        ("computed in", f"{found.dtype} on {found.machine['device_name']}, {found.machine['threads']} threads"),
        *(("timed", how) for how in _ways(found)),
        ("memory", f"a large copy moves {human_bytes(int(found.bandwidth))}/s; peak of both models: {peak}"),
    ]


def _ways(found: Benchmark) -> list[str]:
    """Return how the models were run, each way once, with what was run so."""
    kinds: dict[str, list[str]] = {}
    for speed in found.speeds:
        kinds.setdefault(speed.how, []).append(f"{speed.kind} {speed.batch}")
    return [f"{', '.join(names)}: {how}" for how, names in kinds.items()]


def _table(found: Benchmark) -> Table:
    table = Table(
        "", "batch", "tokens", "packed tok/s", "dense tok/s", "ratio", "of bandwidth", box=None, pad_edge=False
    )
    for speed in found.speeds:
        share = "" if speed.bandwidth_share is None else f"{speed.bandwidth_share:.0%}"
        own, other = (f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" for rate in (speed.packed, speed.dense))
        table.add_row(speed.kind, str(speed.batch), str(speed.length), own, other, f"{speed.ratio:.2f}", share)
    return table
