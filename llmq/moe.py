"""Banks of experts: what transformers keeps as 3-D parameters, taken apart into ordinary linear layers.

transformers 5 fuses the experts of a mixture into one module with parameters of three dimensions, while files (and
other engines) have two-dimensional weights per expert. `unfuse_` puts a `Bank` in the place of each fused module: it
holds one linear layer per expert and projection, under the names that transformers' own conversion mapping reads from
files, and computes what the fused module computes. Hooks, solvers, tuning and packed layers then meet linear layers
as anywhere else.

Fused modules are known by structure: the attributes that transformers' decorator `use_experts_implementation` gives
them say how gate and up are joined, whether weights are transposed, and whether there are biases; the activation is
the module's own method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from llmq.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNKNOWN_NAMES = ("gate_proj", "up_proj", "down_proj")  # of experts that no file has apart; what most families use


class Names(NamedTuple):
    """What the projections of an expert are called in files."""

    gate: str | None  # None: experts without a gate
    up: str
    down: str


@dataclass(frozen=True)
class Part:
    """Where one tensor of an expert is inside a fused parameter [E, …]."""

    name: str  # below the bank, e.g. 3.gate_proj.weight
    parameter: str  # below the fused module, e.g. gate_up_proj
    expert: int
    rows: slice  # outputs that are this projection's
    transposed: bool  # whether the parameter keeps inputs before outputs

    def of(self, fused: Tensor) -> Tensor:
        """Return the part of one expert's entry `fused`, [2I, D] or transposed, or [2I] of a bias: [N, K] or [N]."""
        return (fused.T if self.transposed else fused)[self.rows]


class Together(Protocol):
    """What runs all experts of a bank at once, where they are packed."""

    def run(self, bank: Bank, hidden_states: Tensor, picked: Tensor, weights: Tensor) -> Tensor | None:
        """Return what `Bank.forward` does; None: the bank's linears have to run one by one."""

    def release_(self) -> None:
        """Let go of what the linears hold: they are about to change it."""


