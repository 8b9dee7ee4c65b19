"""GPTQ: columns are rounded one after another, each correcting for the errors of those before it.

Frantar et al. 2022 (arXiv 2210.17323) in an inverse-free form; `llmq.solvers.sweep` has the arithmetic.
"""

from __future__ import annotations

from torch import Tensor

from llmq.solvers.sweep import sweep
from llmq.types import Grid, Solution


def gptq(
    w: Tensor,
    h: Tensor,
    grid: Grid,
    group_size: int,
    *,
    damp_percent: float = 0.01,
    order: str = "act",
    scale_search: str = "none",
    search_norm: float = 2.0,
) -> Solution:
    """Return codes that minimize ``tr(E H Eᵀ)`` greedily, column by column.

    Groups are always contiguous original columns. Where the order leaves them whole (natural, group), each is placed
    by its weights as they stand when the sweep reaches it, earlier errors compensated. Otherwise (act, pivot) they are
    placed beforehand and the order changes only who compensates whom, so no `g_idx` needs to be stored.

    Args:
        w: weights [N, K], any float dtype.
        h: Hessian float32 [K, K]; only its direction matters, not its scale.
        grid: what the columns of one group are rounded to.
        group_size: columns per group; a short last group is legal.
        damp_percent: share of the mean diagonal of `h` added to the diagonal.
        order: a row of `llmq.solvers.orders.ORDERS`.
        scale_search: ``none``, ``mse`` or ``hessian``, see `llmq.solvers.placing.placer`. The energy of column j is
            R_jj²: what an error there still costs after the columns behind have made up for it as well as they can.
        search_norm: the power that ``mse`` sums.

    Returns:
        The solution; on a Hessian that no damping makes positive definite it is that of
        `llmq.solvers.descent.without_factor`, with its remedy.

    Raises:
        SolverError: `h` holds NaN or infinity, or an option has no such value.
    """
    return sweep(
        w,
        h,
        grid,
        group_size,
        damp_percent=damp_percent,
        order=order,
        scale_search=scale_search,
        search_norm=search_norm,
    )
