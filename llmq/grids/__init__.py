"""Grids: real numbers to codes and back.

A grid is a frozen dataclass with `fit`, `encode` and `decode` (`llmq.types.Grid`), one file each. A row in `GRIDS`
makes it known to recipes and puts it under the tests that every grid must pass.
"""

from __future__ import annotations

from collections.abc import Callable

from llmq.grids.uniform import UniformGrid
from llmq.types import Grid

GRIDS: dict[str, Callable[..., Grid]] = {  # name -> grid of (bits, symmetric) and options of its own
    "uniform": UniformGrid,
}
