"""Orders of the columns, from their definitions, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

WHOLE_GROUPS = ("natural", "group")


def visit(h: Tensor, order: str, group_size: int) -> list[int]:
    """Return the columns in the order `order`; of equals the earlier one first."""
    columns, energy = list(range(len(h))), h.diagonal().double().tolist()
    if order == "natural":
        return columns
    if order == "act":
        return sorted(columns, key=lambda j: (-energy[j], j))
    if order == "group":
        groups = [columns[at : at + group_size] for at in range(0, len(h), group_size)]
        groups.sort(key=lambda group: -max(energy[j] for j in group))
        return [j for group in groups for j in sorted(group, key=lambda j: (-energy[j], j))]
    assert order == "pivot"
    return minimum_pivots(h)[0]


def minimum_pivots(h: Tensor) -> tuple[list[int], float]:
    """Return the columns and the least relative gap by which a column was preferred to all others.

    From the back, always the column with the least energy given those behind it, ``h_jj - h_jS H_SS⁻¹ h_Sj``.
    """
    h = h.double() + 0.01 * h.diagonal().double().mean() * torch.eye(len(h), dtype=torch.float64)
    behind: list[int] = []
    gap = float("inf")
    while len(behind) < len(h):
        left = [j for j in range(len(h)) if j not in behind]
        inverse = torch.linalg.inv(h[behind][:, behind])
        energy = torch.stack([h[j, j] - h[j, behind] @ inverse @ h[behind, j] for j in left])
        two = energy.sort().values[:2]
        gap = min(gap, ((two[-1] - two[0]) / two[0]).item()) if len(left) > 1 else gap
        behind.insert(0, left[int(energy.argmin())])
    return behind, gap
