"""One quantization, other layouts: a packed folder is written again in another format, with the very same codes.

Layer by layer codes, scales and zeros are read, packed anew, written, read back from the disk and compared. Only when
all are equal does the output get its config.json. What the new format cannot hold as it is, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llmq.card import CARD, CERTIFICATE, Facts, architecture_of, card, card_in, packed_base_of, report_in
from llmq.checkpoint import LEGACY_CONFIG, QUANTIZATION, resolve, without_quantization
from llmq.errors import CheckpointError, LlmqError, SpecError
from llmq.exports import EXPORTS
from llmq.families import skeleton
from llmq.formats import FORMATS
from llmq.output import side_files
from llmq.packed import PackedCheckpoint
from llmq.places import banks_apart, dense_linears, placed
from llmq.preflight import model_config
from llmq.recipe import ASYMMETRIC
from llmq.report import REPORT
from llmq.types import QuantizedWeight, QuantSpec
from llmq.weights import parts_of
from llmq.writing import CheckpointWriter, Slot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE = "dense"  # no format: what the codes stand for, in a float dtype
_Read = Callable[[str], Tensor]


@dataclass
class Conversion:
    """What was written."""

    source: str
    format: str
    layers: int
    source_bytes: int  # of all tensors
    output_bytes: int
    rounded: dict[str, float] = field(default_factory=dict)  # by module, the largest relative change of a scale


def convert(
    source: str | Path,
    output: str | Path,
    format: str,
    *,
    allow_lossy: bool = False,
    shard_bytes: int = 4 * 10**9,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Conversion:
    """Write the packed folder `source` again as `format` into folder `output`, or file if it is an export.

    Args:
        source: a packed folder or a hub id.
        output: the folder or file to make.
        format: a row of `llmq.formats.FORMATS` or `llmq.exports.EXPORTS`, or ``dense`` for what the codes stand for,
            rounded to the dtype of the model. ``gptq`` becomes ``gptq_v2`` where a layer is asymmetric, and
            ``auto-round`` becomes ``auto-round-v2``.
        allow_lossy: round scales that the format's dtype does not hold as they are.
        shard_bytes: largest size of one output file.
        force: replace the checkpoint in `output`; not a file.
        progress: called with what is done (write, compare), how many layers of it, and how many there are.

    Raises:
        SpecError: the format cannot hold the layers as they are; says what would be lost.
        CheckpointError: `source` is not packed or damaged, or `output` cannot be written.
    """
    packed = PackedCheckpoint(resolve(source))
    if format in EXPORTS:
        return _export(packed, Path(output), format)
    target = _target(packed, format, allow_lossy=allow_lossy)
    owners = {key: module for module, layer in packed.layers.items() for key in layer.keys.values()}
    layout: dict[str, Slot] = {}
    for key in packed:  # the order of the source, so that a way there and back ends in the same files
        module = owners.get(key)
        info = packed.info(key)
        layout |= {key: Slot(info.shape, info.dtype)} if module is None else target.slots(module)
    done = Conversion(str(packed.path), target.format, len(packed.layers), 0, 0)
    done.source_bytes = _bytes(packed)
    done.output_bytes = sum(torch.Size(slot.shape).numel() * slot.dtype.itemsize for slot in layout.values())
    if Path(output).exists() and Path(output).samefile(packed.path):
        raise CheckpointError(f"{output}: is the folder to convert; choose another --output")
    with CheckpointWriter(output, force=force) as writer:
        try:
            writer.clear()
            writer.allocate(layout, shard_bytes)
            done.rounded = _write(packed, target, writer, progress)
            for number, module in enumerate(packed.layers):
                progress("compare", number, len(packed.layers))
                target.compare(module, writer.read)
            config, files = target.closing()
            writer.finish(config, {**files, CARD: _card(packed, target)}, _copies(packed))
        except BaseException:
            writer.discard()
            raise
    return done


def _export(packed: PackedCheckpoint, output: Path, format: str) -> Conversion:
    """Write one file, or a folder; see `convert`."""
    for module, spec in packed.specs.items():
        if spec.grid != "uniform":
            raise SpecError(
                f"{module}: {format} has equally spaced levels, not those of the {spec.grid} grid; use --dequantize"
            )
    EXPORTS[format].export(packed, output)
    files = output.iterdir() if output.is_dir() else [output]
    size = sum(file.stat().st_size for file in files)
    return Conversion(str(packed.path), format, len(packed.layers), _bytes(packed), size)


def _bytes(packed: PackedCheckpoint) -> int:
    """Return the bytes of all tensors."""
    return sum(packed.info(key).nbytes for key in packed)


def _write(
    packed: PackedCheckpoint, target: _Target, writer: CheckpointWriter, progress: Callable[[str, int, int], None]
) -> dict[str, float]:
    """Write all tensors; return by how much scales were changed, by module."""
    rounded: dict[str, float] = {}
    for number, module in enumerate(packed.layers):
        progress("write", number, len(packed.layers))
        tensors, change = target.tensors(module)
        if change:
            rounded[module] = change
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    for name in packed.dense:
        for start, rows in packed.pieces(name):
            writer.write(name, rows, start)
    writer.sync()
    return rounded


def _copies(packed: PackedCheckpoint) -> list[Path]:
    """Return the files to copy: tokenizer and the like, and the report of how the codes were made."""
    report = packed.path / REPORT
    copies = [path for path in side_files(packed)[0] if path.name not in (LEGACY_CONFIG, CERTIFICATE)]
    return [*copies, report] if report.is_file() else copies


def _card(packed: PackedCheckpoint, target: _Target) -> str:
    """Return the model card of what layers become, with what is known of how their codes were made."""
    specs = {} if target.format == DENSE else packed.specs
    facts = Facts(
        packed_base_of(card_in(packed.path)),
        architecture_of(packed.config),
        {module: replace(spec, format=target.format) for module, spec in specs.items()},
        {module: layer.shape for module, layer in packed.layers.items()},
        report=report_in(packed.path),
    )
    return card(facts, card_in(packed.path))


class _Target(Protocol):
    """What layers become."""

    format: str

    def slots(self, module: str) -> dict[str, Slot]:
        """Return the tensors of a layer in the output.

        Raises:
            SpecError: the format has none for such a layer.
        """
        ...

    def tensors(self, module: str) -> tuple[dict[str, Tensor], float]:
        """Return these tensors, and the largest relative change of a scale; errors as for `slots`."""
        ...

    def compare(self, module: str, read: _Read) -> None:
        """Check that what was written is what was meant.

        Raises:
            CheckpointError: it is not.
        """
        ...

    def closing(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return config.json, and other JSON files by name."""
        ...


