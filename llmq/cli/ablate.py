"""``llmq ablate``: what each stage of a recipe brings on a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmq.cli.models import DEVICE_HELP, load_model, load_tokenizer, parse_device, parse_dtype
from llmq.cli.options import listed, takes_recipe
from llmq.cli.tables import facts, show_json
from llmq.cli.trials import Bench, Outcome, cell, kl_cell, outputs, result_table, run_all, setup, show_wide
from llmq.recipe import Recipe
from llmq.stages import STAGES, Variant, variants

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmq.calibration import Calibration


@dataclass(frozen=True)
class _Row:
    """A variant of the recipe, and what came of it."""

    variant: Variant
    outcome: Outcome


@takes_recipe
def ablate_command(  # noqa: PLR0913  one parameter per option
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")],
    text: Annotated[
        list[Path], typer.Option(help="UTF-8 text file to predict (repeatable).", show_default=False, metavar="FILE")
    ],
    recipe: Recipe,
    stages: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help=f"Stages to switch: {', '.join(STAGES)}. Default: all.", show_default=False),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text at most.")] = 60,
    eval_seq_len: Annotated[int, typer.Option(min=1, help="Tokens predicted per window.")] = 512,
    spread: Annotated[
        bool, typer.Option("--spread/--end-to-end", help="Windows over the whole text, or end to end from its start.")
    ] = True,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep each variant's checkpoint in a folder of DIR.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Quantize by a recipe, then without each stage that it has and with each that it lacks, and compare.

    All variants get the same calibration windows. Losses are relative, means over layers, as solved, before any tuning;
    KL is the mean over tokens of KL(original || packed) in nats with its 95 % interval, then its ratio to the recipe's;
    seconds are those of quantizing.
    """
    from llmq.checkpoint import resolve
    from llmq_eval.windows import read_windows

    names = list(STAGES) if stages is None else listed(stages)
    wanted = variants(recipe.model_dump(), names)
    where = parse_device(device)
    dtype = parse_dtype(None, where)
    source = resolve(model)
    with outputs(keep, "llmq-ablate-") as folder:
        tokenizer = load_tokenizer(source)
        protocols = [
            read_windows(path, tokenizer, seq_len=eval_seq_len, windows=windows, spread=spread) for path in text
        ]
        calibration = _calibration(recipe, tokenizer)
        bench = Bench(source, protocols, load_model(source, dtype, where), dtype, where)
        trials = [(variant.name, folder / variant.folder) for variant in wanted]

        def measure(number: int) -> Outcome:
            return bench.measure(wanted[number].fields, trials[number][1], calibration=calibration)

        outcomes = run_all(trials, measure, keep=keep is not None, first_must=True)
        rows = [_Row(*row) for row in zip(wanted, outcomes, strict=True)]
    if as_json:
        show_json(_content(bench, recipe, rows))
    else:
        described = setup(bench.texts, rows[0].outcome.results)
        show_wide(facts([("model", model), *described]), "", _table(bench, rows))


def _calibration(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Calibration | None:
    """Return the windows for all variants; None for a method that needs no data."""
    from llmq.calibration import calibration_of
    from llmq.solvers import SOLVERS

    if recipe.method not in SOLVERS or not SOLVERS[recipe.method].calibrated:
        return None
    return calibration_of(recipe, tokenizer)


def _ratio(row: _Row, base: _Row, text: int) -> float | None:
    """Return the KL of `row` over that of `base`; None where that is 0."""
    before = base.outcome.results[text].kl
    return row.outcome.results[text].kl / before if before else None


def _content(bench: Bench, recipe: Recipe, rows: Sequence[_Row]) -> dict[str, object]:
    """Return everything for JSON."""
    base = rows[0].outcome.report
    assert base is not None, "a recipe that fails ends the command"
    return {
        "model": str(bench.source),
        "recipe": recipe.model_dump(mode="json"),
        "calibration": base.calibration,
        "protocols": [windows.protocol() for windows in bench.texts],
        "dtype": "the checkpoint's own" if bench.dtype is None else str(bench.dtype).removeprefix("torch."),
        "device": str(bench.device),
        "versions": base.versions,
        "original": [result.original.to_dict() for result in rows[0].outcome.results],
        "variants": [_row_content(row, rows[0]) for row in rows],
    }


def _row_content(row: _Row, base: _Row) -> dict[str, object]:
    changes = {name: value for name, value in row.variant.fields.items() if value != base.variant.fields[name]}
    return {
        "variant": row.variant.name,
        "changes": changes,
        "error": row.outcome.error,
        "relative_loss": row.outcome.loss,
        "held_out_loss": row.outcome.held_out_loss,
        "seconds": row.outcome.seconds,
        "texts": [
            {"kl": x.kl, "kl_interval": x.kl_interval, "kl_ratio": _ratio(row, base, i), **x.packed.to_dict()}
            for i, x in enumerate(row.outcome.results)
        ],
    }


def _table(bench: Bench, rows: Sequence[_Row]) -> Table:
    failed = any(row.outcome.error for row in rows)
    of_texts = [name for x in bench.texts for name in (f"KL {Path(x.source).stem}", "ratio", "perplexity")]
    table = result_table(["variant"], ["loss", "held out", *of_texts, "seconds"], failed=failed)
    for row in rows:
        found = row.outcome
        cells = [cell(found.loss, ".2e"), cell(found.held_out_loss, ".2e"), *_text_cells(row, rows[0])]
        table.add_row(row.variant.name, *cells, cell(found.seconds, ".1f"), *[found.error or ""][: int(failed)])
    return table


def _text_cells(row: _Row, base: _Row) -> list[str]:
    if not row.outcome.results:
        return ["-"] * 3 * len(base.outcome.results)
    cells = []
    for i, x in enumerate(row.outcome.results):
        cells += [kl_cell(x), cell(_ratio(row, base, i), ".3f"), f"{x.packed.ppl:.4f}"]
    return cells
