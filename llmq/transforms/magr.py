"""MagR: weights of smaller magnitude that compute nearly the same, found before quantization.

``½ (w - w₀) H (w - w₀)ᵀ + λ Σ_g ‖w_g‖_∞`` over the groups g of a row: directions in which H is small are free, and are
used to pull in the largest weights, which set the scale of their group (Zhang et al. 2024, MagR, arXiv 2406.00800,
eq. 3 and algorithm 1). Nothing is stored or computed at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import SolverError

_POWERS = 20


def magr(w: Tensor, h: Tensor, *, group_size: int, alpha: float = 0.01, steps: int = 50) -> Tensor:
    """Return `w` after `steps` steps of proximal gradient descent on MagR's objective, [N, K] in w's dtype.

    The objective falls or stays in every step, each as long as 1 over H's largest eigenvalue. Rows are independent of
    each other.

    Args:
        w: weights, float32 or float64 [N, K].
        h: Hessian [K, K], symmetric positive semidefinite, of any scale.
        group_size: columns that share a scale; a short last group is legal.
        alpha: λ over H's largest eigenvalue and the row's root mean square, so that neither the scale of H nor that of
            w matters. It is what one step cuts off a group, summed over its entries, in units of that root mean square.
            0 changes nothing.
        steps: each one product with H.

    Raises:
        SolverError: `alpha` is negative.
    """
    if alpha < 0:
        raise SolverError(f"MagR: alpha is {alpha}; use 0 or more")
    largest = largest_eigenvalue(h)
    if largest == 0:
        return w.clone()
    cut = alpha * w.square().mean(dim=1, keepdim=True).sqrt()  # λ over the eigenvalue, [N, 1]
    start, h = w, h.to(w)
    for _ in range(steps):
        v = w - (w - start) @ h / largest
        w = torch.cat([_prox(part, cut) for part in v.split(group_size, dim=1)], dim=1)
    return w


def largest_eigenvalue(h: Tensor) -> float:
    """Return nearly the largest eigenvalue of a positive semidefinite `h` [K, K], by power iteration from below.

    After m products the estimate is short by a factor of K^(1/2m) at most, up to what the start is worse than average:
    1.27 at K = 14336, 1 where one eigenvalue stands out. The objective of `magr` falls with any step below 2 over it.
    """
    v = torch.randn(len(h), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(h)
    length = v.norm()
    for _ in range(_POWERS):
        if length == 0:
            return 0.0
        v = h @ (v / length)
        length = v.norm()
    return float(length)


def _prox(v: Tensor, radius: Tensor) -> Tensor:
    """Return argmin_u ``½ ‖u - v‖² + radius ‖u‖_∞`` of each row: v clipped at ±τ with ``Σ (|v| - τ)₊ = radius``.

    v - u is the projection of v onto the l1 ball (Moreau); τ is found by sorting (Duchi et al. 2008, ICML, figure 1).
    A row inside the ball becomes 0.

    Args:
        v: [N, S].
        radius: [N, 1], not negative.
    """
    sizes = v.abs()
    ordered = sizes.sort(dim=1, descending=True).values
    counts = torch.arange(1, v.shape[1] + 1, device=v.device, dtype=v.dtype)
    levels = (ordered.cumsum(dim=1) - radius) / counts  # τ if that many entries are clipped
    # levels rise with the count while the next entry still exceeds them and fall after: the right one is the highest
    tau = levels.amax(dim=1, keepdim=True).clamp(min=0)
    return v.clamp(-tau, tau)
