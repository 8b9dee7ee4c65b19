"""How results look on a terminal: sizes, numbers with their intervals, aligned facts, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import typer
from rich.console import Console, RenderableType
from rich.table import Table


def human_bytes(count: int) -> str:
    """Return `count` bytes as a person reads them, in powers of 1000 as disks are sold: 2.10 MB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:  # 999.6 would be printed as 1000
            return f"{count} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def with_interval(value: float, interval: tuple[float, float] | None, digits: int) -> str:
    """Return `value` and its 95 % interval with that many digits after the point: 0.0123 (0.0110 to 0.0136)."""
    shown = f"{value:.{digits}f}"
    return f"{shown} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else shown


def facts(rows: Iterable[tuple[str, object]]) -> Table:
    """Return names and values in two columns without lines; long values continue below themselves."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, str(value))
    return table


def show(*parts: RenderableType) -> None:
    """Write `parts` to stdout."""
    console = Console(highlight=False)
    for part in parts:
        console.print(part)


def show_json(content: Mapping[str, object]) -> None:
    """Write `content` to stdout as JSON."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
