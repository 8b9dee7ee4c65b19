"""Measure presets against each other: KL from the original on some texts, for each bit width, grid and group size.

    python scripts/accuracy_table.py MODEL --output DIR --calibration FILE --text FILE [--text FILE ...]
        [--presets plain default best] [--bits 4 3 2] [--grids asym sym] [--group-sizes 128]
        [--num-samples 64] [--windows 120]

A preset may have stages of `llmq ablate` added or removed: default+rotation, best-tune_model. DIR gets the packed model
and the result of every row, and table.md and table.json. A row whose model and result are there, made with the same
settings, is not made again: a run that was stopped goes on where it was. A row that fails is said to, and the exit
code is 1.

KL is the mean over tokens of KL(original || packed) in nats, in float32, on windows of 512 tokens spread evenly over
each text. Seconds are those of quantizing, with as many threads as OMP_NUM_THREADS allows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from llmq import environment
from llmq.disk import replace_file
from llmq.driver import quantize
from llmq.errors import LlmqError
from llmq.hf import load
from llmq.presets import preset_fields
from llmq.recipe import Recipe, make_recipe
from llmq.stages import STAGES, check_stages
from llmq_eval.divergence import divergence
from llmq_eval.windows import Windows, read_windows

SEQ_LEN = 512  # of calibration and of evaluation


@dataclass(frozen=True)
class Row:
    """One model to make."""

    preset: str  # with stages added and removed
    bits: int
    grid: str  # asym or sym
    group_size: int

    @property
    def name(self) -> str:
        """A file name."""
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.preset}-{self.bits}{self.grid}-{group}"

    def recipe(self, common: Mapping[str, object]) -> Recipe:
        """Return what makes it."""
        grid = {"bits": self.bits, "sym": self.grid == "sym", "group_size": self.group_size}
        return make_recipe({**common, **fields_of(self.preset), **grid})


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    model: Path
    output: Path
    common: dict[str, object]  # fields of every recipe
    texts: list[Windows]

    def settings(self, row: Row) -> dict[str, Any]:
        """Return what the numbers of `row` depend on, ready for JSON."""
        recipe = row.recipe(self.common).model_dump(mode="json")
        return {"model": str(self.model), "recipe": recipe, "texts": [windows.protocol() for windows in self.texts]}

    def known(self, row: Row) -> dict[str, Any] | None:
        """Return the result of `row` if it has been made with these settings."""
        result = self.output / f"{row.name}.json"
        if not result.exists() or not (self.output / row.name / "config.json").exists():
            return None
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found if found["settings"] == self.settings(row) else None

    def make(self, row: Row, original: PreTrainedModel) -> dict[str, Any]:
        """Quantize and measure `row`, write its result, and return it."""
        folder = self.output / row.name
        report = quantize(self.model, folder, row.recipe(self.common), force=True)
        packed = load(folder, dtype=torch.float32)
        results = [divergence(original, packed, windows) for windows in self.texts]
        found = {
            **asdict(row),
            "kl": [result.kl for result in results],
            "kl_interval": [result.kl_interval for result in results],
            "perplexity": [result.packed.ppl for result in results],
            "perplexity_before": [result.original.ppl for result in results],
            "seconds": sum(report.seconds.values()),
            "threads": torch.get_num_threads(),
            "versions": environment.versions(),
            "settings": self.settings(row),
        }
        replace_file(self.output / f"{row.name}.json", (json.dumps(found, indent=2) + "\n").encode())
        return found


def fields_of(preset: str) -> dict[str, object]:
    """Return what `preset`, such as default+rotation or best-tune_model, sets."""
    name, *changes = re.split(r"(?=[+-])", preset)
    fields = dict(preset_fields(name))
    if changes:
        check_stages([change[1:] for change in changes])
    for change in changes:
        stage = STAGES[change[1:]]
        fields |= stage.on if change[0] == "+" else stage.off
    return fields


def markdown(rows: Sequence[Row], found: Mapping[Row, dict[str, Any]], texts: Sequence[str]) -> str:
    """Return three tables per group size: KL, its ratio to the first preset's, and seconds."""

    def kl(row: Row) -> str:
        return r"\|".join(f"{value:.5f}".removeprefix("0") for value in found[row]["kl"])

    def ratio(row: Row) -> str:
        base = Row(rows[0].preset, row.bits, row.grid, row.group_size)
        if base not in found:
            return ""
        return r"\|".join(f"{a / b:.2f}" for a, b in zip(found[row]["kl"], found[base]["kl"], strict=True))

    def seconds(row: Row) -> str:
        return f"{found[row]['seconds']:.0f}"

    lines = []
    for size in dict.fromkeys(row.group_size for row in rows):
        mine = [row for row in rows if row.group_size == size]
        columns = list(dict.fromkeys((row.bits, row.grid) for row in mine))
        lines.append(f"## {'Per channel' if size == -1 else f'Group {size}'}")
        titles = (f"KL {' | '.join(texts)}", f"KL over that of {rows[0].preset}", "Seconds")
        for title, cell in zip(titles, (kl, ratio, seconds), strict=True):
            lines += ["", f"{title}:", "", f"| | {' | '.join(f'{bits} {grid}' for bits, grid in columns)} |"]
            lines.append("|---" * (1 + len(columns)) + "|")
            for preset in dict.fromkeys(row.preset for row in mine):
                cells = [Row(preset, bits, grid, size) for bits, grid in columns]
                shown = (cell(row) if row in found else "failed" for row in cells)
                lines.append(f"| {preset} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    summary, *rest = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=summary, epilog="\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--output", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--calibration", required=True, help="text file, .jsonl or dataset")
    parser.add_argument("--text", action="append", required=True, help="UTF-8 text file to predict (repeatable)")
    parser.add_argument("--presets", nargs="+", default=["plain", "default", "best"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--grids", nargs="+", choices=["asym", "sym"], default=["asym", "sym"])
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[128], help="-1: one scale per output row")
    parser.add_argument("--num-samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=120, help="windows of each text")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    combinations = itertools.product(options.group_sizes, options.bits, options.grids, options.presets)
    rows = [Row(preset, bits, grid, size) for size, bits, grid, preset in combinations]
    common = {"calibration": options.calibration, "num_samples": options.num_samples, "seq_len": SEQ_LEN}
    for row in rows:
        row.recipe(common)  # a name that is wrong is said now, and not after hours
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [
        read_windows(text, tokenizer, seq_len=SEQ_LEN, windows=options.windows, spread=True) for text in options.text
    ]
    bench = Bench(options.model, options.output, common, texts)
    options.output.mkdir(parents=True, exist_ok=True)
    found = {row: result for row in rows if (result := bench.known(row)) is not None}
    original = load(options.model, dtype=torch.float32) if len(found) < len(rows) else None
    for row in rows:
        if original is not None and row not in found:
            try:
                found[row] = bench.make(row, original)
            except LlmqError as error:
                print(f"{row.name}: {error}", file=sys.stderr)
                continue
        print(f"{row.name}: KL {', '.join(f'{value:.5f}' for value in found[row]['kl'])}", file=sys.stderr, flush=True)
    table = markdown(rows, found, [Path(text).stem for text in options.text])
    replace_file(options.output / "table.md", table.encode())
    rest = json.dumps([found[row] for row in rows if row in found], indent=2)
    replace_file(options.output / "table.json", f"{rest}\n".encode())
    print(table)
    return 0 if len(found) == len(rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LlmqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
