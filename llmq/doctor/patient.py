"""A packed folder, opened by someone who expects it to be damaged: what can be read is read, the rest is kept apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint import CONFIG, INDEX, STAGING, TensorInfo, read_from, read_json, tensor_infos
from llmq.doctor.anatomy import Anatomy, anatomy_of
from llmq.doctor.measures import Measures, measure
from llmq.errors import CheckpointError, LlmqError
from llmq.formats import FORMATS, METHODS, Format, Header, Stored
from llmq.grids.vq import VECTORS
from llmq.packed import quantization_of
from llmq.types import QuantSpec

_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class Layer:
    """A packed layer as far as it can be understood."""

    module: str
    spec: QuantSpec
    header: Header  # of the tensors that are there
    stored: Stored | None  # None: they do not fit
    problem: str  # why not


class Patient:
    """A packed folder; attributes hold what was found, `layers` by module.

    Raises:
        CheckpointError: it is no checkpoint, nothing in it is packed, or a file cannot be read at all.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG).is_file():
            unfinished = "; it holds an unfinished run" if (self.path / STAGING).is_dir() else ""
            raise CheckpointError(f"{self.path}: not a checkpoint, it has no {CONFIG}{unfinished}")
        self.config = read_json(self.path / CONFIG)
        self.quantization = quantization_of(self.config, f"{self.path / CONFIG}: ")
        self.index = self._index()
        self.infos: dict[str, TensorInfo] = {}
        self.files: dict[str, list[str]] = {}  # shards by tensor
        for name in self._shards():
            for key, info in tensor_infos([self.path / name]).items():
                self.infos.setdefault(key, info._replace(file=name))
                self.files.setdefault(key, []).append(name)
        self.refusal: str | None = None  # what llmq has against the configuration
        self.layers = self._layers()
        self._measured: dict[str, Measures | None] = {}

    @property
    def method(self) -> Format:
        """The layout that the configuration names."""
        return METHODS[self.quantization["quant_method"]]

    @cached_property
    def modules(self) -> list[str]:
        """Names of the packed modules."""
        ending = f".{self.method.marker}"
        return [key.removesuffix(ending) for key in self.infos if key.endswith(ending)]

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self.infos)

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or `rows` of its first dimension.

        Raises:
            CheckpointError: it cannot be read.
        """
        info = self.infos[key]
        return read_from({key: info._replace(file=str(self.path / info.file))}, key, rows)

    @cached_property
    def anatomy(self) -> Anatomy | str:
        """What the model of config.json needs, or why transformers has none."""
        return anatomy_of(self)

    def measures(self, module: str) -> Measures | None:
        """Return statistics of a sample of a layer of single weights, or None if it cannot be read."""
        if module not in self._measured:
            layer = self.layers[module]
            found = None
            if layer.stored is not None and layer.spec.grid not in VECTORS:  # `vectors` looks at those
                try:
                    found = measure(layer.stored, lambda local, rows=None: self.read(f"{module}.{local}", rows))
                except LlmqError:  # said by `damaged_layers`
                    found = None
            self._measured[module] = found
        return self._measured[module]

    def _index(self) -> dict[str, Any] | None:
        return read_json(self.path / INDEX) if (self.path / INDEX).is_file() else None

    @property
    def weight_map(self) -> dict[str, str]:
        """What the index says, as far as it says something."""
        found = (self.index or {}).get("weight_map")
        return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}

    def _shards(self) -> list[str]:
        """Return the names of all files that hold the model."""
        there = sorted(path.name for path in self.path.glob("*.safetensors") if path.is_file())
        named = set(self.weight_map.values())
        found = [name for name in there if name in named or _SHARD.fullmatch(name)] or there
        if not found:
            raise CheckpointError(f"{self.path}: no .safetensors file")
        return found

    def _layers(self) -> dict[str, Layer]:
        if not self.modules:
            raise CheckpointError(
                f"{self.path}: config.json says {self.quantization['quant_method']}, but no tensor is named "
                f"*.{self.method.marker}; nothing is packed, or in another layout"
            )
        found = {}
        for module, spec in self._specs().items():
            format = FORMATS[spec.format]
            infos = {local: self.infos.get(f"{module}.{local}") for local in format.parts}
            header = {local: (info.shape, info.dtype) for local, info in infos.items() if info is not None}
            stored, problem = None, ""
            try:
                stored = format.recognize(spec, header, lambda local, module=module: self.read(f"{module}.{local}"))  # type: ignore[misc]
            except LlmqError as error:
                problem = str(error)
            found[module] = Layer(module, spec, header, stored, problem)
        return found

    def _specs(self) -> dict[str, QuantSpec]:
        """Return what the configuration says of the modules, or what is left of it without the parts that clash."""
        try:
            return self.method.specs(self.quantization, self.modules)
        except LlmqError as error:
            self.refusal = str(error)
        try:
            return self.method.specs(plain(self.quantization), self.modules)
        except LlmqError:  # `unreadable` says why
            return {}


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a quantization_config without what it says of single modules, and with one label of its version."""
    left = {"dynamic", "modules_in_block_to_quantize", "ignore", "sparsity_config", "kv_cache_scheme"}
    left |= {"extra_config", "block_name_to_quantize", "to_quant_block_names"}
    found = {key: value for key, value in config.items() if key not in left}
    if config["quant_method"] == "gptq" and "checkpoint_format" in found:
        found.pop("format", None)
    if config["quant_method"] == "compressed-tensors":
        found["quantization_status"] = "compressed"
    return found
