"""Batch normalization for two states of one layer: while its weights are searched for, and once they are found.

State batch normalization, from Yang et al. 2020, "Searching for Low-Bit Weights in Quantized Neural Networks" (arXiv
2009.08695), section 3.3. The outputs of mixed and of quantized weights (`llmq.solvers.slb`) have other means and
variances. Each branch is normalized by its own; scale and offset after that are shared. When the network is used, only
quantized weights remain, so running statistics are kept of that branch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from llmq.errors import SolverError


class StateBatchNorm(nn.Module):
    """``γ (x - μ) / sqrt(σ² + ε) + β`` by channel, with μ and σ² of the branch that x comes from.

    Args:
        channels: C.
        eps: ε.
        momentum: how much of the running statistics each batch replaces.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs [B, C, …] of quantized weights, normalized: by the batch in training, else as it ran."""
        return batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )

    def mixed(self, x: Tensor) -> Tensor:
        """Return outputs [B, C, …] of mixed weights, normalized by the batch; running statistics stay.

        Raises:
            SolverError: not in training, where there are no mixed weights.
        """
        if not self.training:
            raise SolverError("mixed weights are for training, and have no running statistics; use the quantized ones")
        return batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
