"""Formats: a quantized weight to the named tensors of somebody's file layout, and back.

A format is a module with the functions of `Format`, one file each. A row in `FORMATS` makes it known to recipes and
loaders and puts it under the tests that every format must pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from llmq.formats import auto_round, awq, compressed_tensors, gptq, llmq_layout
from llmq.formats.stored import Header, Read, Stored, TensorLayout
from llmq.types import QuantizedWeight, QuantSpec

__all__ = ["FORMATS", "METHODS", "Format", "Header", "Read", "Stored", "TensorLayout"]


class Format(Protocol):
    """What a module in this package provides."""

    marker: str  # local name of the tensor that every packed layer has: its codes
    parts: tuple[str, ...]  # local names that packed layers may have; no dense layer has the marker
    optional: tuple[str, ...]  # those that a file may lack
    index: str | None  # local name of what says where columns out of order belong; None: they have to be in order
    embeddings: bool  # whether loaders of the format take packed embeddings

    def refuses(self, spec: QuantSpec, out_features: int, in_features: int) -> str | None:
        """Return why a layer of this size cannot be stored, or None if it can."""
        ...

    def layout(self, spec: QuantSpec, out_features: int, in_features: int) -> TensorLayout:
        """Return shape and dtype of each tensor that `pack` makes of columns in order, by its local name."""
        ...

    def recognize(self, spec: QuantSpec, header: Header, read: Read) -> Stored:
        """Return the layer that a file with the tensors in `header` holds; small ones may have to be read."""
        ...

    def pack(self, weight: QuantizedWeight, spec: QuantSpec, columns: Tensor | None = None) -> dict[str, Tensor]:
        """Return the stored tensors by their local names; `columns` as below, of a weight from a foreign file."""
        ...

    def unpack(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
        """Return the weight that stored `tensors` hold, its columns sorted by group; the inverse of `pack`."""
        ...

    def columns(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor | None:
        """Return int64 [K], which input each column of the unpacked weight belongs to; None: they are in order."""
        ...

    def config(self, specs: Mapping[str, QuantSpec], dense: Sequence[str]) -> dict[str, object]:
        """Return config.json's quantization_config for these packed modules, and linears that stay dense."""
        ...

    def specs(self, config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, QuantSpec]:
        """Return what the quantization_config `config` says of each of the packed `modules`."""
        ...


FORMATS: dict[str, Format] = {
    "gptq": gptq,  # v1: stored zero = zero - 1
    "gptq_v2": gptq,  # v2: stored zero = zero
    "awq": awq,
    "compressed-tensors": compressed_tensors,  # one stream of bits, as since version 0.18
    "compressed-tensors-padded": compressed_tensors,  # whole codes per word, as before
    "auto-round": auto_round,  # gptq's tensors, version 1
    "auto-round-v2": auto_round,  # version 2
    "llmq": llmq_layout,  # our own
}

METHODS: dict[str, Format] = {  # by quant_method in config.json
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "auto-round": auto_round,
    "intel/auto-round": auto_round,  # as AutoRound 0.2 to 0.4 wrote it
    "llmq": llmq_layout,
}
