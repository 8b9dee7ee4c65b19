"""Many outputs of one model, each quantized and compared with the original: what ablate and compare share."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from llmq.cli.inspect import take_inventory
from llmq.cli.models import load_model
from llmq.cli.tables import with_interval
from llmq.errors import CheckpointError, LlmqError
from llmq.recipe import make_recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmq.report import Report
    from llmq_eval.divergence import DivergenceResult
    from llmq_eval.windows import Windows


@dataclass(frozen=True)
class Outcome:
    """What came of one output."""

    report: Report | None = None
    results: tuple[DivergenceResult, ...] = ()  # one per text
    bits_per_weight: float | None = None  # of the packed layers, all their tensors counted
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
class Bench:
    """What all outputs have in common."""

    source: Path
    texts: list[Windows]
    original: PreTrainedModel
    dtype: torch.dtype | None
    device: torch.device

    def measure(self, fields: dict[str, object], folder: Path, **data: Any) -> Outcome:
        """Quantize by a recipe of `fields` into `folder` and compare the result with the original on all texts.

        `data` is what `llmq.driver.quantize` is to calibrate on.
        """
        from llmq.driver import quantize
        from llmq_eval.divergence import divergence

        report = quantize(self.source, folder, make_recipe(fields), device=self.device, **data)
        packed = load_model(folder, self.dtype, self.device)
        results = tuple(divergence(self.original, packed, windows) for windows in self.texts)
        inventory = take_inventory(str(folder)).packed
        assert inventory is not None, "it was just packed"
        return Outcome(report, results, inventory.bits_per_weight)


@contextmanager
def outputs(keep: Path | None, prefix: str) -> Iterator[Path]:
    """Yield the folder for all outputs: `keep`, or a temporary one that is removed.

    Raises:
        CheckpointError: `keep` holds something.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix=prefix) as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise CheckpointError(f"--keep {keep}: is not an empty folder; choose another")
    yield keep


def run_all(
    trials: Sequence[tuple[str, Path]], measure: Callable[[int], Outcome], *, keep: bool, first_must: bool
) -> list[Outcome]:
    """Return the outcome of each of the `trials` (name, folder), by number; one that cannot be made says so.

    With `first_must`, an error in the first one ends all; without `keep`, folders go as soon as they are measured.
    """
    console, outcomes = Console(stderr=True, highlight=False), list[Outcome]()
    for number, (name, folder) in enumerate(trials):
        console.print(f"{number + 1} of {len(trials)}  {name}", soft_wrap=True)
        start = time.perf_counter()
        try:
            outcome = measure(number)
        except Exception as error:  # whatever it is: hours of other rows are worth more than its traceback
            if first_must and not outcomes:
                raise
            outcome = Outcome(error=_first_line(error))
        outcomes.append(outcome)
        said = outcome.error or f"KL {', '.join(f'{result.kl:.5f}' for result in outcome.results)}"
        console.print(f"    {time.perf_counter() - start:.1f} s  {said}", soft_wrap=True)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)  # one at a time on the disk
    return outcomes


def result_table(first: Sequence[str], others: Sequence[str], *, failed: bool) -> Table:
    """Return an empty table: headers of text on the left, of numbers on the right, and of errors, if there are any."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for header in first:
        table.add_column(header, no_wrap=True)
    for header in others:
        table.add_column(header, justify="right", no_wrap=True)
    if failed:
        table.add_column("failed", no_wrap=True)
    return table


def setup(texts: Sequence[Windows], results: Sequence[DivergenceResult]) -> list[tuple[str, str]]:
    """Return what each text is, and the original's perplexity on it."""
    return [
        (
            x.source,
            f"{x.count} windows of {x.seq_len} tokens, stride {x.stride}; perplexity before {found.original.ppl:.4f}",
        )
        for x, found in zip(texts, results, strict=True)
    ]


def kl_cell(result: DivergenceResult) -> str:
    """Return the KL of a result with its interval."""
    return with_interval(result.kl, result.kl_interval, 5)


def cell(value: float | None, form: str) -> str:
    """Return `value` in a table; a dash for None."""
    return "-" if value is None else format(value, form)


def show_wide(*parts: Table | str) -> None:
    """Write `parts` to stdout, as wide as they are: lines that wrap are better than numbers cut off."""
    narrow = Console(highlight=False)
    free = narrow.options.update(width=10_000)
    width = max(narrow.measure(part, options=free).maximum for part in parts)
    console = Console(highlight=False, width=max(width, narrow.width))
    for part in parts:
        console.print(part)


def _first_line(error: Exception) -> str:
    """Return what `error` says, with its type in front where it was not raised on purpose."""
    said = f"{error}" if isinstance(error, LlmqError) else f"{type(error).__name__}: {error}"
    return said.strip().splitlines()[0]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
