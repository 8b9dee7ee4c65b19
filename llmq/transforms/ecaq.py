"""One scale per input channel for quantized activations, at the cost of one for all of them.

ECAQ, from Wang et al. 2020, "Towards Accurate Post-training Network Quantization via Bit-Split and Stitching" (ICML,
PMLR 119). Channel c of the inputs is put on ``β_c q`` with whole numbers q. Then

    Σ_c w_c x_c ≈ Σ_c w_c β_c q_c = β̄ Σ_c (w_c β_c / β̄) q_c ,

so the factors ``f_c = β_c / β̄`` go into the columns, in floating point and before the weight is quantized, and the
products of whole numbers share the scale β̄. Whatever makes the inputs gives them divided by f; where that is a norm or
a linear, `llmq.transforms.folds.apply_scales_` folds both sides.

Two steps: β is fitted to each channel, then the weight to the inputs as they come out. The second one is asymmetric
calibration, of which `quantized_moments` has the sums: ``shifted(w f, h, cross, …)`` of `llmq.solvers.shift`, or the
solver `gptaq`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.errors import SolverError
from llmq.grids.alternating import alternate
from llmq.grids.uniform import UniformGrid


class EcaqScales(NamedTuple):
    """How the inputs of a layer are quantized: ``x_c ≈ f_c β̄ q_c``."""

    factors: Tensor  # f, float32 [K]: the columns are multiplied by it, the inputs divided; its mean is 1
    shared: Tensor  # β̄, float32 []
    bits: int


def ecaq_scales(x: Tensor, bits: int) -> EcaqScales:
    """Return the scale of each channel, found by turns: whole numbers for the scale, the scale for whole numbers.

    Args:
        x: inputs [T, K], any float dtype. Channels that never occur share the mean scale.
        bits: of the quantized inputs; they reach from ``-(2^(bits-1) - 1)`` to ``2^(bits-1) - 1``.

    Raises:
        SolverError: an input is NaN or infinite, or there is none.
        SpecError: there is no such number of bits.
    """
    grid = UniformGrid(bits, symmetric=True, sym_range="restricted")
    if not len(x) or not bool(x.isfinite().all()):
        raise SolverError(
            f"inputs of shape {tuple(x.shape)} have NaN, infinity or no token; check the calibration data"
        )
    channels = x.float().T
    largest = channels.abs().amax(dim=1, keepdim=True)
    there = largest > 0
    channels = torch.where(there, channels / largest, 0.0)  # stored scales know no tiny numbers
    weight = torch.ones(len(x), device=x.device)
    scale = alternate(grid, channels, weight, grid.fit(channels, weight)).scale * largest
    shared = scale[there].mean() if bool(there.any()) else torch.ones((), device=x.device)
    return EcaqScales(torch.where(there, scale / shared, 1.0)[:, 0], shared, bits)


def quantized_inputs(x: Tensor, scales: EcaqScales) -> Tensor:
    """Return inputs [T, K] as the layer gets them, float32: divided by their factors and put on the shared grid."""
    top = 2 ** (scales.bits - 1) - 1
    codes = (x.float() / scales.factors / scales.shared).round().clamp_(-top, top)
    return codes * scales.shared


def quantized_moments(x: Tensor, scales: EcaqScales) -> tuple[Tensor, Tensor]:
    """Return ``2 X Xᵀ / T`` and ``2 (X_fp - X) Xᵀ / T``, float32 [K, K] each, for a weight times its factors.

    X are the quantized inputs of `x` [T, K], X_fp the same before they were rounded: what the paired solvers take.
    """
    rounded = quantized_inputs(x, scales)
    off = x.float() / scales.factors - rounded
    return 2 / len(x) * rounded.T @ rounded, 2 / len(x) * off.T @ rounded
