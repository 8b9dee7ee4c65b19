"""``llmq inspect``: what a checkpoint folder holds, from its config.json and the headers of its files alone."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmq.cli.options import listed
from llmq.cli.tables import facts, human_bytes, show, show_json
from llmq.errors import CheckpointError

if TYPE_CHECKING:
    from llmq.checkpoint import CheckpointReader
    from llmq.packed import PackedCheckpoint


_SHORT = 32  # levels that are shown one by one


@dataclass(frozen=True)
class Kind:
    """Packed layers that are alike."""

    grid: str
    bits: int
    group_size: int  # -1: one group per output
    sym: bool
    layers: int


@dataclass(frozen=True)
class Packed:
    """The quantized layers of a checkpoint."""

    method: str  # quant_method in config.json
    format: str  # which layout of that method, a name in llmq.formats.FORMATS
    kinds: tuple[Kind, ...]  # the most frequent first
    desc_act: bool | None  # None where config.json does not say
    layers: int
    weights: int  # how many numbers the layers stand for
    bytes: int  # all tensors of the layers: codes, scales, zeros, tables, codebooks, group indices
    bits_per_weight: float  # 8 * bytes / weights


@dataclass(frozen=True)
class Dense:
    """Tensors that stayed as they were and differ only in the number of their block."""

    pattern: str  # the name, with * for the numbers in it
    count: int
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Inventory:
    """What a checkpoint folder holds."""

    path: str
    model_type: str
    packed: Packed | None  # None: nothing is quantized
    dense: tuple[Dense, ...]  # largest first
    dense_bytes: int
    total_bytes: int  # of tensors
    disk_bytes: int  # of the safetensors files, headers included


def inspect_command(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint folder, packed or dense.")],
    plot: Annotated[
        str | None,
        typer.Option(metavar="LAYER", help="Draw this layer's weights and the levels of grids.", show_default=False),
    ] = None,
    plot_file: Annotated[Path, typer.Option(metavar="FILE", help="Where to: .png, .svg or .pdf.")] = Path("levels.png"),
    grids: Annotated[
        str | None,
        typer.Option(metavar="A,B,…", help="Grids to draw. Default: the layer's own, or all.", show_default=False),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="Draw the weights of this folder's layer.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Show grid, bits, group size, format and bytes of a checkpoint, and what stayed dense, without loading it.

    With --plot, draw a layer instead: a histogram of its weights, each over the largest in its group, and below it
    where the levels of grids lie.
    """
    if plot is not None:
        from llmq.cli.levels import draw_layer

        draw_layer(directory, plot, plot_file, None if grids is None else listed(grids), against)
        typer.echo(f"drawn to {plot_file}", err=True)
        return
    found = take_inventory(directory)
    if as_json:
        show_json(asdict(found))
    else:
        show(facts(_summary(found)), "", _dense_table(found))


def take_inventory(directory: str) -> Inventory:
    """Return what the checkpoint folder `directory` holds, reading config.json and headers only.

    Raises CheckpointError when it is no checkpoint, or packed in a way that llmq does not read.
    """
    from llmq.checkpoint import CheckpointReader, resolve

    path = resolve(directory)
    reader = CheckpointReader(path)
    packed = _opened(reader)
    names = reader.keys()
    dense = _group_dense(reader, names if packed is None else packed.dense)
    files = {reader.info(name).file for name in names}
    return Inventory(
        path=str(reader.path),
        model_type=str(reader.config.get("model_type", "unknown")),
        packed=None if packed is None else _packed(packed),
        dense=dense,
        dense_bytes=sum(group.bytes for group in dense),
        total_bytes=sum(reader.info(name).nbytes for name in names),
        disk_bytes=sum((reader.path / file).stat().st_size for file in files),
    )


def _opened(reader: CheckpointReader) -> PackedCheckpoint | None:
    """Return the folder of `reader` as a packed one, or None if nothing in it is quantized."""
    from llmq.formats import METHODS
    from llmq.packed import PackedCheckpoint

    text = reader.config.get("text_config")
    if any(isinstance(c, dict) and c.get("quantization_config") is not None for c in (reader.config, text)):
        return PackedCheckpoint(reader.path)
    markers = tuple(f".{format.marker}" for format in METHODS.values())
    modules = [name for name in reader if name.endswith(markers)]
    if modules:
        raise CheckpointError(
            f"{reader.path / 'config.json'}: quantization_config is missing, but {len(modules)} layers are packed, "
            f"{modules[0].rpartition('.')[0]} for one"
        )
    return None


