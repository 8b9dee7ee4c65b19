"""Columns and their groups where a file has them out of order: act-order with dynamic groups, an index per input.

Inside llmq groups are contiguous columns. A foreign file's columns are sorted by group as they are read, and put back
as they are written; `columns` says which input each of the sorted ones belongs to, and who multiplies permutes the
inputs by it: ``y = x[..., columns] @ Ŵᵀ``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import CheckpointError
from llmq.formats.stored import INDEX_DTYPES, group_columns
from llmq.types import QuantSpec


def by_group(g_idx: Tensor, spec: QuantSpec, name: str) -> Tensor:
    """Return int64 [K], the columns in the order of their groups `g_idx` [K], and within a group as they stood.

    Raises:
        CheckpointError: the groups are not of as many columns as `spec` says, except a short last one; `name` is what
            the message calls the tensor.
    """
    if g_idx.dim() != 1 or g_idx.dtype not in INDEX_DTYPES:
        raise CheckpointError(f"{name} is {g_idx.dtype} {list(g_idx.shape)}; expected torch.int32 with one size")
    k = len(g_idx)
    group_size = group_columns(spec, k)
    found, columns = torch.sort(g_idx.long(), stable=True)
    wanted = torch.arange(k, device=g_idx.device) // group_size
    wrong = (found != wanted).nonzero()
    if len(wrong):
        group = int(found[wrong[0, 0]])
        size = int((found == group).sum())
        raise CheckpointError(
            f"{name} puts {size} of {k} columns into group {group}; expected groups 0 to {int(wanted[-1])} "
            f"of {group_size} columns"
        )
    return columns


def is_in_order(columns: Tensor) -> bool:
    """Whether sorting has moved nothing."""
    return torch.equal(columns, torch.arange(len(columns), device=columns.device))


def back(codes: Tensor, columns: Tensor | None) -> Tensor:
    """Return `codes` [N, K] with each column where it was before it was sorted."""
    return codes if columns is None else codes[:, columns.argsort()]


def group_index(k: int, group_size: int, columns: Tensor | None, device: torch.device) -> Tensor:
    """Return int32 [K], the group of each input."""
    groups = torch.arange(k, dtype=torch.int32, device=device) // group_size
    return groups if columns is None else groups[columns.argsort()]
