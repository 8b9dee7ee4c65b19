"""GPTAQ (Li et al. 2025, arXiv 2504.02692) in float64: the inverse, its factor and P, one column after another."""

from __future__ import annotations

import torch
from gptq_reference import Trace, _Groups, damped, sweep_columns
from order_reference import WHOLE_GROUPS, visit
from torch import Tensor


def gptaq_columns(
    w: Tensor,
    h: Tensor,
    cross: Tensor,
    alpha: float,
    bits: int,
    symmetric: bool,
    group_size: int,
    damp_percent: float,
    order: str,
) -> Trace:
    """Return what GPTAQ does to `w` [N, K]; `cross` = (X_fp - X) Xᵀ on the scale of `h`."""
    columns = visit(h, order, group_size)
    full, drift = damped(h, damp_percent)[columns][:, columns], cross.double()[columns][:, columns]
    inverse = torch.linalg.inv(full)
    u = torch.linalg.cholesky(inverse, upper=True)
    p = torch.zeros_like(full)
    for i in range(len(h) - 1):  # row i of α triu(D Uᵀ, 1) U, by what it means: least squares on the columns behind
        p[i, i + 1 :] = alpha * drift[i, i + 1 :] @ torch.linalg.inv(full[i + 1 :, i + 1 :])
    sweep = _Groups(w.double(), bits, symmetric, group_size, order not in WHOLE_GROUPS)
    return sweep_columns(sweep, columns, u, p)


def p_by_the_paper(h: Tensor, cross: Tensor, alpha: float) -> Tensor:
    """Return ``α triu(D Uᵀ, 1) U`` with ``H⁻¹ = Uᵀ U``, float64."""
    u = torch.linalg.cholesky(torch.linalg.inv(h.double()), upper=True)
    return alpha * (cross.double() @ u.T).triu(1) @ u
