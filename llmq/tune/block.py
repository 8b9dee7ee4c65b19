"""Block tuning: codes and scales of one block, moved by gradients until its output is nearest to the original's.

SignRound's objective (Cheng et al. 2023, arXiv 2309.05516): the block gets what the quantized blocks before it let
through and is to return what the original model has there, so that it also makes up for their errors. Two things
differ. It starts at the solver's codes, and it descends with Adam instead of the gradient's sign: near a good start
most signs are noise, and steps of one size flip codes that the solver had balanced against each other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.activations import HiddenStates
from llmq.errors import SolverError
from llmq.families import Linear
from llmq.report import TuningReport
from llmq.stream import Stream
from llmq.tune.tunable import TunableLinear, tunable
from llmq.types import QuantizedWeight

_BETAS = (0.9, 0.95)
_CHECKS = 10  # how often a run looks at the held-out batches


@dataclass(frozen=True)
class BlockRates:
    """How far a block's parameters move: the sum of all steps at most about half of steps times these."""

    steps: int
    codes: float = 0.005  # in code units per step
    scales: float = 0.004  # relative to the scale


@dataclass(frozen=True)
class Site:
    """A block in its place: what comes in, and what is to come out."""

    block: nn.Module  # its linears hold anything
    index: int  # its number in `stream`
    prefix: str  # its name and a dot
    stream: Stream  # hidden states in front of it
    targets: HiddenStates  # what it is to return


def tune_block(
    site: Site, layers: Mapping[str, tuple[Linear, Tensor, QuantizedWeight]], rates: BlockRates, seed: int = 0
) -> tuple[dict[str, QuantizedWeight], TuningReport]:
    """Return better codes and scales for the linears of a block, and what was gained.

    Args:
        site: the block.
        layers: by full name the linear, its original weight [N, K] and the weight to start from.
        rates: steps and learning rates.
        seed: of the order of batches.
    """
    tuned = {name: TunableLinear(linear, q, weight) for name, (linear, weight, q) in layers.items()}
    problem = _Problem(site)
    with tunable(site.block, site.prefix, tuned), torch.enable_grad():
        best = {name: layer.quantized() for name, layer in tuned.items()}
        first = least = _stored_loss(problem, tuned.values())
        kept, every = 0, max(1, rates.steps // _CHECKS)
        optimizer = torch.optim.Adam(
            [
                {"params": [layer.latent for layer in tuned.values()], "lr": rates.codes},
                {"params": [layer.change for layer in tuned.values()], "lr": rates.scales},
            ],
            betas=_BETAS,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, rates.steps))
        order = _order(problem.train, rates.steps, seed)
        for step, batch in enumerate(order, start=1):
            problem.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            for layer in tuned.values():
                layer.clamp_()
            if step % every == 0 or step == rates.steps:
                loss = _stored_loss(problem, tuned.values())
                if loss < least:
                    least, kept = loss, step
                    best = {name: layer.quantized() for name, layer in tuned.items()}
    return best, TuningReport(site.prefix.rstrip("."), rates.steps, kept, first, least)


class _Problem:
    """Squared error of a block's output, relative to the mean square of what it is to return."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.train, self.judges = site.stream.split(random=True)
        energies = [float(site.stream.batches[i].pick(site.targets[i]).square().mean()) for i in self.train]
        self.energy = sum(energies) / len(energies) or 1.0

    def loss(self, batch: int) -> Tensor:
        """Return the loss of one batch."""
        site, pick = self.site, self.site.stream.batches[batch].pick
        out = site.stream.through(site.block, site.index, batch, site.stream.hidden[batch])
        return (pick(out) - pick(site.targets[batch])).square().mean() / self.energy

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean loss of the held-out batches, or of all where none is held out."""
        return sum(float(self.loss(batch)) for batch in self.judges) / len(self.judges)


@torch.no_grad()
def _stored_loss(problem: _Problem, layers: Collection[TunableLinear]) -> float:
    """Return the held-out loss with the scales as files hold them; infinity where files cannot hold them."""
    exact = [layer.change.clone() for layer in layers]
    try:
        for layer in layers:
            layer.round_()
        return problem.held_out_loss()
    except SolverError:
        return math.inf
    finally:
        for layer, change in zip(layers, exact, strict=True):
            layer.change.copy_(change)


def _order(batches: list[int], steps: int, seed: int) -> list[int]:
    """Return the batch of each step: all of them in a drawn order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return order[:steps]
