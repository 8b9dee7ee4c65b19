"""``llmq compare``: every grid on the same model, at every size, under the same solver and the same measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from llmq.cli.models import DEVICE_HELP, load_model, load_tokenizer, parse_device, parse_dtype
from llmq.cli.options import listed, takes_recipe
from llmq.cli.tables import facts, show_json
from llmq.cli.trials import Bench, Outcome, cell, kl_cell, outputs, result_table, run_all, setup, show_wide
from llmq.errors import SpecError
from llmq.grids import ALL_GRIDS
from llmq.recipe import COLLECTED_BY, Recipe
from llmq.solvers import SOLVERS

if TYPE_CHECKING:
    import torch

# what all combinations share; stages that would run the model for each of them have no place here
_SHARED = (*COLLECTED_BY, "order", "damp_percent", "scale_search", "search_norm", "refine_rounds", "magr", "sym_range")


@dataclass(frozen=True)
class Combination:
    """One row: what is said of it, and the recipe's fields that this takes."""

    grid: str
    bits: int
    group_size: int  # -1: one group per output
    solver: str
    fields: dict[str, object]

    @property
    def name(self) -> str:
        """What it is called while it runs."""
        return f"{self.grid} {self.bits} bits, {_groups(self.group_size)}, {self.solver}"

    @property
    def folder(self) -> str:
        """What its folder is called."""
        return f"{self.grid}-{self.bits}-g{self.group_size}-{self.solver}".replace("g-1", "row")


@dataclass(frozen=True)
class Row:
    """A combination, what came of it, and whether no other is both smaller and nearer to the original."""

    combination: Combination
    outcome: Outcome
    on_front: bool


