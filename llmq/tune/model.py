"""End-to-end tuning: scales, norms and biases of the whole model, moved until it predicts what the original predicts.

The second phase of EfficientQAT (Chen et al. 2024, arXiv 2407.11062) with codes fixed, and with the divergence from the
original model's next-token distribution as the loss, which needs no labels and says more per token than one. The
original model is not in memory: what its last block returned is, and the head makes its exact logits of that, which is
smaller than any useful number of cached logits. Blocks are checkpointed, so that one of them at a time holds what
gradients need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmq.errors import SolverError
from llmq.families import Structure
from llmq.report import TuningReport
from llmq.stream import Stream, logits
from llmq.tune.tunable import TunableLinear
from llmq.types import QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BETAS = (0.9, 0.95)
_WARMUP = 8  # steps
_LEAST_RMS = 1e-3  # of a vector, so that biases that are all zero can move


@dataclass(frozen=True)
class ModelRates:
    """How long and how fast."""

    epochs: int
    scales: float = 0.003  # relative to the scale, per step
    vectors: float = 0.001  # norms and biases, relative to their root mean square


@dataclass
class Model:
    """A quantized model to be tuned: all of it loaded, its packed linears replaced by `TunableLinear`s."""

    net: PreTrainedModel
    structure: Structure
    layers: Mapping[str, TunableLinear]
    stored_dtype: torch.dtype  # of what is not packed
    vectors: dict[str, nn.Parameter] = field(init=False)  # norms and biases, by name

    def __post_init__(self) -> None:
        base = self.net.base_model
        self.vectors = {
            name: p for name, p in self.net.named_parameters() if p.ndim == 1 and any(p is q for q in base.parameters())
        }


def tune_model(
    model: Model, start: Stream, end: list[Tensor], rates: ModelRates, seed: int = 0
) -> tuple[dict[str, QuantizedWeight], TuningReport]:
    """Return the weights with better scales, and what was gained; norms and biases are changed in the model.

    Args:
        model: the model; its parameters are left at the result.
        start: hidden states in front of the first block.
        end: per batch what the original model's last block returns, [B, L, D].
        rates: passes over the calibration set, and learning rates.
        seed: of the order of batches.
    """
    for parameter in model.net.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None  # whatever earlier passes left there
    task = _Task(model, start, end)
    changes = [layer.change for layer in model.layers.values()]
    # Adam moves float32 copies of the vectors: most of its steps are lost in sixteen bits
    exact = {name: nn.Parameter(p.detach().float().clone()) for name, p in model.vectors.items()}
    for parameter in (*changes, *model.vectors.values()):
        parameter.requires_grad_(True)
    steps = rates.epochs * len(task.train)
    optimizer = torch.optim.Adam(_parameter_groups(changes, exact, rates), betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARMUP, 1 - step / max(1, steps))
    )
    first, best = _stored_loss(task, changes, exact)
    least = first
    kept, step = 0, 0
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rates.epochs):
        for i in torch.randperm(len(task.train), generator=generator).tolist():
            with torch.enable_grad():
                task.loss(task.train[i]).backward()
            for name, vector in model.vectors.items():
                exact[name].grad = None if vector.grad is None else vector.grad.float()
                vector.grad = None
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            task.set_vectors(exact)
            step += 1
        loss, now = _stored_loss(task, changes, exact)
        if loss < least:
            best, least, kept = now, loss, step
    with torch.no_grad():
        for parameter, value in zip((*changes, *model.vectors.values()), best, strict=True):
            parameter.copy_(value)
    weights = {name: layer.quantized() for name, layer in model.layers.items()}
    return weights, TuningReport("model", steps, kept, first, least)


def _parameter_groups(
    changes: list[nn.Parameter], exact: Mapping[str, nn.Parameter], rates: ModelRates
) -> list[dict[str, Any]]:
    """Return what Adam moves, and how fast."""
    groups: list[dict[str, Any]] = [{"params": changes, "lr": rates.scales}]
    for vector in exact.values():
        rms = max(float(vector.detach().square().mean().sqrt()), _LEAST_RMS)
        groups.append({"params": [vector], "lr": rates.vectors * rms})
    return groups


class _Task:
    """The divergence of the quantized model's predictions from the original's, in nats per token."""

    def __init__(self, model: Model, start: Stream, end: list[Tensor]) -> None:
        self.model, self.start, self.end = model, start, end
        self.original = {name: p.detach().clone() for name, p in model.vectors.items()}
        self.train, self.judges = start.split(random=False)

    def loss(self, batch: int) -> Tensor:
        """Return the mean KL(original ‖ quantized) over the tokens of one batch whose predictions matter."""
        net, structure = self.model.net, self.model.structure
        expected = self._teacher(batch)
        hidden = self.start.hidden[batch]
        for index, block in enumerate(structure.blocks):
            hidden = checkpoint(
                self.start.through, block, index, batch, hidden, use_reentrant=False, preserve_rng_state=False
            )
        predicted = self._picked(batch, logits(net, structure, self.start.batches[batch], hidden))
        return nn.functional.kl_div(predicted, expected, log_target=True, reduction="batchmean")

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the mean loss of the held-out batches, or of all where none is held out."""
        return sum(float(self.loss(batch)) for batch in self.judges) / len(self.judges)

    @torch.no_grad()
    def _teacher(self, batch: int) -> Tensor:
        """Return the original model's log-probabilities; the vectors behind its blocks are put back for that."""
        tuned = {name: p.detach().clone() for name, p in self.model.vectors.items()}
        self.set_vectors(self.original)
        out = logits(self.model.net, self.model.structure, self.start.batches[batch], self.end[batch])
        self.set_vectors(tuned)
        return self._picked(batch, out)

    @torch.no_grad()
    def set_vectors(self, vectors: Mapping[str, Tensor]) -> None:
        """Let the model's norms and biases be these, rounded to its dtype."""
        for name, vector in vectors.items():
            self.model.vectors[name].copy_(vector)

    def _picked(self, batch: int, t: Tensor) -> Tensor:
        """Return the log-probabilities [T, V] at the tokens whose predictions matter."""
        return self.start.batches[batch].pick(t).log_softmax(-1)


@torch.no_grad()
def _stored_loss(
    task: _Task, changes: list[nn.Parameter], exact: Mapping[str, nn.Parameter]
) -> tuple[float, list[Tensor]]:
    """Return the held-out loss with everything tuned as files hold it, and these values; infinity where they cannot.

    The values are those of the changes, then those of the vectors.
    """
    before = [change.clone() for change in changes]
    try:
        for layer in task.model.layers.values():
            layer.round_()
        task.set_vectors({name: vector.to(task.model.stored_dtype) for name, vector in exact.items()})
        values = [p.clone() for p in (*changes, *task.model.vectors.values())]
        return task.held_out_loss(), values
    except SolverError:
        return math.inf, []
    finally:
        for change, value in zip(changes, before, strict=True):
            change.copy_(value)
        task.set_vectors(exact)