def _target(packed: PackedCheckpoint, format: str, *, allow_lossy: bool) -> _Target:
    if format == DENSE:
        return _Dense(packed)
    if format not in FORMATS:
        raise SpecError(f"unknown format {format!r}; there are {', '.join([*FORMATS, *EXPORTS, DENSE])}")
    symmetric = all(spec.symmetric for spec in packed.specs.values())
    return _Packed(packed, format if symmetric else ASYMMETRIC.get(format, format), allow_lossy=allow_lossy)


class _Packed:
    """Layers in another format."""

    def __init__(self, packed: PackedCheckpoint, format: str, *, allow_lossy: bool) -> None:
        self.format = format
        self._packed = packed
        self._layout = FORMATS[format]
        self._allow_lossy = allow_lossy
        self._changed: dict[str, Tensor] = {}  # scales, where they are not those of the source

    def slots(self, module: str) -> dict[str, Slot]:
        """Return the tensors of a layer in the output; see `_Target`."""
        spec, (n, k) = self._spec(module), self._packed.layers[module].shape
        if refusal := self._layout.refuses(spec, n, k):
            raise SpecError(f"{module}: {refusal}")
        model, names = self._places
        if not self._layout.embeddings and isinstance(model.get_submodule(names[module]), nn.Embedding):
            raise SpecError(
                f"{module}: is a packed embedding, which {self.format} has no place for; use --format llmq, or "
                "--dequantize"
            )
        found = {name: Slot(*tensor) for name, tensor in self._layout.layout(spec, n, k).items()}
        if self._packed.columns(module) is not None:
            if self._layout.index is None:
                raise SpecError(f"{module}: has an index of groups (act-order), which {self.format} has no place for")
            found[self._layout.index] = Slot((k,), torch.int32)
        return {f"{module}.{name}": slot for name, slot in found.items()}

    def tensors(self, module: str) -> tuple[dict[str, Tensor], float]:
        """Return these tensors, and the largest relative change of a scale; see `_Target`."""
        spec = self._spec(module)
        weight, columns = self._packed.take(module)
        rounded = weight.scales.to(spec.scale_dtype).float()
        change = float(((rounded - weight.scales).abs() / weight.scales.abs()).nan_to_num(0.0).max())
        if change and not (self._allow_lossy and rounded.isfinite().all()):
            name = str(spec.scale_dtype).removeprefix("torch.")
            raise SpecError(
                f"{module}: {self.format} stores scales as {name}, which changes some of these by up to {change:.1e} "
                "of their size; pass --allow-lossy to round them, or choose a format with wider scales "
                "(compressed-tensors, llmq)"
            )
        if change:
            self._changed[module] = rounded
        try:
            tensors = self._layout.pack(replace(weight, scales=rounded), spec, columns)
        except LlmqError as error:
            raise SpecError(f"{module}: {error}") from error
        return {f"{module}.{name}": tensor for name, tensor in tensors.items()}, change

    def compare(self, module: str, read: _Read) -> None:
        """Check that what was written holds the same codes, scales and zeros; see `_Target`."""
        spec, local = self._spec(module), [name.removeprefix(f"{module}.") for name in self.slots(module)]
        tensors = {name: read(f"{module}.{name}") for name in local}
        there, order = self._layout.unpack(tensors, spec), self._layout.columns(tensors, spec)
        weight, columns = self._packed.take(module)
        expected = replace(weight, scales=self._changed.get(module, weight.scales))
        k = self._packed.layers[module].shape[1]
        if not _same(there, expected) or not torch.equal(_inputs(order, k), _inputs(columns, k)):
            raise CheckpointError(f"{module}: what was written is not what was read; this is a fault in llmq or a disk")

    def closing(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return config.json, and quantize_config.json where tools look for it; see `_Target`."""
        packed = self._packed
        model, names = self._places
        specs = {names[module]: self._spec(module) for module in packed.layers}
        quantization = self._layout.config(specs, dense_linears(model.config, specs))
        if isinstance(made := packed.quantization.get("meta"), dict):
            quantization["meta"] = made
        config = {**without_quantization(packed.config), QUANTIZATION: quantization}
        legacy = {LEGACY_CONFIG: quantization} if quantization["quant_method"] == "gptq" else {}
        return config, legacy

    @cached_property
    def _places(self) -> tuple[PreTrainedModel, dict[str, str]]:
        return _placed(self._packed)

    def _spec(self, module: str) -> QuantSpec:
        spec = self._packed.layers[module].stored.spec
        any_dtype = self.format.startswith(("compressed-tensors", "llmq"))
        dtype = spec.scale_dtype if any_dtype else torch.float16
        return replace(spec, format=self.format, scale_dtype=dtype)


class _Dense:
    """Layers as ordinary weights."""

    format = DENSE

    def __init__(self, packed: PackedCheckpoint) -> None:
        self._packed = packed
        floats = [packed.info(key) for key in packed.dense if packed.info(key).dtype.is_floating_point]
        self._dtype = max(floats, key=lambda info: info.nbytes).dtype if floats else torch.float16
        model, names = _placed(packed)
        self._transposed = {m for m, name in names.items() if _is_transposed(model.get_submodule(name))}

    def slots(self, module: str) -> dict[str, Slot]:
        """Return the tensors of a layer in the output; see `_Target`."""
        n, k = self._packed.layers[module].shape
        return {f"{module}.weight": Slot((k, n) if module in self._transposed else (n, k), self._dtype)}

    def tensors(self, module: str) -> tuple[dict[str, Tensor], float]:
        """Return these tensors; see `_Target`."""
        dense = self._packed.dequantized(module).to(self._dtype)
        return {f"{module}.weight": dense.T.contiguous() if module in self._transposed else dense}, 0.0

    def compare(self, module: str, read: _Read) -> None:
        """Check that what was written is the rounded weight; see `_Target`."""
        [(name, expected)] = self.tensors(module)[0].items()
        if not torch.equal(read(name), expected):
            raise CheckpointError(f"{module}: what was written is not what was read; this is a fault in llmq or a disk")

    def closing(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return config.json; see `_Target`."""
        return without_quantization(self._packed.config), {}


def _placed(packed: PackedCheckpoint) -> tuple[PreTrainedModel, dict[str, str]]:
    """Return the model, without weights, and the name in it of each packed module."""
    model = skeleton(model_config(packed), torch.float32)
    infos = {key: packed.info(key) for key in packed}
    banks_apart(model, infos)
    by_layer = {id(layer): name for name, layer in placed(model, infos, packed.layers).items()}
    return model, {module: by_layer[id(layer)] for module, layer in packed.layers.items()}


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weight as [K, N]."""
    return not isinstance(module, (nn.Linear, nn.Embedding))


def _inputs(columns: Tensor | None, k: int) -> Tensor:
    """Return which input each of `k` columns belongs to: some formats store an order that moves nothing."""
    return torch.arange(k) if columns is None else columns


def _same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Return whether two weights have the same codes, scales and zeros, and what else there is."""
    mine, other = parts_of(a), parts_of(b)
    same = a.group_size == b.group_size and mine.keys() == other.keys()
    return same and all(torch.equal(part, other[name]) for name, part in mine.items())
