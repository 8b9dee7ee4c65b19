"""``llmq ablate``: what each stage of a recipe brings on a model."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from llmq.cli.models import DEVICE_HELP, load_model, load_tokenizer, parse_device, parse_dtype
from llmq.cli.options import takes_recipe
from llmq.cli.tables import facts, show_json, with_interval
from llmq.errors import CheckpointError, LlmqError
from llmq.recipe import Recipe, make_recipe
from llmq.stages import STAGES, Variant, variants

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmq.calibration import Calibration
    from llmq.report import Report
    from llmq_eval.divergence import DivergenceResult
    from llmq_eval.windows import Windows


@dataclass(frozen=True)
class _Row:
    """A variant of the recipe, and what came of it."""

    variant: Variant
    report: Report | None = None
    results: tuple[DivergenceResult, ...] = ()  # one per text
    error: str | None = None

    @property
    def seconds(self) -> float | None:
        """Time that quantizing took."""
        return None if self.report is None else sum(self.report.seconds.values())

    @property
    def loss(self) -> float | None:
        """Relative loss on the calibration tokens, mean over layers."""
        return None if self.report is None else _mean([layer.relative_loss for layer in self.report.layers])

    @property
    def held_out_loss(self) -> float | None:
        """The same on the tokens held out."""
        return None if self.report is None else _mean([layer.held_out_loss for layer in self.report.layers])


@dataclass(frozen=True)
class _Bench:
    """What all variants have in common."""

    source: Path
    calibration: Calibration | None
    texts: list[Windows]
    original: PreTrainedModel
    dtype: torch.dtype | None
    device: torch.device

    def measure(self, variant: Variant, folder: Path) -> _Row:
        """Quantize into `folder` and compare the result with the original on all texts."""
        from llmq.driver import quantize
        from llmq_eval.divergence import divergence

        recipe = make_recipe(variant.fields)
        report = quantize(self.source, folder, recipe, calibration=self.calibration, device=self.device)
        packed = load_model(folder, self.dtype, self.device)
        return _Row(variant, report, tuple(divergence(self.original, packed, windows) for windows in self.texts))


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

    names = list(STAGES) if stages is None else [name.strip() for name in stages.split(",") if name.strip()]
    wanted = variants(recipe.model_dump(), names)
    where = parse_device(device)
    dtype = parse_dtype(None, where)
    source = resolve(model)
    with _outputs(keep) as folder:
        tokenizer = load_tokenizer(source)
        protocols = [
            read_windows(path, tokenizer, seq_len=eval_seq_len, windows=windows, spread=spread) for path in text
        ]
        calibration = _calibration(recipe, tokenizer)
        bench = _Bench(source, calibration, protocols, load_model(source, dtype, where), dtype, where)
        rows = _run(bench, wanted, folder, keep is not None)
    if as_json:
        show_json(_content(bench, recipe, rows))
    else:
        _show(facts([("model", model), *_setup(bench, rows[0])]), "", _table(bench, rows))


@contextmanager
def _outputs(keep: Path | None) -> Iterator[Path]:
    """Yield the folder for all variants: `keep`, or a temporary one that is removed.

    Raises:
        CheckpointError: `keep` holds something.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="llmq-ablate-") as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise CheckpointError(f"--keep {keep}: is not an empty folder; choose another")
    yield keep


