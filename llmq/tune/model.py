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
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmq.activations import HiddenStates
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


class Keeper(Protocol):
    """Where a run that may be killed keeps how far it is."""

    def load(self) -> dict[str, Tensor] | None:
        """Return what was saved last, if anything was."""
        ...

    def save(self, state: dict[str, Tensor]) -> None:
        """Keep `state` in place of what was saved before."""
        ...


def tune_model(
    model: Model,
    start: Stream,
    end: HiddenStates,
    rates: ModelRates,
    seed: int = 0,
    *,
    keeper: Keeper | None = None,
) -> tuple[dict[str, QuantizedWeight], TuningReport]:
    """Return the weights with better scales, and what was gained; norms and biases are changed in the model.

    Args:
        model: the model; its parameters are left at the result.
        start: hidden states in front of the first block.
        end: what the original model's last block returns.
        rates: passes over the calibration set, and learning rates.
        seed: of the order of batches.
        keeper: gets the state after every pass, and has that of a run to continue, which ends in the same numbers.
    """
    for parameter in model.net.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None  # whatever earlier passes left there
    task = _Task(model, start, end)
    descent = _Descent(task, rates)
    state = None if keeper is None else keeper.load()
    if state is None:
        descent.judge()
    else:
        descent.restore(state)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(task.train), generator=generator).tolist() for _ in range(rates.epochs)]
    for order in orders[descent.step // max(1, len(task.train)) :]:
        for i in order:
            descent.move(task.train[i])
        descent.judge()
        if keeper is not None:
            keeper.save(descent.state())
    descent.settle()
    weights = {name: layer.quantized() for name, layer in model.layers.items()}
    return weights, TuningReport("model", descent.step, descent.kept, descent.first, descent.least)


class _Descent:
    """Adam on the scales, norms and biases of a model, and the best that it has found."""

    def __init__(self, task: _Task, rates: ModelRates) -> None:
        self.task = task
        self.changes = [layer.change for layer in task.model.layers.values()]
        # Adam moves float32 copies of the vectors: most of its steps are lost in sixteen bits
        vectors = task.model.vectors
        self.exact = {name: nn.Parameter(p.detach().float().clone()) for name, p in vectors.items()}
        for parameter in (*self.changes, *vectors.values()):
            parameter.requires_grad_(True)
        self.moved = [*self.changes, *self.exact.values()]
        self.optimizer = torch.optim.Adam(_parameter_groups(self.changes, self.exact, rates), betas=_BETAS)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps = rates.epochs * len(task.train)
        self.step = self.kept = 0
        self.first = self.least = math.inf
        self.best: list[Tensor] = []

    def move(self, batch: int) -> None:
        """Take one step, warmed up at first and slower towards the end."""
        pace = min((self.step + 1) / _WARMUP, 1 - self.step / max(1, self.steps))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = pace * rate
        with torch.enable_grad():
            self.task.loss(batch).backward()
        for name, vector in self.task.model.vectors.items():
            self.exact[name].grad = None if vector.grad is None else vector.grad.float()
            vector.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.task.set_vectors(self.exact)
        self.step += 1

    def judge(self) -> None:
        """Keep what there is now if held-out tokens find it best."""
        loss, now = _stored_loss(self.task, self.changes, self.exact)
        if self.step == 0:
            self.first = loss
        if self.step == 0 or loss < self.least:
            self.best, self.least, self.kept = now, loss, self.step

    @torch.no_grad()
    def settle(self) -> None:
        """Leave the model at the best."""
        for parameter, value in zip((*self.changes, *self.task.model.vectors.values()), self.best, strict=True):
            parameter.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Return all that the next step depends on."""
        numbers = torch.tensor([self.step, self.kept, self.first, self.least], dtype=torch.float64)
        found = {"numbers": numbers}
        found |= {f"moved.{i}": p.detach() for i, p in enumerate(self.moved)}
        found |= {f"best.{i}": value for i, value in enumerate(self.best)}
        for i, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"adam.{i}.{name}": value for name, value in moments.items()}
        return found

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a state."""
        step, kept, self.first, self.least = state["numbers"].tolist()
        self.step, self.kept = int(step), int(kept)
        for i, parameter in enumerate(self.moved):
            parameter.copy_(state[f"moved.{i}"])
        device = self.moved[0].device
        self.best = [state[f"best.{i}"].to(device) for i in range(len(self.moved)) if f"best.{i}" in state]
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, _, rest = key.partition(".")
            if kind == "adam":
                number, _, name = rest.partition(".")
                moments.setdefault(int(number), {})[name] = value
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": moments, "param_groups": own["param_groups"]})
        self.task.set_vectors(self.exact)


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

    def __init__(self, model: Model, start: Stream, end: HiddenStates) -> None:
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