class Bank(nn.Module):
    """Experts that a router picks from, one linear layer per projection.

    Args:
        fused: the module of transformers, on the meta device; it stays behind the scenes for its activation.
        names: what the projections are called.
    """

    def __init__(self, fused: nn.Module, names: Names) -> None:
        super().__init__()
        self.names = names
        self.rows: Tensor | None = None  # the tokens of the expert that is running, for those who watch its linears
        self.together: Together | None = None  # None: experts run one by one
        self._fused = (fused,)  # in a tuple: no submodule, its parameters are not the bank's
        first, second = _parameters(fused)
        inputs, outputs = _axes(fused)
        width, inner, biased = first.shape[inputs], second.shape[inputs], bool(getattr(fused, "has_bias", False))
        made: dict[str, Any] = {"bias": biased, "device": "meta", "dtype": first.dtype}
        for index in range(first.shape[0]):
            expert = nn.Module()
            for name in (names.gate, names.up):
                if name is not None:
                    expert.add_module(name, nn.Linear(width, inner, **made))
            expert.add_module(names.down, nn.Linear(inner, second.shape[outputs], **made))
            self.add_module(str(index), expert)

    @property
    def fused(self) -> Any:
        """The module that the bank stands for."""
        return self._fused[0]

    @property
    def size(self) -> int:
        """Number of experts."""
        return len(self._modules)

    def projections(self, expert: int) -> tuple[list[nn.Module], nn.Module]:
        """Return what reads the bank's input in one expert, and what reads `inner` of it."""
        parts = self.get_submodule(str(expert))
        first = [name for name in (self.names.gate, self.names.up) if name is not None]
        return [parts.get_submodule(name) for name in first], parts.get_submodule(self.names.down)

    def places(self) -> dict[nn.Module, tuple[int, bool]]:
        """Return for each projection its expert, and whether it is the last one of it."""
        found: dict[nn.Module, tuple[int, bool]] = {}
        for expert in range(self.size):
            first, last = self.projections(expert)
            found |= dict.fromkeys(first, (expert, False))
            found[last] = (expert, True)
        return found

    def inner(self, expert: int, x: Tensor) -> Tensor:
        """Return what the last projection of an expert reads, [T, I], for the bank's input `x` [T, D]."""
        outputs = [module(x) for module in self.projections(expert)[0]]
        return self.activated(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1))

    def activated(self, outputs: Tensor) -> Tensor:
        """Return what the last projection reads, [T, I], for the `outputs` [T, I or 2I] of the first, side by side."""
        if self.names.gate is None:
            hidden: Tensor = self.fused.act_fn(outputs)
        elif self.fused.is_concatenated:
            hidden = self.fused._apply_gate(outputs)
        else:
            hidden = self.fused._apply_gate(outputs.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2))
        return hidden

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the picked experts, [T, D].

        Args:
            hidden_states: [T, D].
            top_k_index: picked experts, int64 [T, k]; numbers from `size` up pick none.
            top_k_weights: their weights, [T, k].
        """
        if self.together is not None:
            found = self.together.run(self, hidden_states, top_k_index, top_k_weights)
            if found is not None:
                return found
        out = torch.zeros_like(hidden_states)
        for expert, tokens, slots in _picked(top_k_index, self.size):
            self.rows = tokens
            last = self.projections(expert)[1]
            y = last(self.inner(expert, hidden_states[tokens])) * top_k_weights[tokens, slots, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        self.rows = None
        return out

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Bank:
        if self.together is not None:
            self.together.release_()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def parts(self) -> Iterator[Part]:
        """Yield where each tensor of the bank is in the fused parameters."""
        inner, transposed = self.projections(0)[1].in_features, bool(getattr(self.fused, "is_transposed", False))
        rows = {self.names.up: slice(None)}
        if self.names.gate is not None and self.fused.is_concatenated:
            rows = {self.names.gate: slice(0, inner), self.names.up: slice(inner, None)}
        elif self.names.gate is not None:
            rows = {self.names.gate: slice(0, None, 2), self.names.up: slice(1, None, 2)}
        joined = "up_proj" if self.names.gate is None else "gate_up_proj"
        for expert in range(self.size):
            for name, parameter, mine in (
                *((n, joined, r) for n, r in rows.items()),
                (self.names.down, "down_proj", slice(None)),
            ):
                yield Part(f"{expert}.{name}.weight", parameter, expert, mine, transposed)
                if getattr(self.fused, "has_bias", False):
                    yield Part(f"{expert}.{name}.bias", f"{parameter}_bias", expert, mine, transposed=False)


@dataclass
class ExpertStage:
    """One of the two stages of a bank, whose linears see inputs of their own, expert by expert."""

    bank: str  # its name within the block
    last: bool  # whether the stage is that of the experts' last projections
    entries: list[Entry]  # what enters the bank; both stages have the same list, empty until the first is measured


class Entry(NamedTuple):
    """One call of a bank."""

    batch: int
    hidden: Tensor  # [T, D]
    picked: Tensor  # numbers of experts, int64 [T, k]
    reference: Tensor | None  # as `hidden`, in the original model


def has_fused(model: nn.Module) -> bool:
    """Return whether a module of `model` holds fused experts that `unfuse_` takes apart."""
    return any(_is_fused(module) for module in model.modules())


def unfuse_(model: PreTrainedModel) -> dict[str, Bank]:
    """Put a bank in the place of every fused module of experts, and return the banks by name.

    The model must be on the meta device: its parameters are made anew, not copied.

    Raises:
        SpecError: files keep a model's experts in a way that llmq does not know.
    """
    found: dict[str, Bank] = {}
    for name, module in list(model.named_modules()):
        if _is_fused(module):
            found[name] = Bank(module, _file_names(model, name, module))
            _put(model, name, found[name])
    return found


def fuse_(model: nn.Module, bank: Bank, name: str) -> None:
    """Put the fused module back in the place of a bank; its parameters are on the meta device."""
    _put(model, name, bank.fused)


def merges(converter: Any, banks: Mapping[str, Bank]) -> bool:
    """Return whether a weight converter of transformers would put tensors of experts in `banks` together."""
    from transformers.core_model_loading import rename_source_key

    keys = [f"{name}.0.{local}.weight" for name, bank in banks.items() for local in bank.names if local is not None]
    return any(rename_source_key(key, [], [converter])[1] is not None for key in keys)


def banks_of(block: nn.Module) -> dict[str, Bank]:
    """Return the banks in `block`, by their names in it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, Bank)}


def routers_of(model: nn.Module, banks: Iterable[str]) -> list[str]:
    """Return the names of what decides over the experts of `banks`: weights that the model reads beside a bank.

    A router has one output per expert, the gate of a shared expert has one.
    """
    found: dict[str, None] = {}
    for name in banks:
        bank, parent = model.get_submodule(name), name.rpartition(".")[0]
        assert isinstance(bank, Bank)
        for local, child in model.get_submodule(parent).named_children():
            weights = [] if child is bank else [(n, p) for n, p in child.named_parameters() if p.ndim == 2]
            if weights and all(p.shape[0] in (1, bank.size) for _, p in weights):
                found |= {f"{parent}.{local}.{n}".removesuffix(".weight"): None for n, _ in weights}
    return list(found)


