"""``llmq inspect --plot``: the weights of one layer, and where the levels of grids lie among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import CheckpointError, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.checkpoint import CheckpointReader

_SAMPLE = 2**16  # weights that grids are placed by
_GROUP = 128  # columns, where nothing says how many
_BITS = 4


def draw_layer(directory: str, layer: str, file: Path, grids: Sequence[str] | None, against: str | None) -> None:
    """Draw a histogram of the weights of `layer` in checkpoint `directory`, and the levels of grids below it.

    Each weight is divided by the largest magnitude in its group, and the levels are those that a grid would have for
    all of them as one group. A packed layer has a grid, bits and groups of its own; its weights are what its codes
    stand for, or with `against` those of the checkpoint that it was made from.

    Args:
        directory: checkpoint folder or hub id, packed or dense.
        layer: name of its module.
        file: the picture to make.
        grids: names; None: the packed layer's own, or all that have levels of 4 bits.
        against: checkpoint folder or hub id of the original.

    Raises:
        SpecError: an unknown grid, or no picture can be drawn into `file`.
        CheckpointError: there is no such layer.
    """
    from llmq.checkpoint import CheckpointReader, resolve
    from llmq.cli.plots import check_plots, plot_levels
    from llmq.grids import GRIDS
    from llmq.packed import PackedCheckpoint

    check_plots([file])
    if unknown := [name for name in grids or () if name not in GRIDS]:
        raise SpecError(f"unknown grid {unknown[0]!r}; there are {', '.join(GRIDS)}")
    reader = CheckpointReader(resolve(directory))
    bits, group, wanted = _BITS, _GROUP, list(grids or ())
    if reader.config.get("quantization_config") is not None:
        packed = PackedCheckpoint(reader.path)
        if layer not in packed.layers:
            raise CheckpointError(
                f"{directory}: no packed layer is called {layer!r}; one is {next(iter(packed.layers))}"
            )
        stored = packed.layers[layer].stored
        bits, group = stored.spec.bits, stored.spec.group_columns(stored.in_features)
        wanted = wanted or [stored.spec.grid]
        w = packed.dequantized(layer) if against is None else _dense(CheckpointReader(resolve(against)), layer)
    else:
        w = _dense(reader, layer)
    wanted = wanted or [name for name, row in GRIDS.items() if bits in row.bits]
    w = _in_groups(w, group)
    levels = {name: _levels(name, bits, w) for name in wanted if name in GRIDS and bits in GRIDS[name].bits}
    if not levels:
        raise SpecError(f"{', '.join(wanted)}: no levels to draw at {bits} bits; name others with --grids")
    plot_levels(w, levels, f"{layer}, {bits} bits", [file])


def _dense(reader: CheckpointReader, layer: str) -> Tensor:
    """Return the weight of a dense layer, float32 [N, K]."""
    name = f"{layer}.weight"
    if name not in reader or len(reader.info(name).shape) != 2:
        some = next((key for key in reader if key.endswith("_proj.weight")), "none")
        raise CheckpointError(f"{reader.path}: no matrix is called {name}; one is {some}")
    return reader.read(name).float()


def _in_groups(w: Tensor, group: int) -> Tensor:
    """Return the weights, each over the largest magnitude in its group, flat; groups of zeros are left out."""
    import torch

    parts = [part / part.abs().amax(dim=1, keepdim=True) for part in w.split(group, dim=1)]
    flat = torch.cat([part.flatten() for part in parts])
    return flat[flat.isfinite()]


def _levels(name: str, bits: int, w: Tensor) -> Tensor:
    """Return the levels that the grid has for weights `w`, rising."""
    import torch

    from llmq.grids import GRIDS, make_grid

    sample = w[:: max(1, len(w) // _SAMPLE)][None]
    grid = make_grid(name, bits, GRIDS[name].symmetric[0]).adapted(sample)
    codes = torch.arange(2**grid.bits, dtype=torch.uint8)[None]
    levels: Tensor = grid.decode(codes, grid.fit(sample))[0].unique()
    return levels
