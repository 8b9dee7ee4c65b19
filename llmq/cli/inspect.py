"""``llmq inspect``: what a checkpoint folder holds, from its config.json and the headers of its files alone."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from llmq.cli.tables import facts, human_bytes, show, show_json
from llmq.errors import CheckpointError

if TYPE_CHECKING:
    from llmq.checkpoint import CheckpointReader

_PACKED_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_VERSIONS = {"gptq": 1, "gptq_v2": 2}


@dataclass(frozen=True)
class Packed:
    """The quantized layers of a checkpoint."""

    format: str  # quant_method in config.json
    version: int  # of the gptq layout: 1 stores zero - 1, 2 stores zero
    bits: int
    group_size: int
    sym: bool | None  # None where config.json does not say
    desc_act: bool | None
    layers: int
    weights: int  # how many numbers the layers stand for
    bytes: int  # all tensors of the layers: codes, scales, zeros, group indices
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Show bits, group size, format and bytes of a checkpoint, and what stayed dense, without loading it."""
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

    reader = CheckpointReader(resolve(directory))
    names = reader.keys()
    modules = sorted(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))
    members = {f"{module}.{part}" for module in modules for part in _PACKED_PARTS}
    dense = _group_dense(reader, [name for name in names if name not in members])
    files = {reader.info(name).file for name in names}
    return Inventory(
        path=str(reader.path),
        model_type=str(reader.config.get("model_type", "unknown")),
        packed=_packed(reader, modules, members & set(names)),
        dense=dense,
        dense_bytes=sum(group.bytes for group in dense),
        total_bytes=sum(reader.info(name).nbytes for name in names),
        disk_bytes=sum((reader.path / file).stat().st_size for file in files),
    )


def _packed(reader: CheckpointReader, modules: list[str], members: set[str]) -> Packed | None:
    if reader.config.get("quantization_config") is None and not modules:
        return None
    config = _checked_config(reader, modules)
    bits = config["bits"]
    shapes = [reader.info(f"{module}.qweight").shape for module in modules]
    weights = sum(rows * 32 // bits * columns for rows, columns in shapes)
    size = sum(reader.info(name).nbytes for name in members)
    return Packed(
        format="gptq",
        version=_VERSIONS[_layout(config)],
        bits=bits,
        group_size=config.get("group_size", -1),
        sym=config.get("sym"),
        desc_act=config.get("desc_act"),
        layers=len(modules),
        weights=weights,
        bytes=size,
        bits_per_weight=8 * size / weights,
    )


def _checked_config(reader: CheckpointReader, modules: list[str]) -> dict[str, Any]:
    """Return the quantization_config of the folder after checking that it fits the packed `modules`."""
    where = f"{reader.path / 'config.json'}: quantization_config"
    config = reader.config.get("quantization_config")
    if config is None:
        raise CheckpointError(f"{where} is missing, but {len(modules)} layers are packed, {modules[0]} for one")
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} is not an object but {config!r}; the file is damaged")
    method, layout, bits = config.get("quant_method"), _layout(config), config.get("bits")
    if method != "gptq" or layout not in _VERSIONS:
        raise CheckpointError(
            f"{where} says {method!r}, format {layout!r}; llmq reads gptq in formats {', '.join(_VERSIONS)}"
        )
    if not isinstance(bits, int) or not 1 <= bits <= 32:
        raise CheckpointError(f"{where} has bits {bits!r}; expected a number such as 4")
    if not modules:
        raise CheckpointError(f"{where} says gptq, but no tensor is named *.qweight; the folder is incomplete")
    for module in modules:
        shape = reader.info(f"{module}.qweight").shape
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{reader.path}: {module}.qweight has shape {list(shape)}; expected two sizes")
    return config


def _layout(config: dict[str, Any]) -> str:
    return str(config.get("checkpoint_format") or config.get("format") or "gptq")


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
        grid = {True: "symmetric", False: "asymmetric", None: "not stated"}[packed.sym]
        order = {True: "yes", False: "no", None: "not stated"}[packed.desc_act]
        rows += [
            ("format", f"{packed.format}, version {packed.version}"),
            ("bits", packed.bits),
            ("group size", "-1 (one scale per output)" if packed.group_size == -1 else packed.group_size),
            ("grid", grid),
            ("desc_act", order),
            ("packed layers", packed.layers),
            ("packed bytes", f"{packed.bytes} ({human_bytes(packed.bytes)})"),
            ("bits per packed weight", f"{packed.bits_per_weight:.3f}, with scales, zeros and indices"),
        ]
    return [
        *rows,
        ("dense bytes", f"{found.dense_bytes} ({human_bytes(found.dense_bytes)})"),
        ("total bytes", f"{found.total_bytes} ({human_bytes(found.total_bytes)})"),
    ]


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
