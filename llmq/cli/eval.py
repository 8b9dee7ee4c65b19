"""``llmq eval``: what quantization cost, under a protocol that is printed with the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmq.cli.models import DEVICE_HELP, DTYPE_HELP, load_model, load_tokenizer, parse_device, parse_dtype
from llmq.cli.tables import facts, human_bytes, show, show_json, with_interval

if TYPE_CHECKING:
    import torch

    from llmq_eval.divergence import DivergenceResult
    from llmq_eval.perplexity import PerplexityResult
    from llmq_eval.windows import Windows


@dataclass(frozen=True)
class _Folder:
    """A checkpoint folder that was found to be one."""

    path: Path
    disk_bytes: int  # of its safetensors files


def eval_command(  # noqa: PLR0913  one parameter per option
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint folder, packed or dense.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text file to predict.", show_default=False)],
    against: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="Folder it was made from, to compare with.", show_default=False),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens predicted per window.")] = 512,
    windows: Annotated[
        int | None,
        typer.Option(min=1, help="Windows at most, from the start of the text. Default: all.", show_default=False),
    ] = None,
    spread: Annotated[bool, typer.Option("--spread", help="Spread the windows evenly over the whole text.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help=f"{DTYPE_HELP} Default: float32 on CPU, else its own.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Measure perplexity on a text, and with --against how far the predictions are from the original's.

    KL is the mean over tokens of KL(original || packed) in nats; intervals are 95 % intervals over paired
    windows.
    """
    from llmq_eval.windows import read_windows

    where = parse_device(device)
    precision = parse_dtype(dtype, where)
    folder, original = _open(directory), _open(against) if against else None
    tokenizer = load_tokenizer((original or folder).path)
    protocol = read_windows(text, tokenizer, seq_len=seq_len, windows=windows, spread=spread)
    setup = _setup(protocol, precision, where)
    if original is None:
        alone = _measure(folder, protocol, precision, where)
        content = {"size": {"packed": folder.disk_bytes}, **alone.to_dict()}
        table = _table_alone(folder, alone)
    else:
        pair = _compare(original, folder, protocol, precision, where)
        sizes = {"original": original.disk_bytes, "packed": folder.disk_bytes}
        content = {"size": {**sizes, "ratio": sizes["original"] / sizes["packed"]}, **pair.to_dict()}
        table = _table_pair(original, folder, pair)
    if as_json:
        show_json({"protocol": setup, **content})
    else:
        show(facts(_describe(setup)), "", table)


def _open(directory: str) -> _Folder:
    """Return the checkpoint in `directory`.

    Raises CheckpointError when there is none, and SpecError when its model predicts no next token.
    """
    from llmq.checkpoint import CheckpointReader, resolve
    from llmq.families import check_causal
    from llmq.preflight import model_config

    reader = CheckpointReader(resolve(directory))
    check_causal(model_config(reader), "llmq eval")
    files = {reader.info(name).file for name in reader.keys()}  # noqa: SIM118  not a dict
    return _Folder(reader.path, sum((reader.path / file).stat().st_size for file in files))


def _measure(folder: _Folder, windows: Windows, dtype: torch.dtype | None, device: torch.device) -> PerplexityResult:
    from llmq_eval.perplexity import perplexity

    model = load_model(folder.path, dtype, device)
    with _progress(len(windows)) as advance:
        return perplexity(model, windows, advance=advance)


def _compare(
    original: _Folder, packed: _Folder, windows: Windows, dtype: torch.dtype | None, device: torch.device
) -> DivergenceResult:
    from llmq_eval.divergence import divergence

    models = [load_model(folder.path, dtype, device) for folder in (original, packed)]
    with _progress(len(windows)) as advance:
        return divergence(models[0], models[1], windows, advance=advance)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr, where it does not mix with results, and yield what moves it by one window."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("windows", total=total)
        yield lambda: bar.advance(task)


def _setup(windows: Windows, dtype: torch.dtype | None, device: torch.device) -> dict[str, object]:
    """Return all that is needed to repeat the measurement."""
    from llmq.environment import versions

    name = "the checkpoint's own" if dtype is None else str(dtype).removeprefix("torch.")
    return {**windows.protocol(), "dtype": name, "device": str(device), "versions": versions()}


def _describe(setup: dict[str, object]) -> list[tuple[str, object]]:
    versions = setup["versions"]
    assert isinstance(versions, dict)
    shown = ", ".join(f"{name} {versions[name]}" for name in ("llmq", "torch", "transformers"))
    return [
        ("text", f"{setup['text']} ({setup['text_tokens']} tokens, BOS {'yes' if setup['bos'] else 'no'})"),
        ("scored", f"{setup['tokens_scored']} tokens: {setup['windows']} windows of {setup['seq_len']}"),
        ("stride", f"{setup['stride']} tokens"),
        ("computed in", f"{setup['dtype']} on {setup['device']}"),
        ("versions", shown),
    ]


def _table_alone(folder: _Folder, result: PerplexityResult) -> Table:
    table = _table("", folder.path.name)
    table.add_row("weights on disk", human_bytes(folder.disk_bytes))
    table.add_row("perplexity", with_interval(result.ppl, result.ppl_interval, 4))
    return table


def _table_pair(original: _Folder, packed: _Folder, result: DivergenceResult) -> Table:
    table = _table("", "before", "after", "change")
    ratio = original.disk_bytes / packed.disk_bytes
    change = f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"
    sizes = [human_bytes(folder.disk_bytes) for folder in (original, packed)]
    table.add_row("weights on disk", *sizes, change)
    change = f"x {with_interval(result.ppl_ratio, result.ppl_ratio_interval, 4)}"
    table.add_row("perplexity", f"{result.original.ppl:.4f}", f"{result.packed.ppl:.4f}", change)
    table.add_row("KL per token, nats", "", "", with_interval(result.kl, result.kl_interval, 5))
    table.add_row("top-1 agreement", "", "", with_interval(result.agreement, result.agreement_interval, 4))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table
