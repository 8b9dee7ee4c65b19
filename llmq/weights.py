"""Quantized weights by their rows: stacked, divided, chosen from. Rows know nothing of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from llmq.grids.vq import VectorWeight
from llmq.types import Grid, QuantizedWeight


def stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return the weight whose rows are those of `weights`, which are on one grid and, of vectors, one codebook."""
    books = [w.codebook for w in weights if isinstance(w, VectorWeight)]
    assert all(torch.equal(book, books[0]) for book in books), "a linear layer on vectors is solved as a whole"
    levels = [w.levels for w in weights if w.levels is not None]
    return replace(
        weights[0],
        codes=torch.cat([w.codes for w in weights]),
        scales=torch.cat([w.scales for w in weights]),
        zeros=torch.cat([w.zeros for w in weights]),
        levels=torch.cat(levels) if levels else None,
    )


def select_rows(weight: QuantizedWeight, which: Tensor | slice) -> QuantizedWeight:
    """Return some rows of `weight`, by their numbers or a slice."""
    levels = None if weight.levels is None else weight.levels[which]
    codes, scales, zeros = weight.codes[which], weight.scales[which], weight.zeros[which]
    return replace(weight, codes=codes, scales=scales, zeros=zeros, levels=levels)


def chosen(take: Tensor, first: QuantizedWeight, second: QuantizedWeight) -> QuantizedWeight:
    """Return the rows of `first` where `take`, bool [N], says so, and of `second` elsewhere."""
    if isinstance(first, VectorWeight):
        assert bool(take.all()) or not bool(take.any()), "a linear layer on vectors is taken as a whole"
        return first if bool(take.all()) else second
    mine = take[:, None]
    levels = None
    if first.levels is not None and second.levels is not None:
        levels = torch.where(mine[:, :, None], first.levels, second.levels)
    return replace(
        first,
        codes=torch.where(mine, first.codes, second.codes),
        scales=torch.where(mine, first.scales, second.scales),
        zeros=torch.where(mine, first.zeros, second.zeros),
        levels=levels,
    )


def parts_of(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors of a weight by their names."""
    found = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def of_parts(parts: Mapping[str, Tensor], grid: Grid, group_size: int, in_features: int) -> QuantizedWeight:
    """Return the weight of `in_features` columns whose `parts_of` these are."""
    if "codebook" in parts:
        return VectorWeight(grid=grid, group_size=group_size, in_features=in_features, **parts)
    return QuantizedWeight(grid=grid, group_size=group_size, **parts)
