"""A packed checkpoint folder of any known format, read layer by layer: codes, scales and zeros, whoever wrote them.

Which layers are packed is read from the headers of the files; what they look like, from config.json. Both must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint import CONFIG, CheckpointReader, TensorInfo
from llmq.errors import CheckpointError, LlmqError
from llmq.formats import FORMATS, METHODS, Format, Stored
from llmq.types import QuantizedWeight, QuantSpec


@dataclass(frozen=True)
class PackedLayer:
    """One packed layer, and what its tensors are called in the files."""

    stored: Stored
    keys: dict[str, str]  # by local name

    @property
    def format(self) -> Format:
        """Its layout."""
        return FORMATS[self.stored.spec.format]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.stored.out_features, self.stored.in_features


class PackedCheckpoint(CheckpointReader):
    """A packed folder, opened: `layers` by the names of their modules in the files, and the names of all other tensors.

    Raises:
        CheckpointError: it is not packed, or in a way that llmq does not read, or not whole.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.quantization = quantization_of(self.config, f"{self.path / CONFIG}: ")
        try:
            self.layers = packed_layers(self.quantization, self._infos, self.read)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        owned = {key for layer in self.layers.values() for key in layer.keys.values()}
        self.dense = [key for key in self if key not in owned]

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """What each packed module looks like."""
        return {module: layer.stored.spec for module, layer in self.layers.items()}

    def weight(self, module: str) -> QuantizedWeight:
        """Return the weight of a packed module; `columns` says to which inputs its columns belong.

        Raises:
            CheckpointError: its tensors do not fit each other.
        """
        return self.take(module)[0]

    def columns(self, module: str) -> Tensor | None:
        """Return which input each column of `weight` belongs to, int64 [K]; None: they are in order."""
        layer = self.layers[module]
        index = {local: self.read(key) for local, key in layer.keys.items() if local == layer.format.index}
        try:
            return layer.format.columns(index, layer.stored.spec)
        except LlmqError as error:
            raise CheckpointError(f"{self.path}: {module}: {error}") from error

    def dequantized(self, module: str) -> Tensor:
        """Return what a packed module stands for, float32 [N, K], its columns those of the inputs."""
        weight, columns = self.take(module)
        dense = weight.dequantize()
        return dense if columns is None else dense[:, columns.argsort()]

    def take(self, module: str) -> tuple[QuantizedWeight, Tensor | None]:
        """Return what `weight` and `columns` do, from one reading."""
        layer = self.layers[module]
        tensors = {local: super(PackedCheckpoint, self).read(key) for local, key in layer.keys.items()}
        try:
            spec = layer.stored.spec
            return layer.format.unpack(tensors, spec), layer.format.columns(tensors, spec)
        except LlmqError as error:
            raise CheckpointError(f"{self.path}: {module}: {error}") from error


def quantization_of(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return the quantization_config in a config.json, or in that of the text model inside; `where` begins errors.

    Raises:
        CheckpointError: there is none, or it names a method that llmq does not read.
    """
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if found is None:
        raise CheckpointError(f"{where}quantization_config is missing: nothing is packed; give a packed folder")
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}quantization_config is not an object but {found!r}; the file is damaged")
    method = found.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise CheckpointError(f"{where}quantization_config says {method!r}; llmq reads {', '.join(METHODS)}")
    return found


def packed_layers(
    config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]
) -> dict[str, PackedLayer]:
    """Return the packed layers of files, by the names of their modules there.

    Args:
        config: a quantization_config of a known method.
        infos: the headers of the files.
        read: returns a tensor; small ones are asked for.

    Raises:
        CheckpointError: configuration and headers contradict each other, or a tensor is missing.
    """
    method = METHODS[config["quant_method"]]
    ending = f".{method.marker}"
    modules = [key.removesuffix(ending) for key in infos if key.endswith(ending)]
    if not modules:
        raise CheckpointError(
            f"config.json says {config['quant_method']}, but no tensor is named *{ending}; the folder is incomplete"
        )
    known = set(modules)
    for key in infos:
        module, _, local = key.rpartition(".")
        if local in method.parts and module not in known:
            raise CheckpointError(f"packed tensor {key} is there, but no {module}{ending}; files are missing")
    layers: dict[str, PackedLayer] = {}
    for module, spec in method.specs(config, modules).items():
        format = FORMATS[spec.format]
        header = {local: infos[f"{module}.{local}"] for local in format.parts if f"{module}.{local}" in infos}
        shapes = {local: (info.shape, info.dtype) for local, info in header.items()}
        try:
            stored = format.recognize(spec, shapes, lambda local, module=module: read(f"{module}.{local}"))  # type: ignore[misc]
        except LlmqError as error:
            raise CheckpointError(f"{module}: {error}") from error
        layers[module] = PackedLayer(stored, {local: f"{module}.{local}" for local in stored.layout})
    return layers
