"""A linear layer on its grid that gradients can move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq.families import Linear
from llmq.types import Affine, QuantizedWeight

_EDGE = 0.499  # of a step: how far beyond the outermost codes a latent may go
# of a step: how far from its code a latent may start. Nearer to the edge of .5, the noise of the first steps flips
# codes that the solver had balanced against each other.
_MARGIN = 0.35


class _Round(torch.autograd.Function):
    """Rounding whose gradient is that of the identity (the straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class TunableLinear(nn.Module):
    """``y = x Wᵀ + b`` with ``W = (code - zero) * scale``, whose scales, and codes if wanted, are parameters.

    Scales are parametrized by their relative change from the start, so that one learning rate fits layers and bits of
    any magnitude. Codes come from latent weights in code units, rounded in the forward pass; a latent starts at the
    original weight, moved as little as makes it round to the solver's code with a margin.

    Args:
        linear: the layer, for its bias.
        q: the weight on its grid.
        weight: original weight [N, K]; None: codes are fixed.
    """

    def __init__(self, linear: Linear, q: QuantizedWeight, weight: Tensor | None = None) -> None:
        super().__init__()
        self.name = linear.name
        self._start = q
        self.change = nn.Parameter(torch.zeros_like(q.scales))
        self.bias = linear.module.bias if isinstance(linear.module.bias, nn.Parameter) else None
        self.latent: nn.Parameter | None = None
        if weight is not None:
            codes = q.codes.float()
            scale, zero = (self._by_column(t) for t in (q.scales, q.zeros))
            latent = torch.clamp(weight.float() / scale + zero, codes - _MARGIN, codes + _MARGIN)
            self.latent = nn.Parameter(latent)
            # far beyond every level lie the outermost codes
            beyond = q.grid.encode(torch.tensor([[-1e6, 1e6]]), Affine(torch.ones(1, 1), torch.zeros(1, 1)))
            self._low, self._high = beyond[0].tolist()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output [..., N] for `x` [..., K]."""
        return nn.functional.linear(x, self.weight().to(x.dtype), self.bias)

    def weight(self) -> Tensor:
        """Return the weight [N, K], float32, with gradients to what is tuned."""
        q = self._start
        scale = self._by_column(q.scales * (1 + self.change))
        codes = q.codes.float() if self.latent is None else _Round.apply(self.latent)  # type: ignore[no-untyped-call]
        return (codes - self._by_column(q.zeros)) * scale

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the latents where they round to codes of the grid."""
        if self.latent is not None:
            self.latent.clamp_(self._low - _EDGE, self._high + _EDGE)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """Return the weight as it would be stored, its scales rounded."""
        q = self._start
        codes = q.codes if self.latent is None else self.latent.round().to(torch.uint8)
        return replace(q, codes=codes, scales=q.grid.storable(q.scales * (1 + self.change)))

    @torch.no_grad()
    def round_(self) -> None:
        """Round the scales to what files hold."""
        start = self._start
        self.change.copy_(start.grid.storable(start.scales * (1 + self.change)) / start.scales - 1)

    def _by_column(self, t: Tensor) -> Tensor:
        """Return the entries [N, G] of `t` for each column, [N, K]."""
        n, k = self._start.codes.shape
        size = self._start.group_size
        if k % size == 0:
            return t.unsqueeze(2).expand(n, t.shape[1], size).reshape(n, k)
        return t.repeat_interleave(size, dim=1)[:, :k]


@contextmanager
def tunable(block: nn.Module, prefix: str, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `layers`, by full name, in place of the block's own; `prefix` is the block's name and a dot.

    Meanwhile nothing that the block itself holds gets gradients, biases of `layers` included.
    """
    own = {name: block.get_submodule(name.removeprefix(prefix)) for name in layers}
    free = [parameter for parameter in block.parameters() if parameter.requires_grad]
    for parameter in free:
        parameter.requires_grad_(False)
    put(block, prefix, layers)
    try:
        yield
    finally:
        put(block, prefix, own)
        for parameter in free:
            parameter.requires_grad_(True)


def put(block: nn.Module, prefix: str, layers: Mapping[str, nn.Module]) -> None:
    """Make `layers`, by full name, submodules of `block`."""
    for name, layer in layers.items():
        parent, _, child = name.removeprefix(prefix).rpartition(".")
        setattr(block.get_submodule(parent), child, layer)
