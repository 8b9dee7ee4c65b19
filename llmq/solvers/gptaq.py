"""GPTAQ: a sweep like GPTQ's that also aims at the outputs of the original model, not those of the quantized prefix.

Li et al. 2025 (arXiv 2504.02692). X are the inputs that the quantized part in front of a layer gives, X_fp those of
the original model, and D = (X_fp - X) Xᵀ. Column i adds to those behind it, besides the correction for its error,

    c_i P_i ,  P = α triu(D Uᵀ, 1) U ,  H⁻¹ = Uᵀ U,

which is the least-squares answer of the columns behind i to ``c_i (X_fp - X)_i``. Here U = R⁻¹, and the weights of the
columns behind stand at W + Y R⁻¹. So the addition to Y is ``c_i P_i R = c_i T_i`` with ``T = α triu(D R⁻ᵀ, 1)``: in the
form of `llmq.solvers.sweep` the rule is one more term in the same sum, and P is never formed.

`llmq.solvers.shift` is the exact answer to the same question; this one is here for comparison.
"""

from __future__ import annotations

from torch import Tensor

from llmq.errors import SolverError
from llmq.hessian import all_finite
from llmq.solvers.sweep import sweep
from llmq.types import Grid, Solution


def gptaq(
    w: Tensor,
    h: Tensor,
    grid: Grid,
    group_size: int,
    *,
    cross: Tensor,
    alpha: float = 0.25,
    damp_percent: float = 0.01,
    order: str = "act",
    scale_search: str = "none",
    search_norm: float = 2.0,
) -> Solution:
    """Return codes that minimize ``‖W X_fp - Q X‖²`` greedily, column by column.

    Args:
        w: weights [N, K], any float dtype.
        h: Hessian ``2 X Xᵀ / T`` of the inputs X [K, T] in the quantized model, float32 [K, K].
        grid: what the columns of one group are rounded to.
        group_size: columns per group; a short last group is legal.
        cross: ``2 (X_fp - X) Xᵀ / T``, float32 [K, K], on the scale of `h`; not symmetric.
        alpha: how much of the difference is answered; 0 is `gptq`.
        damp_percent: as in `gptq`, like all that follow.
        order: a row of `llmq.solvers.orders.ORDERS`.
        scale_search: ``none``, ``mse`` or ``hessian``.
        search_norm: the power that ``mse`` sums.

    Returns:
        The solution; where `h` has no factor, that of `llmq.solvers.descent.without_factor`, which ignores `cross`.

    Raises:
        SolverError: `h` or `cross` holds NaN or infinity, or an option has no such value.
    """
    if not all_finite(cross):
        raise SolverError("the cross moment holds NaN or infinite entries")
    return sweep(
        w,
        h,
        grid,
        group_size,
        damp_percent=damp_percent,
        order=order,
        scale_search=scale_search,
        search_norm=search_norm,
        drift=alpha * cross if alpha else None,
    )
