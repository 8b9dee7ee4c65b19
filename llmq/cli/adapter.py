"""``llmq adapter``: a low-rank adapter that gives a packed checkpoint back part of what quantization took."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from llmq.cli.models import DEVICE_HELP, load_tokenizer, parse_device
from llmq.cli.tables import facts, human_bytes, show, show_json

if TYPE_CHECKING:
    from llmq.adapter import Adapter, Compensation


def adapter_command(  # noqa: PLR0913  one parameter per option
    packed: Annotated[str, typer.Argument(metavar="PACKED", help="Packed checkpoint folder or hub id.")],
    original: Annotated[str, typer.Option(metavar="MODEL", help="What it was made from.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write. Default: PACKED-adapter-rR beside it.", show_default=False),
    ] = None,
    rank: Annotated[int, typer.Option(help="Inner size of the two matrices of each layer.")] = 32,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Text to weigh errors by. Default: a text shipped with llmq.", show_default=False
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(min=1, help="Windows. Default: 128, or what the shipped text holds.", show_default=False),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of windows.")] = 0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Dtype of the forward pass: auto (the original's own), float32, bfloat16, float16.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with the losses of every layer.")] = False,
) -> None:
    """Write a LoRA adapter that corrects a packed checkpoint, for peft to load on top of it."""
    where = parse_device(device)
    from llmq.adapter import check_absent, compensate, open_pair, save
    from llmq.calibration import load_calibration

    output = output or _beside(packed, rank)
    check_absent(output)
    pair = open_pair(packed, original, dtype)
    tokenizer = load_tokenizer(pair.reader.path)
    windows = load_calibration(calibration, tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed)
    console = Console(stderr=True, highlight=False)

    def tell(layer: Compensation) -> None:
        share = layer.loss_after / layer.loss_before if layer.loss_before else 1.0
        console.print(f"{layer.name}  loss x {share:.3f}", soft_wrap=True)

    adapter = compensate(pair, windows, rank, device=where, progress=tell)
    save(adapter, output)
    if as_json:
        layers = [asdict(layer) for layer in adapter.layers]
        show_json({"output": str(output), "rank": rank, "bits_per_weight": adapter.bits_per_weight, "layers": layers})
    else:
        show(facts(_summary(adapter, output)))


def _beside(packed: str, rank: int) -> Path:
    """Return where the adapter of a folder, or of a hub id, goes unless told otherwise."""
    folder = Path(packed).resolve() if Path(packed).exists() else Path(Path(packed).name)
    return folder.with_name(f"{folder.name}-adapter-r{rank}")


def _summary(adapter: Adapter, output: Path) -> list[tuple[str, object]]:
    losses = [(x.loss_before / x.energy, x.loss_after / x.energy) for x in adapter.layers if x.energy]
    before, after = (sum(column) / len(losses) for column in zip(*losses, strict=True)) if losses else (0.0, 0.0)
    size = sum(tensor.nbytes for tensor in adapter.tensors.values())
    return [
        ("layers", f"{len(adapter.layers)}, rank {adapter.rank}"),
        ("size", f"{human_bytes(size)}, {adapter.bits_per_weight:.2f} bits per packed weight"),
        ("relative loss", f"{before:.2e} to {after:.2e} on average"),
        ("written to", output),
    ]
