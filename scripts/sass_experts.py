"""The grouped kernel of experts, as `sass_report` compiles it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ROWS = {"experts alone": 0, "experts 16": 0, "experts 32": 1, "experts 64": 2, "experts 128": 3}  # of the table
EXPERTS, PARTS, SLOTS = 128, 2, 8  # gate and up of a large mixture


def cases(kernel: str) -> Iterator[tuple[int, str, str, bool, str]]:
    """Yield architecture, dtype, columns, zeros and row: the loop is that of the tiles, so a cross-section."""
    for arch in (80, 86, 89, 90, 100, 120):
        kinds = [("bf16", "g128", True)]
        if kernel != "w2a16":
            kinds.append(("bf16", "ragged", True))
        if arch in (80, 90) and kernel != "w2a16":
            kinds += [("bf16", "g32", True), ("fp16", "g128", False)]
        yield from ((arch, *kind, row) for kind in kinds for row in ROWS)


def kernel(layout: Any, table: Any, row: str, dtype: Any, k: int, group_size: int) -> tuple[Any, dict[str, Any], Any]:
    """Return the kernel, its constants, and the row of `table` that they are made of."""
    import torch

    from llmq_kernels import grouped
    from llmq_kernels.layout import Packed

    tile = table.tiles[ROWS[row]]
    operands = Packed(torch.empty(EXPERTS * PARTS, 0), torch.empty(0))
    experts = grouped.Experts(layout, operands, PARTS, 4096, k, group_size)
    return grouped.grouped_kernel, grouped.constants(experts, tile, dtype, SLOTS, row == "experts alone"), tile
