"""What a run reports: a line per layer, totals, and how far it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

REPORT = "report.json"
CONTINUING = "continuing"  # the phase that a run which takes up an unfinished one tells first

# Remedies of a layer whose Hessian has no factor; a run in which many end so is not to be trusted.
DESCENDED = "coordinate descent, no factorization"
ROUNDED = "round to nearest"
FALLBACKS = frozenset({DESCENDED, ROUNDED})

# Remedies of experts that the router sends few tokens to.
STARVED = "weighted round to nearest, too few tokens"
SHRUNK = "Hessian shrunk towards that of all tokens"


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear layer."""

    name: str
    block: int
    out_features: int
    in_features: int
    tokens: int  # calibration tokens in its Hessian; 0 if the method uses none
    dropped_tokens: int  # left out because an input was not finite
    loss: float | None  # tr(E H Eᵀ), H = 2 X Xᵀ / T: twice the squared output error per token
    relative_loss: float | None  # that over tr(W H Wᵀ)
    held_out_loss: float | None  # relative, on tokens that entered no Hessian
    weight_error: float  # ‖W - Q‖ / ‖W‖
    damp_percent: float
    remedies: tuple[str, ...]
    undone: tuple[str, ...]  # stages that did not help on the held-out tokens
    routed_tokens: int | None = None  # calibration tokens that the router sends to the expert; None: not one's layer


@dataclass(frozen=True)
class BankReport:
    """How well the calibration text covers a bank of experts."""

    name: str
    block: int
    tokens: list[int]  # by expert, what the router sent there
    rounded: list[int]  # experts with so few that their last projection was rounded to nearest
    shrunk: list[int]  # experts with less than they need, whose Hessians lean on those of all tokens


def coverage(layers: Iterable[LayerReport]) -> list[BankReport]:
    """Return the ledger of the experts among `layers`, bank by bank."""
    banks: dict[str, BankReport] = {}
    for layer in layers:
        if layer.routed_tokens is None:
            continue
        name, number, _ = layer.name.rsplit(".", 2)
        bank, expert = banks.setdefault(name, BankReport(name, layer.block, [], [], [])), int(number)
        bank.tokens.extend([0] * (expert + 1 - len(bank.tokens)))
        bank.tokens[expert] = layer.routed_tokens
        for remedy, experts in ((STARVED, bank.rounded), (SHRUNK, bank.shrunk)):
            if remedy in layer.remedies and expert not in experts:
                experts.append(expert)
    return list(banks.values())


@dataclass(frozen=True)
class TuningReport:
    """What gradient descent did to one block, or to the model."""

    what: str  # name of the block, or "model"
    steps: int
    kept_step: int  # the step whose result was kept; 0: none was better than the start
    held_out_before: float
    held_out_after: float


@dataclass
class Report:
    """What `quantize` did, written to report.json in the output folder."""

    versions: dict[str, str]
    machine: dict[str, object]
    source: str
    recipe: dict[str, object]
    calibration: dict[str, object] | None
    layers: list[LayerReport] = field(default_factory=list)
    experts: list[BankReport] = field(default_factory=list)
    transforms: list[str] = field(default_factory=list)
    tuning: list[TuningReport] = field(default_factory=list)
    embedding: dict[str, object] = field(default_factory=dict)  # if it was packed: what, how, and ‖W - Q‖ / ‖W‖
    dense: dict[str, object] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as what JSON can hold."""
        return asdict(self)


class Progress(NamedTuple):
    """How far a run is: `done` of `total` linear layers; `layer` is set when one has just been finished."""

    phase: str
    done: int
    total: int
    block: int
    blocks: int
    layer: LayerReport | None = None
