"""Draw the levels of grids over a normal density, one picture per page of docs/grids: python scripts/plot_levels.py.

Needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from llmq.grids import make_grid
from llmq.types import Affine

FOLDER = Path(__file__).parents[1] / "docs" / "grids"
# page: title, grid, bits, symmetric, zero (which table), largest weight in σ
PAGES: dict[str, list[tuple[str, int, bool, float]]] = {
    "log": [("log", 4, True, 0), ("log", 8, True, 0)],
    "powers-of-two": [("pot", 4, True, 0), ("apot", 4, True, 0), ("apot", 5, True, 0)],
    "piecewise-linear": [("pwlq", 5, False, 11), ("pwlq_overlapping", 5, False, 11), ("uniform", 5, True, 16)],
    "small-floats": [("nf4", 4, True, 0), ("fp4", 4, True, 0), ("uniform", 4, True, 8)],
    "low-end": [("binary", 1, True, 0), ("ternary", 2, True, 0), ("residual_binary", 2, False, 9)],
}
LARGEST = {"binary": 0.8, "ternary": 1.2, "residual_binary": 1.51}  # of the outermost level, in σ; else 3


def levels_of(name: str, bits: int, symmetric: bool, zero: float) -> list[float]:
    """Return the levels of a grid, the outermost at the largest weight drawn, in σ."""
    grid = make_grid(name, bits, symmetric)
    codes = torch.arange(2**bits, dtype=torch.uint8)[None]
    values = grid.decode(codes, Affine(torch.ones(1, 1), torch.full((1, 1), zero)))[0]
    return [float(v) for v in (values / values.abs().max() * LARGEST.get(name, 3.0)).unique()]


def draw(page: str, path: Path) -> None:
    """Write the picture of one page."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "llmq", "svg.fonttype": "none"}  # the same small file every time
    rows = PAGES[page]
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(7, 0.9 * len(rows) + 0.4), sharex=True, squeeze=False)
    x = [i / 10 for i in range(-32, 33)]
    for axis, (name, bits, symmetric, zero) in zip(axes[:, 0], rows, strict=True):
        axis.fill_between(x, [math.exp(-v * v / 2) for v in x], color="0.88", linewidth=0)
        axis.vlines(levels_of(name, bits, symmetric, zero), 0, 1, color="C0", linewidth=0.9)
        axis.set_yticks([])
        axis.set_ylabel(f"{name} {bits}", rotation=0, ha="right", va="center")
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1, 0].set_xlabel("weight / standard deviation")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for page in sys.argv[1:] or PAGES:
        draw(page, FOLDER / f"{page}.svg")
