"""Exports: a packed folder as what another world reads, which keeps the same codes.

A format of `llmq.formats` says how one layer lies in a checkpoint folder; an export carries a whole model, tokenizer
included, to software that reads no such folders. A row in `EXPORTS` makes it known to `llmq convert`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmq.exports import gguf, onnx

if TYPE_CHECKING:
    from llmq.packed import PackedCheckpoint


class Export(Protocol):
    """What a module in this table provides."""

    def export(self, packed: PackedCheckpoint, output: str | Path) -> dict[str, str]:
        """Write `packed` to file or folder `output`, whole or not at all, and return the type of each tensor in it."""
        ...


EXPORTS: dict[str, Export] = {"gguf": gguf, "onnx": onnx}