@partial(takes_recipe, only=_SHARED)
def compare_command(  # noqa: PLR0913  one parameter per option
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text file to predict.", show_default=False, metavar="FILE")],
    recipe: Recipe,
    grids: Annotated[
        str, typer.Option(metavar="A,B,…", help=f"Grids to compare: {', '.join(ALL_GRIDS)}.", show_default=False)
    ],
    bits: Annotated[str, typer.Option(metavar="B,C,…", help="Bits of a code; each grid takes those it has.")] = "4",
    solvers: Annotated[str, typer.Option(metavar="A,B,…", help=f"Solvers: {', '.join(SOLVERS)}.")] = "gptq",
    group_sizes: Annotated[
        str | None,
        typer.Option(metavar="G,H,…", help="Columns that share a scale; -1: one per output. Default: each grid's own."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text at most.")] = 60,
    eval_seq_len: Annotated[int, typer.Option(min=1, help="Tokens predicted per window.")] = 512,
    spread: Annotated[
        bool, typer.Option("--spread/--end-to-end", help="Windows over the whole text, or end to end from its start.")
    ] = True,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep each checkpoint in a folder of DIR.", show_default=False)
    ] = None,
    plot: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Draw quality against size: .png, .svg or .pdf (repeatable).", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Quantize a model by every combination of grid, bits and solver, from one collection of statistics, and compare.

    Bits per weight count everything that packed layers store: codes, scales, zeros, tables, codebooks. Loss is
    relative, the mean over layers; KL is the mean over tokens of KL(original || packed) in nats with its 95 % interval;
    seconds are those of quantizing. A star marks what no other row beats in both size and KL.
    """
    from llmq.checkpoint import resolve
    from llmq_eval.windows import read_windows

    sizes = None if group_sizes is None else _numbers(group_sizes, "--group-sizes")
    wanted = combinations(
        recipe, _names(grids, "--grids"), _numbers(bits, "--bits"), _names(solvers, "--solvers"), sizes
    )
    where = parse_device(device)
    dtype = parse_dtype(None, where)
    if plot:
        from llmq.cli.plots import check_plots

        check_plots(plot)
    source = resolve(model)
    with outputs(keep, "llmq-compare-") as folder:
        protocol = read_windows(text, load_tokenizer(source), seq_len=eval_seq_len, windows=windows, spread=spread)
        bench = Bench(source, [protocol], load_model(source, dtype, where), dtype, where)
        rows = _run(bench, recipe, wanted, folder, keep is not None)
    if plot:
        from llmq.cli.plots import plot_rows

        plot_rows(rows, source.name, plot)
    if as_json:
        show_json(_content(bench, recipe, rows))
    else:
        results = next((row.outcome.results for row in rows if row.outcome.results), ())
        described = setup(bench.texts, results) if results else []
        show_wide(facts([("model", model), *described]), "", _table(rows))


def combinations(
    recipe: Recipe, grids: Sequence[str], bits: Sequence[int], solvers: Sequence[str], group_sizes: Sequence[int] | None
) -> list[Combination]:
    """Return every combination that there is; fields that `recipe` was given go into all of them.

    Raises:
        SpecError: there is no such grid or solver, or a grid has none of the bits or group sizes.
    """
    for names, table, what in ((grids, ALL_GRIDS, "grid"), (solvers, SOLVERS, "solver")):
        if unknown := [name for name in names if name not in table]:
            raise SpecError(f"unknown {what} {unknown[0]!r}; there are {', '.join(table)}")
    said = recipe.model_dump(include=recipe.model_fields_set)
    found = []
    for grid in grids:
        row = ALL_GRIDS[grid]
        own_bits = [b for b in bits if b in row.bits]
        sizes = group_sizes or [row.group_size or row.default_group_size]
        own_sizes = [size for size in sizes if row.group_size in (None, size)]
        for own, what, there in ((own_bits, "bits", row.bits), (own_sizes, "group sizes", [row.group_size])):
            if not own:
                raise SpecError(f"the {grid} grid has none of these {what}; it has {', '.join(map(str, there))}")
        for b, size, solver in product(own_bits, own_sizes, solvers):
            fields = {"grid": grid, "bits": b, "group_size": size, "method": solver, "format": "llmq", "shift": 0.0}
            found.append(Combination(grid, b, size, solver, {**said, **fields}))
    return found


def front(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Return for each (size, loss) whether no other is as good in both and better in one; None is not."""
    known = [point for point in points if point is not None]

    def beaten(point: tuple[float, float]) -> bool:
        return any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in known)

    return [point is not None and not beaten(point) for point in points]


def _run(bench: Bench, recipe: Recipe, wanted: Sequence[Combination], folder: Path, keep: bool) -> list[Row]:
    statistics: dict[str, Any] = {}
    if any(SOLVERS[row.solver].calibrated for row in wanted):
        statistics = {"statistics": _collect(bench.source, recipe, folder / "statistics", bench.device)}
    trials = [(row.name, folder / row.folder) for row in wanted]

    def measure(number: int) -> Outcome:
        row = wanted[number]
        data = statistics if SOLVERS[row.solver].calibrated else {}
        return bench.measure(row.fields, trials[number][1], **data)

    outcomes = run_all(trials, measure, keep=keep, first_must=False)
    points = [
        None if outcome.bits_per_weight is None else (outcome.bits_per_weight, outcome.results[0].kl)
        for outcome in outcomes
    ]
    return [Row(*row) for row in zip(wanted, outcomes, front(points), strict=True)]


def _collect(source: Path, recipe: Recipe, folder: Path, device: torch.device) -> Path:
    """Collect the statistics of the model, once for all."""
    from llmq.cli.quantize import display
    from llmq.collecting import collect

    with display(Console(stderr=True, highlight=False)) as progress:
        collect(source, folder, recipe, device=device, progress=progress)
    return folder


def _names(given: str, option: str) -> list[str]:
    names = listed(given)
    if not names or len(set(names)) != len(names):
        raise SpecError(f"{option} {given!r}: name at least one, and each once")
    return names


def _numbers(given: str, option: str) -> list[int]:
    try:
        return [int(name) for name in _names(given, option)]
    except ValueError as error:
        raise SpecError(f"{option} {given!r}: give whole numbers, such as 3,4") from error


def _groups(size: int) -> str:
    return "one group per output" if size == -1 else f"groups of {size}"


def _content(bench: Bench, recipe: Recipe, rows: Sequence[Row]) -> dict[str, object]:
    """Return everything for JSON."""
    from llmq.environment import versions

    return {
        "model": str(bench.source),
        "recipe": recipe.model_dump(mode="json", include=set(_SHARED)),
        "protocol": bench.texts[0].protocol(),
        "device": str(bench.device),
        "versions": versions(),
        "original": next((row.outcome.results[0].original.to_dict() for row in rows if row.outcome.results), None),
        "combinations": [_row_content(row) for row in rows],
    }


def _row_content(row: Row) -> dict[str, object]:
    made, found = row.combination, row.outcome
    content: dict[str, object] = {
        "grid": made.grid,
        "bits": made.bits,
        "group_size": made.group_size,
        "solver": made.solver,
        "error": found.error,
        "bits_per_weight": found.bits_per_weight,
        "relative_loss": found.loss,
        "held_out_loss": found.held_out_loss,
        "seconds": found.seconds,
        "on_front": row.on_front,
    }
    if found.results:
        result = found.results[0]
        content |= {"kl": result.kl, "kl_interval": result.kl_interval, "agreement": result.agreement}
        content |= {"ppl_ratio": result.ppl_ratio, "ppl_ratio_interval": result.ppl_ratio_interval}
        content |= result.packed.to_dict()
    return content


def _table(rows: Sequence[Row]) -> Table:
    failed = any(row.outcome.error for row in rows)
    numbers = ("bits", "group", "bits/weight", "loss", "held out", "KL", "perplexity", "ratio", "seconds")
    table = result_table(["", "grid", "solver"], numbers, failed=failed)
    for row in rows:
        made, found = row.combination, row.outcome
        cells = ["-", "-", "-"]
        if found.results:
            result = found.results[0]
            cells = [kl_cell(result), f"{result.packed.ppl:.4f}", f"{result.ppl_ratio:.4f}"]
        table.add_row(
            "*" if row.on_front else "",
            made.grid,
            made.solver,
            str(made.bits),
            "row" if made.group_size == -1 else str(made.group_size),
            cell(found.bits_per_weight, ".3f"),
            cell(found.loss, ".2e"),
            cell(found.held_out_loss, ".2e"),
            *cells,
            cell(found.seconds, ".1f"),
            *[found.error or ""][: int(failed)],
        )
    return table
