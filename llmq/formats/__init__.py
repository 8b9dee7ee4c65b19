"""Formats: a quantized weight to the named tensors of somebody's file layout, and back.

A format is a module with the functions of `Format`, one file each. A row in `FORMATS` makes it known to recipes and
loaders and puts it under the tests that every format must pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from llmq.formats import gptq
from llmq.types import QuantizedWeight, QuantSpec

TensorLayout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Format(Protocol):
    """What a module in this package provides."""

    def refuses(self, spec: QuantSpec, out_features: int, in_features: int) -> str | None:
        """Return why a layer of this size cannot be stored, or None if it can."""
        ...

    def layout(self, spec: QuantSpec, out_features: int, in_features: int) -> TensorLayout:
        """Return shape and dtype of each stored tensor by its local name."""
        ...

    def pack(self, weight: QuantizedWeight, spec: QuantSpec) -> dict[str, Tensor]:
        """Return the stored tensors by their local names."""
        ...

    def unpack(self, tensors: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
        """Return the weight that stored `tensors` hold; the inverse of `pack`."""
        ...

    def config(self, spec: QuantSpec) -> dict[str, object]:
        """Return the part of config.json's quantization_config that follows from `spec`."""
        ...


FORMATS: dict[str, Format] = {
    "gptq": gptq,  # v1: stored zero = zero - 1
    "gptq_v2": gptq,  # v2: stored zero = zero
}