def left_dense(blocks: Iterable[tuple[str, nn.Module]], ignore: Iterable[str]) -> dict[str, str]:
    """Return the modules in `blocks`, given with their names, whose experts stay fused and dense, and why.

    Raises:
        SpecError: one keeps matrices in 3-D parameters in a way that llmq does not take apart, and none of the regular
            expressions `ignore` finds its name: no weights may silently stay dense.
    """
    found: dict[str, str] = {}
    for prefix, block in blocks:
        for local, module in block.named_modules():
            parameters = [] if isinstance(module, nn.modules.conv._ConvNd) else module.named_parameters(recurse=False)
            matrices = [(n, p) for n, p in parameters if p.ndim == 3 and min(p.shape) > 1]
            if not matrices:
                continue
            name = f"{prefix}.{local}"
            # of a bank, the linears that it would have are what was ignored
            pattern = next((x for x in ignore if _is_fused(module) or re.search(x, name)), None)
            if pattern is None:
                key, parameter = matrices[0]
                raise SpecError(
                    f"{name}: {type(module).__name__} keeps {parameter.shape[0]} matrices in the one parameter {key} "
                    f"{list(parameter.shape)}, and is none of the fused experts that llmq takes apart (gate_up_proj "
                    "and down_proj, as transformers' use_experts_implementation describes them); leave it dense with "
                    "--ignore"
                )
            found[name] = f"--ignore {pattern}"
    return found


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, local = name.rpartition(".")
    setattr(model.get_submodule(parent), local, module)


def _is_fused(module: nn.Module) -> bool:
    """Return whether `module` holds fused experts of the kind that a bank can stand for."""
    if not hasattr(module, "is_concatenated") or getattr(module, "has_post_expert_norm", False):
        return False
    return all(parameter is not None and parameter.ndim == 3 for parameter in _parameters(module))


def _parameters(fused: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the parameters of the first projections, [E, 2I, D] or transposed, and of the last, [E, D, I]."""
    own = fused._parameters
    first = own.get("gate_up_proj" if getattr(fused, "has_gate", True) else "up_proj")
    return first, own.get("down_proj")  # type: ignore[return-value]  # `_is_fused` looks


def _axes(fused: nn.Module) -> tuple[int, int]:
    """Return which dimensions of the fused parameters are inputs and outputs."""
    return (1, 2) if getattr(fused, "is_transposed", False) else (2, 1)


def _picked(index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert that `index` [T, k] picks, the tokens that pick it, and in which slots they do."""
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count:
            mine = order[start : start + count]
            yield expert, mine // index.shape[1], mine % index.shape[1]
        start += count


def _file_names(model: PreTrainedModel, name: str, fused: nn.Module) -> Names:
    """Return what files call the projections of the experts in `fused`, the module `name`.

    Raises:
        SpecError: transformers puts the parameters together from files in a way that llmq does not know.
    """
    gated = bool(getattr(fused, "has_gate", True))
    down = _sources(model, f"{name}.down_proj", name, ["MergeModulelist"])
    up = _sources(
        model,
        f"{name}.{'gate_up_proj' if gated else 'up_proj'}",
        name,
        ["MergeModulelist", "Concatenate"] if gated else ["MergeModulelist"],
    )
    if up is None and down is None:
        return Names(_UNKNOWN_NAMES[0] if gated else None, *_UNKNOWN_NAMES[1:])
    if up is None or down is None or len(up) != 1 + gated or len(down) != 1 or getattr(fused, "is_transposed", False):
        raise SpecError(
            f"{name}: transformers builds these experts from {up} and {down} of the files; llmq knows gate, up and "
            "down weights per expert, or fused ones"
        )
    return Names(up[0] if gated else None, up[-1], down[0])


def _sources(model: PreTrainedModel, target: str, bank: str, operations: list[str]) -> list[str] | None:
    """Return the names below an expert of the weights that transformers' conversion merges into parameter `target`.

    None: it merges nothing into it.

    Raises:
        SpecError: it does more than merging by these `operations`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    for converter in get_model_conversion_mapping(model):
        if not isinstance(converter, WeightConverter):
            continue
        names = [p.rsplit("*.", 1)[1].replace("\\", "") for p in converter.source_patterns if "*." in p]
        if not names or any(rename_source_key(f"{bank}.0.{n}", [], [converter])[0] != target for n in names):
            continue
        done = [type(operation).__name__ for operation in converter.operations]
        if done != operations or not all(n.endswith(".weight") for n in names):
            raise SpecError(f"{target}: transformers makes it from {', '.join(names)} by {', '.join(done)}; not known")
        return [n.removesuffix(".weight") for n in names]
    return None
