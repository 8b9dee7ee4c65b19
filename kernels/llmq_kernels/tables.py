"""Which kernel and which tile sizes for how many tokens: one JSON file per family of GPUs, in configs/.

Nothing is tried out while serving: a table is read once, and a token count picks its row. `scripts/tune_kernels.py`
writes the tables, `scripts/sass_report.py` compiles every row of them. "timed" in a file names the GPU that its rows
were timed on; where it is null they come from the machine code alone (docs/kernels.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from llmq_kernels import launch

FOLDER = Path(__file__).parent / "configs"

# By compute capability; what is not listed takes the default. GPUs for graphics (8.6, 8.9, 12.x) are alike: mma.sync,
# 99 KB of shared memory, and many instructions per byte that they read.
FAMILIES = {
    (7, 5): "turing",
    (8, 0): "ampere",
    (8, 6): "ada",
    (8, 7): "ampere",
    (8, 9): "ada",
    (9, 0): "hopper",
    (10, 0): "blackwell",
    (10, 3): "blackwell",
    (12, 0): "ada",
    (12, 1): "ada",
}


@dataclass(frozen=True)
class Few:
    """Sizes of the kernel for a handful of tokens, for one range of M."""

    max_m: int  # the last M that it is for, at most 4
    block_n: int
    num_warps: int


@dataclass(frozen=True)
class Tile:
    """Sizes of the kernel that multiplies tiles, for one range of M.

    A block_n of 64 is the least that wgmma takes on the left; small tiles for few tokens make more programs. Scaling
    partial sums at a block_m of 128 spilled 544 bytes.
    """

    max_m: int  # the last M that it is for; the last row of a table takes any M
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    post_scale: bool  # scale the float32 partial sums (else each weight, rounding it to 16 bits)


@dataclass(frozen=True)
class Table:
    """What runs for how many tokens: `few` up to its last M, the dense product from `many_from` on, tiles between."""

    few: tuple[Few, ...]  # by increasing max_m, perhaps none
    tiles: tuple[Tile, ...]  # by increasing max_m, perhaps none
    many_from: int

    def pick(self, m: int, dtype: torch.dtype) -> Few | Tile | None:
        """Return the row for M tokens of `dtype`; None: dequantize, and multiply densely."""
        if m >= self.many_from:
            return None
        found = next((few for few in self.few if m <= few.max_m), None)
        return found or self.tile(m, dtype)

    def tile(self, m: int, dtype: torch.dtype) -> Tile:
        """Return the row of the tiles for M tokens of `dtype`."""
        # Without tensor cores, float32 spills kilobytes at the larger tiles.
        tiles = self.tiles if dtype.itemsize == 2 else self.tiles[:2]
        return next((tile for tile in tiles if m <= tile.max_m), tiles[-1])


def family(capability: tuple[int, int] | None) -> str:
    """Return the name of the table for a GPU of this compute capability; "default" for None and what is unknown."""
    return "default" if capability is None else FAMILIES.get(capability, "default")


@lru_cache
def read(name: str, kernel: str) -> Table:
    """Return the table of `kernel`, such as w4a16, in the file of family `name`."""
    found = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))[kernel]
    few = tuple(Few(**row) for row in found["few"])
    tiles = tuple(Tile(**row) for row in found["tiles"])
    return Table(few, tiles, found["many_from"])


def for_device(kernel: str, device: torch.device) -> Table:
    """Return the table of `kernel` for `device`."""
    return read(family(launch.capability(device)), kernel)
