"""``llmq doctor``: what is wrong with anybody's packed folder, and a repaired copy where that needs no guess."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from llmq.cli.tables import show_json

if TYPE_CHECKING:
    from llmq.doctor import Finding


def doctor_command(
    packed: Annotated[str, typer.Argument(metavar="DIR", help="Packed checkpoint folder or hub id.")],
    output: Annotated[
        Path | None,
        typer.Option("--fix", metavar="OUT", help="Write a copy with the exact repairs done.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the folder of --fix.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look for damage in a packed checkpoint, say what to do, and end with 1 if there is an error."""
    from llmq.checkpoint import resolve
    from llmq.doctor import ERROR, diagnose
    from llmq.doctor.fixing import fix

    folder = resolve(packed)
    repaired = [] if output is None else fix(folder, output, force=force)
    found = diagnose(folder if output is None else output)
    if as_json:
        content = {"path": str(folder if output is None else output), "repaired": _plain(repaired)}
        show_json({**content, "findings": _plain(found)})
    else:
        console = Console(highlight=False, soft_wrap=True)
        for finding in repaired:
            console.print(f"repaired: {finding.name}: {finding.seen}", markup=False)
        for finding in found:
            console.print(finding.line(), markup=False)
        counts = Counter(finding.severity for finding in found)
        console.print(", ".join(f"{counts[kind]} {kind}s" for kind in ("error", "warning", "note")))
    if any(finding.severity == ERROR for finding in found):
        raise typer.Exit(1)


def _plain(findings: list[Finding]) -> list[dict[str, object]]:
    return [
        {**{k: v for k, v in asdict(finding).items() if k != "repair"}, "fixable": finding.repair is not None}
        for finding in findings
    ]