def _packed(reader: PackedCheckpoint) -> Packed:
    kinds = Counter((spec.grid, spec.bits, spec.group_size, spec.symmetric) for spec in reader.specs.values())
    weights = sum(n * k for n, k in (layer.shape for layer in reader.layers.values()))
    size = sum(reader.info(key).nbytes for layer in reader.layers.values() for key in layer.keys.values())
    return Packed(
        method=reader.quantization["quant_method"],
        format=", ".join(sorted({spec.format for spec in reader.specs.values()})),
        kinds=tuple(Kind(*kind, count) for kind, count in kinds.most_common()),
        desc_act=reader.quantization.get("desc_act"),
        layers=len(reader.layers),
        weights=weights,
        bytes=size,
        bits_per_weight=8 * size / weights,
    )


def _group_dense(reader: CheckpointReader, names: list[str]) -> tuple[Dense, ...]:
    """Return the tensors `names`, those of different blocks folded into one row, largest first."""
    groups = defaultdict(list)
    for name in names:
        info = reader.info(name)
        pattern = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)
        groups[pattern, info.shape, str(info.dtype).removeprefix("torch.")].append(info.nbytes)
    rows = [Dense(pattern, len(sizes), shape, dtype, sum(sizes)) for (pattern, shape, dtype), sizes in groups.items()]
    return tuple(sorted(rows, key=lambda row: (-row.bytes, row.pattern)))


def _summary(found: Inventory) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("checkpoint", found.path), ("model type", found.model_type)]
    packed = found.packed
    if packed is None:
        rows.append(("format", "dense, nothing is quantized"))
    else:
        order = {True: "yes", False: "no", None: "not stated"}[packed.desc_act]
        rows.append(
            ("format", packed.format if packed.format == packed.method else f"{packed.method}, {packed.format}")
        )
        rows += [(f"{kind.bits} bits", _described(kind)) for kind in packed.kinds]
        rows += [(f"{name} levels", shown) for name, shown in _tables(packed.kinds)]
        rows += [
            ("desc_act", order),
            ("packed layers", packed.layers),
            ("packed bytes", f"{packed.bytes} ({human_bytes(packed.bytes)})"),
            ("bits per packed weight", f"{packed.bits_per_weight:.3f}, all tensors counted"),
        ]
    return [
        *rows,
        ("dense bytes", f"{found.dense_bytes} ({human_bytes(found.dense_bytes)})"),
        ("total bytes", f"{found.total_bytes} ({human_bytes(found.total_bytes)})"),
    ]


def _described(kind: Kind) -> str:
    from llmq.grids import make_grid

    own = "table of levels" if make_grid(kind.grid, kind.bits, kind.sym).learns else "scale"
    groups = f"one {own} per output" if kind.group_size == -1 else f"groups of {kind.group_size}"
    if kind.grid != "uniform":
        return f"{kind.grid} grid, {groups}, {kind.layers} layers"
    return f"{groups}, {'symmetric' if kind.sym else 'asymmetric'}, {kind.layers} layers"


def _tables(kinds: tuple[Kind, ...]) -> list[tuple[str, str]]:
    """Return what codes stand for, times the scale, by name of the grid, where that is one short table."""
    from llmq.grids import GRIDS, make_grid

    found = []
    for name, bits, sym in dict.fromkeys((kind.grid, kind.bits, kind.sym) for kind in kinds):
        tables = make_grid(name, bits, sym).tables if name in GRIDS else None
        if tables is not None and len(tables) == 1 and tables.shape[1] <= _SHORT:
            found.append((name, " ".join(f"{level:.4g}" for level in tables[0].unique().tolist())))
    return found


def _dense_table(found: Inventory) -> Table:
    title = "tensors" if found.packed is None else "what stayed dense"
    table = Table(
        title=title, title_justify="left", box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("name", overflow="fold")
    for name in ("count", "shape", "dtype", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in found.dense:
        shape = " x ".join(map(str, group.shape)) or "scalar"
        table.add_row(group.pattern, str(group.count), shape, group.dtype, human_bytes(group.bytes))
    return table
