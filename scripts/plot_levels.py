"""Draw the levels of grids over a normal density, one picture per page of docs/grids: python scripts/plot_levels.py.

Levels that are learned are those of weights drawn at random. Needs matplotlib (the extra `plot`).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from llmq.grids import make_grid
from llmq.types import Affine
from llmq.vectors.codebooks import first_codebook, learn, vectors_of
from llmq.vectors.metrics import plain

FOLDER = Path(__file__).parents[1] / "docs" / "grids"
# page: title, grid, bits, symmetric, zero (which table), largest weight in σ
PAGES: dict[str, list[tuple[str, int, bool, float]]] = {
    "log": [("log", 4, True, 0), ("log", 8, True, 0)],
    "powers-of-two": [("pot", 4, True, 0), ("apot", 4, True, 0), ("apot", 5, True, 0)],
    "piecewise-linear": [("pwlq", 5, False, 11), ("pwlq_overlapping", 5, False, 11), ("uniform", 5, True, 16)],
    "small-floats": [("nf4", 4, True, 0), ("fp4", 4, True, 0), ("uniform", 4, True, 8)],
    "codebooks": [("codebook", 2, True, 0), ("codebook", 3, True, 0), ("codebook", 4, True, 0)],
    "low-end": [("binary", 1, True, 0), ("ternary", 2, True, 0), ("residual_binary", 2, False, 9)],
}
VECTORS = {2: 16, 3: 64, 4: 256}  # bits of vq2: entries
SAMPLE = 2**16  # weights that levels are learned from
LARGEST = {"binary": 0.8, "ternary": 1.2, "residual_binary": 1.51}  # of the outermost level, in σ; else 3


def levels_of(name: str, bits: int, symmetric: bool, zero: float) -> list[float]:
    """Return the levels of a grid, the outermost at the largest weight drawn, in σ."""
    grid = make_grid(name, bits, symmetric)
    if grid.learns:
        return [float(level) for level in grid.fit(weights()[None]).levels[0, 0]]
    codes = torch.arange(2**bits, dtype=torch.uint8)[None]
    values = grid.decode(codes, Affine(torch.ones(1, 1), torch.full((1, 1), zero)))[0]
    return [float(v) for v in (values / values.abs().max() * LARGEST.get(name, 3.0)).unique()]


def weights() -> Tensor:
    """Return normal weights."""
    return torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0))


def entries_of(count: int) -> Tensor:
    """Return the vectors [count, 2] that are learned for normal weights."""
    pairs = weights().view(-1, 2)
    vectors = vectors_of(pairs, torch.ones(len(pairs), 1), plain(1, 2, 2, pairs.device))
    return learn(vectors, first_codebook(vectors, count))[0]


def draw_vectors(path: Path) -> None:
    """Write the picture of vectors of two weights."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(VECTORS), figsize=(7, 2.6), sharey=True)
    for axis, (bits, count) in zip(axes, VECTORS.items(), strict=True):
        for radius in (1, 2, 3):
            axis.add_patch(pyplot.Circle((0, 0), radius, fill=False, color="0.85"))
        axis.plot(*entries_of(count).T.tolist(), ".", color="C0", markersize=3)
        axis.set_title(f"vq2, {bits} bits", fontsize=10)
        axis.set_aspect("equal")
        axis.set(xlim=(-3.9, 3.9), ylim=(-3.9, 3.9))
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xlabel("first weight of a pair / standard deviation")
    axes[0].set_ylabel("second")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw(page: str, path: Path) -> None:
    """Write the picture of one page of grids of single weights."""
    from matplotlib import pyplot

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
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "llmq", "svg.fonttype": "none"}  # the same small file every time
    FOLDER.mkdir(parents=True, exist_ok=True)
    for page in sys.argv[1:] or [*PAGES, "vectors"]:
        path = FOLDER / f"{page}.svg"
        if page == "vectors":
            draw_vectors(path)
        else:
            draw(page, path)
