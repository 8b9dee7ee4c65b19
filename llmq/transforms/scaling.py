"""Scales for a fold: AWQ's search over powers of the activations, and SmoothQuant's closed form.

Both move magnitude between a layer's inputs and its columns, and both are undone exactly by the producer
(`llmq.transforms.folds`). They return one factor c per channel: columns are multiplied by it, inputs divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.errors import SolverError
from llmq.types import Grid

Quantize = Callable[[Tensor, Tensor], Tensor]  # (w [N, K], h [K, K]) -> dequantized w [N, K]

EXPONENTS = tuple(step / 20 for step in range(20))  # 0, .05, … .95; 0 is no scaling
_SMALLEST = 1e-4


class AwqScales(NamedTuple):
    """What the search found, and what it is worth in its own measure."""

    scales: Tensor  # c, float64 [C]
    exponent: float
    loss: float  # Σ tr(E H Eᵀ) over the consumers
    unscaled_loss: float  # the same with c = 1, never smaller


def awq_scales(
    x_mean_abs: Tensor, weights: Sequence[Tensor], h: Tensor, quantize: Quantize, source: Tensor | None = None
) -> AwqScales:
    """Return the scales ``c = (mean |x|)^r`` whose r costs the consumers the least output error.

    Lin et al. 2023, AWQ, arXiv 2306.00978, section 3.2 and eq. 4-5, with two changes. The measure is the sum of
    the linears' own output errors, ``tr(E H Eᵀ)`` with ``E = W - Q(W c) / c``, instead of the whole block's, so that no
    forward pass is needed. And c is normalized to max · min = 1 before it is clamped from below, so that the units of x
    do not matter. r = 0 is among the exponents: in its own measure the result is never worse than no scaling.

    Args:
        x_mean_abs: mean |x| of each input, [K].
        weights: of the linears that read these inputs, [N, K] each.
        h: their Hessian [K, K], of the inputs as they are.
        quantize: what the scaled weights will go through, given the Hessian of the scaled inputs: a solver, or a cheap
            stand-in for it (`clipped_rtn`).
        source: which channel of the producer feeds each input, int64 [K] (`Fold.source`); None: one to one. Inputs of
            one channel share a factor, made from the mean over them.

    Raises:
        SolverError: a statistic is negative, NaN or infinite.
    """
    if source is None:
        source = torch.arange(len(x_mean_abs))
    statistic = pooled_mean(x_mean_abs, source)
    if not (statistic.isfinite() & (statistic >= 0)).all():
        raise SolverError("mean |x| of some input is negative, NaN or infinite; check the calibration data")
    tried: list[AwqScales] = []
    for exponent in EXPONENTS:
        c = _normalized(statistic, exponent)
        loss = _loss(weights, h, c[source.to(c.device)], quantize)
        tried.append(AwqScales(c, exponent, loss, tried[0].unscaled_loss if tried else loss))
    return min(tried, key=lambda found: found.loss)  # the first, hence mildest, of equals


def clipped_rtn(grid: Grid, group_size: int) -> Quantize:
    """Return the quantizer that rounds to nearest on a `grid` that is fitted per group, weighted by H's diagonal."""

    def quantize(w: Tensor, h: Tensor) -> Tensor:
        parts = []
        for columns, weight in zip(w.split(group_size, dim=1), h.diagonal().split(group_size), strict=True):
            at = grid.fit(columns, weight)
            parts.append(grid.decode(grid.encode(columns, at), at))
        return torch.cat(parts, dim=1)

    return quantize


def smooth_scales(x_max: Tensor, w_max: Tensor, a: float = 0.5) -> Tensor:
    """Return ``c = max|w|^(a - 1) · max|x|^a``, by which inputs are divided and columns multiplied, float64 [K].

    Xiao et al. 2022, SmoothQuant, arXiv 2211.10438, eq. 4; at a = .5 both sides end with the same maximum. Given root
    mean squares of x and norms of the columns instead of maxima, it is the proxy rescaling of QuIP (Chee et al. 2023,
    arXiv 2307.13304, section 4.1). Channels with a zero on either side are left alone.

    Args:
        x_max: the largest |x| of each input, [K].
        w_max: the largest |w| of each column over all linears that read it, [K].
        a: how much of the difficulty goes from inputs to weights, 0 to 1.

    Raises:
        SolverError: `a` out of range.
    """
    if not 0 <= a <= 1:
        raise SolverError(f"smoothing exponent is {a}; use 0 to 1")
    x, w = x_max.double(), w_max.double()
    usable = (x > 0) & (w > 0)
    return torch.where(usable, x.pow(a) / w.pow(1 - a), 1.0)


def pooled_mean(values: Tensor, source: Tensor) -> Tensor:
    """Return the mean over the inputs that each channel feeds, float64 [C]; `values` and `source` are [K]."""
    source = source.to(values.device)
    channels = int(source.max()) + 1
    total = torch.zeros(channels, dtype=torch.float64, device=values.device).index_add_(0, source, values.double())
    return total / source.bincount(minlength=channels)


def pooled_max(values: Tensor, source: Tensor) -> Tensor:
    """Return the maximum over the inputs that each channel feeds, [C]; `values` and `source` are [K]."""
    source = source.to(values.device)
    return values.new_full((int(source.max()) + 1,), -torch.inf).scatter_reduce_(0, source, values, "amax")


def _normalized(statistic: Tensor, exponent: float) -> Tensor:
    """Return ``statistic^exponent`` over the geometric mean of its extremes; channels that are never active get 1."""
    active = statistic > 0
    if not active.any():
        return torch.ones_like(statistic)
    c = statistic.pow(exponent)
    c = c / (c[active].max() * c[active].min()).sqrt()
    return torch.where(active, c.clamp(min=_SMALLEST), 1.0)


def _loss(weights: Sequence[Tensor], h: Tensor, c: Tensor, quantize: Quantize) -> float:
    """Return the output error that quantizing ``w c`` costs, summed over the weights; `c` is [K]."""
    c = c.to(h)
    h = h / (c * c[:, None])
    total = 0.0
    for w in weights:
        scaled = w.to(h) * c
        error = scaled - quantize(scaled, h)
        total += float(((error @ h) * error).sum(dtype=torch.float64))
    return total