def _calibration(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Calibration | None:
    """Return the windows for all variants; None for a method that needs no data."""
    from llmq.calibration import calibration_of
    from llmq.solvers import SOLVERS

    if recipe.method not in SOLVERS or not SOLVERS[recipe.method].calibrated:
        return None
    return calibration_of(recipe, tokenizer)


def _run(bench: _Bench, wanted: Sequence[Variant], folder: Path, keep: bool) -> list[_Row]:
    """Return a row per variant; one that cannot be made says so, unless it is the first, the recipe itself."""
    console, rows = Console(stderr=True, highlight=False), list[_Row]()
    for number, variant in enumerate(wanted, 1):
        console.print(f"{number} of {len(wanted)}  {variant.name}", soft_wrap=True)
        start = time.perf_counter()
        try:
            row = bench.measure(variant, folder / variant.folder)
        except Exception as error:  # whatever it is: hours of other rows are worth more than its traceback
            if not rows:
                raise
            row = _Row(variant, error=_first_line(error))
        rows.append(row)
        outcome = row.error or f"KL {', '.join(f'{result.kl:.5f}' for result in row.results)}"
        console.print(f"    {time.perf_counter() - start:.1f} s  {outcome}", soft_wrap=True)
        if not keep:
            shutil.rmtree(folder / variant.folder, ignore_errors=True)  # one at a time on the disk
    return rows


def _first_line(error: Exception) -> str:
    """Return what `error` says, with its type in front where it was not raised on purpose."""
    said = f"{error}" if isinstance(error, LlmqError) else f"{type(error).__name__}: {error}"
    return said.strip().splitlines()[0]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _ratio(row: _Row, base: _Row, text: int) -> float | None:
    """Return the KL of `row` over that of `base`; None where that is 0."""
    return row.results[text].kl / base.results[text].kl if base.results[text].kl else None


def _content(bench: _Bench, recipe: Recipe, rows: Sequence[_Row]) -> dict[str, object]:
    """Return everything for JSON."""
    base = rows[0].report
    assert base is not None, "a recipe that fails ends the command"
    return {
        "model": str(bench.source),
        "recipe": recipe.model_dump(mode="json"),
        "calibration": base.calibration,
        "protocols": [windows.protocol() for windows in bench.texts],
        "dtype": "the checkpoint's own" if bench.dtype is None else str(bench.dtype).removeprefix("torch."),
        "device": str(bench.device),
        "versions": base.versions,
        "original": [result.original.to_dict() for result in rows[0].results],
        "variants": [_row_content(row, rows[0]) for row in rows],
    }


def _row_content(row: _Row, base: _Row) -> dict[str, object]:
    changes = {name: value for name, value in row.variant.fields.items() if value != base.variant.fields[name]}
    return {
        "variant": row.variant.name,
        "changes": changes,
        "error": row.error,
        "relative_loss": row.loss,
        "held_out_loss": row.held_out_loss,
        "seconds": row.seconds,
        "texts": [
            {"kl": x.kl, "kl_interval": x.kl_interval, "kl_ratio": _ratio(row, base, i), **x.packed.to_dict()}
            for i, x in enumerate(row.results)
        ],
    }


def _setup(bench: _Bench, base: _Row) -> list[tuple[str, str]]:
    return [
        (
            x.source,
            f"{x.count} windows of {x.seq_len} tokens, stride {x.stride}; perplexity before {found.original.ppl:.4f}",
        )
        for x, found in zip(bench.texts, base.results, strict=True)
    ]


def _table(bench: _Bench, rows: Sequence[_Row]) -> Table:
    failed = any(row.error for row in rows)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("variant", no_wrap=True)
    of_texts = [name for x in bench.texts for name in (f"KL {Path(x.source).stem}", "ratio", "perplexity")]
    for header in ("loss", "held out", *of_texts, "seconds"):
        table.add_column(header, justify="right", no_wrap=True)
    if failed:
        table.add_column("failed", no_wrap=True)
    for row in rows:
        cells = [_cell(row.loss, ".2e"), _cell(row.held_out_loss, ".2e"), *_text_cells(row, rows[0])]
        table.add_row(row.variant.name, *cells, _cell(row.seconds, ".1f"), *[row.error or ""][: int(failed)])
    return table


def _text_cells(row: _Row, base: _Row) -> list[str]:
    if not row.results:
        return ["-"] * 3 * len(base.results)
    cells = []
    for i, x in enumerate(row.results):
        cells += [with_interval(x.kl, x.kl_interval, 5), _cell(_ratio(row, base, i), ".3f"), f"{x.packed.ppl:.4f}"]
    return cells


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _show(*parts: Table | str) -> None:
    """Write `parts` to stdout, as wide as they are: lines that wrap are better than numbers cut off."""
    narrow = Console(highlight=False)
    free = narrow.options.update(width=10_000)
    width = max(narrow.measure(part, options=free).maximum for part in parts)
    console = Console(highlight=False, width=max(width, narrow.width))
    for part in parts:
        console.print(part)
