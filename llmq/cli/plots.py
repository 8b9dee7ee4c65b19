"""Pictures: quality against size, and where the levels of grids lie among the weights of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.cli.compare import Row

ENDINGS = (".png", ".svg", ".pdf")
_MARKERS = "osD^vPX*<>hp"


def check_plots(files: Sequence[Path]) -> None:
    """Check, before any work, that pictures can be drawn into `files`.

    Raises:
        SpecError: matplotlib is missing, or a name says no kind of picture, or its folder is not there.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise SpecError("--plot needs matplotlib; install it with: pip install 'llmq[plot]'")
    for file in files:
        if file.suffix.lower() not in ENDINGS:
            raise SpecError(f"--plot {file}: the name has to end in {', '.join(ENDINGS)}")
        if not file.parent.is_dir():
            raise SpecError(f"--plot {file}: there is no folder {file.parent}; make it first")


def plot_rows(rows: Sequence[Row], title: str, files: Sequence[Path]) -> None:
    """Draw KL and perplexity of `rows` against bits per weight into each of `files`; those that failed are left out."""
    found = [row for row in rows if row.outcome.results and row.outcome.bits_per_weight is not None]
    kinds = list(dict.fromkeys((row.combination.grid, row.combination.solver) for row in found))
    several = len({solver for _, solver in kinds}) > 1
    figure, (left, right) = _figure(2, (11, 4.8))
    for number, kind in enumerate(kinds):
        own = [row for row in found if (row.combination.grid, row.combination.solver) == kind]
        own.sort(key=lambda row: (row.combination.bits, row.outcome.bits_per_weight))
        sizes = [row.outcome.bits_per_weight for row in own]
        results = [row.outcome.results[0] for row in own]
        marker, name = _MARKERS[number % len(_MARKERS)], " ".join(kind) if several else kind[0]
        style: dict[str, Any] = {"marker": marker, "linestyle": "none", "label": name, "markersize": 5}
        kl = [result.kl for result in results]
        intervals = [result.kl_interval or (result.kl, result.kl) for result in results]
        low = [max(value - interval[0], 0.0) for value, interval in zip(kl, intervals, strict=True)]
        high = [interval[1] - value for value, interval in zip(kl, intervals, strict=True)]
        left.errorbar(sizes, kl, yerr=[low, high], capsize=2, **style)
        right.plot(sizes, [result.packed.ppl for result in results], **style)
    _draw_front(left, found)
    if found:
        right.axhline(found[0].outcome.results[0].original.ppl, color="gray", linewidth=0.8, label="original")
        left.set_yscale("log")
    left.set_ylabel("KL(original || packed), nats per token")
    right.set_ylabel("perplexity")
    for axes in (left, right):
        axes.set_xlabel("bits per packed weight, everything counted")
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    _save(figure, title, files)


def _draw_front(axes: Any, rows: Sequence[Row]) -> None:
    """Draw the line through the rows that no other beats."""
    points = sorted((row.outcome.bits_per_weight or 0.0, row.outcome.results[0].kl) for row in rows if row.on_front)
    axes.step([x for x, _ in points], [y for _, y in points], where="post", color="black", linewidth=0.8, zorder=0)


def plot_levels(weights: Tensor, levels: Mapping[str, Tensor], title: str, files: Sequence[Path]) -> None:
    """Draw a histogram of `weights`, in units of their groups' largest magnitudes, and each grid's levels below it.

    Args:
        weights: any shape, of magnitude 1 at most.
        levels: by name of the grid, its levels in the same units, [L] each.
        title: of the picture.
        files: where to draw it.
    """
    figure, (top, bottom) = _figure(1, (9, 3.2 + 0.28 * len(levels)), rows=2, heights=(3, 0.4 + 0.35 * len(levels)))
    top.hist(weights.flatten().numpy(), bins=201, density=True, color="tab:blue", alpha=0.6)
    top.set_ylabel("density of weights")
    for number, own in enumerate(levels.values()):
        places = own.numpy()
        bottom.vlines(places, number - 0.35, number + 0.35, color="black", linewidth=0.9)
        top.vlines(places, 0, top.get_ylim()[1] * 0.03, color="black", linewidth=0.5, alpha=0.4)
    bottom.set_yticks(range(len(levels)), list(levels))
    bottom.set_ylim(len(levels) - 0.4, -0.6)
    bottom.set_xlabel("weight, in units of its group's largest magnitude")
    bottom.sharex(top)
    _save(figure, title, files)


def _figure(columns: int, size: tuple[float, float], rows: int = 1, heights: tuple[float, ...] = (1,)) -> Any:
    """Return a figure without a window, and its axes; the same input makes the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "llmq"
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, height_ratios=heights, layout="constrained")


def _save(figure: Any, title: str, files: Sequence[Path]) -> None:
    from matplotlib import pyplot

    figure.suptitle(title)
    for file in files:
        metadata = {"Date": None} if file.suffix.lower() == ".svg" else None
        figure.savefig(file, dpi=150, metadata=metadata)
    pyplot.close(figure)
