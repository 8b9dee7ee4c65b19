"""Folds: pairs of modules between which a channel can be rescaled without changing what the block computes.

A *producer* (a norm, or a linear layer whose outputs reach the others multiplied by something at most) writes channels
that only its *consumers* read. Dividing a channel of the producer by c and multiplying the consumers' columns that it
feeds by c changes nothing, costs nothing at run time, and moves the difficulty of quantizing between weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from llmq.errors import SolverError
from llmq.families import Linear


@dataclass(frozen=True)
class Norm:
    """A norm with a weight per channel."""

    name: str  # in the module tree
    module: nn.Module
    plus_one: bool  # whether it multiplies by 1 + weight (Gemma)
    centers: bool  # whether it subtracts the mean of its input first (LayerNorm)

    @property
    def weight(self) -> Tensor:
        """The weight [D], a view outside autograd: writing to it changes the module."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @property
    def gain(self) -> Tensor:
        """What each channel is multiplied by, float64 [D]."""
        return self.weight.double() + float(self.plus_one)


@dataclass(frozen=True)
class Fold:
    """A producer, the linears that read its channels, and which channel each of their inputs comes from."""

    producer: Norm | Linear
    start: int  # first of the producer's channels that take part: a fused linear takes part with some of its rows
    channels: int  # C, how many take part
    consumers: list[Linear]
    source: Tensor  # int64 [K]: the channel, counted from `start`, that feeds each input of the consumers
    head_dim: int | None = None  # channels per head, where the channels are values of attention heads

    @property
    def name(self) -> str:
        """Who feeds whom."""
        return f"{self.producer.name} -> {', '.join(consumer.name for consumer in self.consumers)}"

    @property
    def bias(self) -> Tensor | None:
        """The producer's bias of the channels that take part, a view [C], or None."""
        return part_of(bias_of(self.producer.module), self.start, self.channels)


def bias_of(module: nn.Module) -> Tensor | None:
    """Return a module's bias as a view outside autograd, or None where it has none."""
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def part_of(tensor: Tensor | None, start: int, size: int) -> Tensor | None:
    """Return `size` entries of a tensor's first dimension as a view, or None for None."""
    return None if tensor is None else tensor[start : start + size]


def apply_scales_(fold: Fold, c: Tensor) -> None:
    """Multiply the consumers' columns by `c` and divide the producer's channels by it, in float64, cast once.

    Args:
        fold: what `llmq.transforms.wiring` found.
        c: one factor per channel of the producer, [C]; inputs that share a channel (query heads of one group) share it.

    Raises:
        SolverError: `c` has another shape, or a factor that is 0, NaN or infinite.
    """
    if c.shape != (fold.channels,) or not (c.isfinite() & (c != 0)).all():
        raise SolverError(
            f"{fold.name}: scales of shape {tuple(c.shape)} from {c.min().item():g} to {c.max().item():g}; "
            f"use {fold.channels} finite numbers other than 0"
        )
    scale_producer_(fold, c)
    scale_consumers_(fold, c)


def scale_producer_(fold: Fold, c: Tensor) -> None:
    """Divide the producer's channels, biases included, by `c` [C]: one half of `apply_scales_`."""
    producer = fold.producer
    if isinstance(producer, Norm):
        divisor = c.to(producer.weight.device).double()
        producer.weight.copy_(producer.gain / divisor - float(producer.plus_one))
    else:
        rows = producer.weight[fold.start : fold.start + fold.channels]
        divisor = c.to(rows.device).double()
        rows.copy_(rows.double() / divisor[:, None])
    if fold.bias is not None:
        fold.bias.copy_(fold.bias.double() / divisor)


def scale_consumers_(fold: Fold, c: Tensor) -> None:
    """Multiply the consumers' columns by their channel's entry of `c` [C]: the other half of `apply_scales_`."""
    for consumer in fold.consumers:
        weight = consumer.weight
        weight.copy_(weight.double() * c.double()[fold.source].to(weight.device))


def touched(fold: Fold) -> list[Tensor]:
    """Return every tensor that `apply_scales_` writes to, as views."""
    tensors = [fold.producer.weight, *(consumer.weight for consumer in fold.consumers)]
    return tensors if fold.bias is None else [*tensors, fold.bias]
