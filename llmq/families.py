"""Where a model's blocks and linear layers are, found from structure instead of from a table of model names.

The blocks are the longest list of like modules that holds linear layers; every linear layer in them is quantized
unless the user excludes it. Which linears see the same input (and so share one Hessian), and in what order they run,
is observed when a block first runs (`llmq.stream`), not declared. A model whose structure does not tell this gets a
table of its own when it comes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmq.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Linear:
    """One linear layer that will be packed."""

    name: str  # in the module tree, e.g. model.layers.0.self_attn.q_proj
    module: nn.Module
    transposed: bool  # whether the module keeps its weight as [K, N] (Conv1D of GPT-2)

    @property
    def weight(self) -> Tensor:
        """The weight as [N, K]: a view outside autograd, so that writing to it changes the module."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        weight = weight.detach()
        return weight.T if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs N and inputs K."""
        n, k = self.weight.shape
        return n, k


@dataclass(frozen=True)
class Structure:
    """The parts of a decoder that the driver walks through."""

    blocks_name: str  # name of the module list, e.g. model.layers
    blocks: list[nn.Module]
    linears: list[list[Linear]]  # per block, in module order; what `ignore` matched is left out
    ignored: list[str]  # linears in the blocks that stay dense

    @property
    def all_linears(self) -> list[Linear]:
        """All linears that will be packed, block by block."""
        return [linear for block in self.linears for linear in block]


def skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return the causal language model of a transformers `config` with all parameters on the meta device.

    Buffers are real: rotary frequencies and the like are computed, not stored.

    Raises:
        SpecError: transformers has no causal language model for this configuration.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    # ValueError: no such model; for sizes in config.json that do not fit each other there is no common class
    except Exception as error:
        raise SpecError(
            f"model type {config.model_type!r}: transformers makes no causal language model of this config.json, "
            f"which is what llmq quantizes: {' '.join(str(error).split())[:200]}"
        ) from error
    model.eval()
    return model


def find_structure(model: PreTrainedModel, ignore: Iterable[str] = ()) -> Structure:
    """Return the blocks of `model` and the linears in them.

    Raises:
        SpecError: there is no list of like blocks with linear layers, or `ignore` leaves nothing to quantize.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and _alike(m)]
    lists = [(n, m) for n, m in lists if any(_is_linear(child) for child in m.modules())]
    if not lists:
        raise SpecError(
            f"{type(model).__name__}: no transformer blocks found; looked for a torch.nn.ModuleList of modules of one "
            "class that contain torch.nn.Linear or transformers Conv1D layers"
        )
    # blocks come before lists inside them (experts), and decoders are deeper than anything beside them
    name, blocks = max(lists, key=lambda item: (sum(p.numel() for p in item[1].parameters()), -item[0].count(".")))
    patterns = [re.compile(pattern) for pattern in ignore]
    linears: list[list[Linear]] = []
    ignored: list[str] = []
    for index, block in enumerate(blocks):
        linears.append([])
        for linear in linears_of(block, f"{name}.{index}."):
            if any(pattern.search(linear.name) for pattern in patterns):
                ignored.append(linear.name)
            else:
                linears[-1].append(linear)
    if not any(linears):
        raise SpecError(f"--ignore matches all {len(ignored)} linear layers; nothing is left to quantize")
    return Structure(name, list(blocks), linears, ignored)


def linears_of(block: nn.Module, prefix: str) -> list[Linear]:
    """Return all linear layers of a block, in module order; `prefix` is the block's name and a dot."""
    return [
        Linear(prefix + name, child, transposed=not isinstance(child, nn.Linear))
        for name, child in block.named_modules()
        if _is_linear(child)
    ]


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two live tensors are the same numbers in the same place, perhaps in another shape."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.is_contiguous() == b.is_contiguous()


@contextmanager
def blocks_replaced(structure: Structure, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Let ``forward(hidden, *args, **kwargs)`` stand for every block's own for the duration of the context."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        return forward(*args, **kwargs)

    for block in structure.blocks:
        block.forward = call
    try:
        yield
    finally:
        for block in structure.blocks:
            del block.forward


def _alike(modules: nn.ModuleList) -> bool:
    return len({type(module) for module in modules}) == 1


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D)
