"""Packed experts of a bank, run at once: a product for all that read its input, and one for all that read that of it.

Experts' weights lie one behind the other in one tensor, in the arrangement of the kernel, and each linear of the bank
has a view of its own: it saves, loads, moves and multiplies as it would alone. Where one of them has been given other
tensors since, they are put together anew. Where one is watched by a hook or wrapped by an adapter, where experts differ
in bits or groups, or where columns are out of order, `run` declines, and the bank runs them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import is_, itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmq import expert_ops
from llmq.expert_ops import Stack
from llmq.moe import Bank
from llmq.nn import QuantLinear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def gather_(bank: Bank, dtype: torch.dtype) -> None:
    """Let a bank's packed experts run at once, with activations of `dtype` and, from then on, of any other."""
    together = PackedExperts()
    bank.together = together
    if not any(buffer.is_meta for buffer in bank.buffers()):
        together.prepare_(bank, dtype)


def is_gathered(bank: Bank) -> bool:
    """Return whether a bank's experts run at once, so that what runs does not depend on the data."""
    return isinstance(bank.together, PackedExperts) and bank.together.is_ready


class PackedExperts:
    """All linears of a bank, as two stacks."""

    def __init__(self) -> None:
        self._held: _Held | None = None
        self._declined: torch.dtype | None = None  # of activations for which the experts cannot be put together

    @property
    def is_ready(self) -> bool:
        """Whether the experts have been put together."""
        return self._held is not None

    def run(self, bank: Bank, hidden_states: Tensor, picked: Tensor, weights: Tensor) -> Tensor | None:
        """Return what `Bank.forward` does; None: the bank's linears have to run one by one."""
        if not self._can_run(bank, hidden_states.dtype):
            return None
        held = self._held
        assert held is not None, "it can run"
        routes = expert_ops.route(picked.reshape(-1), held.first)
        inner = bank.activated(expert_ops.matmul(hidden_states, held.first, routes))
        rows = expert_ops.matmul(inner, held.last, routes)
        found: Tensor = (rows.view(*picked.shape, rows.shape[-1]) * weights[..., None]).sum(1)
        return found.to(hidden_states.dtype)

    def release_(self) -> None:
        """Let go of the stacks: what they hold is about to change."""
        self._held = self._declined = None

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _can_run(self, bank: Bank, dtype: torch.dtype) -> bool:
        """Return whether nothing is in the way, after putting together what has changed; asked once per compilation."""
        if self._held is not None and self._held.dtype == dtype and self._held.is_intact():
            return not self._held.is_watched()
        if self._declined == dtype:
            return False
        self.prepare_(bank, dtype)
        return self._held is not None and not self._held.is_watched()

    @torch.no_grad()
    def prepare_(self, bank: Bank, dtype: torch.dtype) -> None:
        """Arrange the experts' weights for activations of `dtype`, and put them together if they can be."""
        self._held, self._declined = None, dtype
        each = [bank.projections(expert) for expert in range(bank.size)]
        first, last = [module for some, _ in each for module in some], [module for _, module in each]
        if not all(type(module) is QuantLinear for module in (*first, *last)):
            return
        for module in bank.modules():
            if isinstance(module, QuantLinear) and (module.kernel is None or module.prepared_for != dtype):
                module.prepare_(dtype)
        mine, others = cast("list[QuantLinear]", first), cast("list[QuantLinear]", last)
        if _alike(mine) and _alike(others):
            parts = len(first) // bank.size
            stacks = _stack(mine, parts), _stack(others, 1)
            self._held, self._declined = _Held.of(bank, dtype, *stacks, [*mine, *others]), None

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedExperts:
        return PackedExperts()  # the copy of the bank puts its own together

    def __reduce__(self) -> tuple[type[PackedExperts], tuple[()]]:
        return PackedExperts, ()


@dataclass(frozen=True)
class _Held:
    """Two stacks, and what tells whether they still are what the linears of the bank hold.

    There may be hundreds of linears, and they are looked at for every call: so in C, by `map`.
    """

    dtype: torch.dtype  # of the activations
    first: Stack
    last: Stack
    linears: list[QuantLinear]
    buffers: list[dict[str, Tensor | None]]  # of each linear
    views: list[Tensor | None]  # what is the first of them
    parents: dict[str, list[dict[str, nn.Module | None]]]  # by local name, the modules of the experts
    hooks: list[dict[Any, Any]]
    variables: list[dict[str, Any]]  # of each linear

    @classmethod
    def of(cls, bank: Bank, dtype: torch.dtype, first: Stack, last: Stack, linears: list[QuantLinear]) -> _Held:
        """Return what is held of the `linears` of a bank, which have views of the stacks."""
        experts = [bank.get_submodule(str(expert))._modules for expert in range(bank.size)]
        return cls(
            dtype,
            first,
            last,
            linears,
            [linear._buffers for linear in linears],
            [linear._buffers["packed_0"] for linear in linears],
            {name: experts for name in bank.names if name is not None},
            [getattr(linear, hooks) for linear in linears for hooks in _HOOKS],
            [vars(linear) for linear in linears],
        )

    def is_intact(self) -> bool:
        """Return whether the linears still have the views that they were given."""
        try:
            return all(map(is_, map(itemgetter("packed_0"), self.buffers), self.views))
        except KeyError:  # one has taken its weight back from the kernel
            return False

    def is_watched(self) -> bool:
        """Return whether somebody has hooks on a linear, has put another in its place, or trains its bias."""
        if any(self.hooks) or any(
            "forward" in variables and not _only_moves(variables) for variables in self.variables
        ):
            return True
        if torch.is_grad_enabled() and any(
            linear.bias is not None and linear.bias.requires_grad for linear in self.linears
        ):
            return True
        there = {id(linear) for linear in self.linears}
        return any(id(experts[name]) not in there for name, of in self.parents.items() for experts in of)


def _only_moves(variables: dict[str, Any]) -> bool:
    """Return whether a linear's own `forward` is accelerate's, which brings inputs to where its weight is anyway."""
    hook = variables.get("_hf_hook")
    return type(hook).__name__ == "AlignDevicesHook" and not getattr(hook, "offload", True)


def _alike(linears: Sequence[QuantLinear]) -> bool:
    """Return whether linears differ in their numbers only, and their columns are in order."""
    if any("order" in linear._buffers or linear.fused is not None for linear in linears):
        return False
    kinds = {
        (linear.layer, linear.kernel, linear.bias is None, *((x.shape, x.device) for x in linear.packed()))
        for linear in linears
    }
    return len(kinds) == 1


def _stack(linears: Sequence[QuantLinear], parts: int) -> Stack:
    """Put the weights of linears that are alike one behind the other, and give each a view of its own."""
    one = linears[0]
    kernel = one.kernel
    assert kernel is not None, "they are prepared"
    wholes = []
    for tensors in zip(*(linear.packed() for linear in linears), strict=True):
        # scales that are kept as they were read may be of several dtypes, each the smallest that holds them
        dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
        wholes.append(torch.empty((len(tensors), *tensors[0].shape), dtype=dtype, device=tensors[0].device))
    for number, linear in enumerate(linears):  # in turn: memory of one is free before that of the next is copied
        views = [whole[number] for whole in wholes]
        for view, tensor in zip(views, linear.packed(), strict=True):
            view.copy_(tensor)
        linear.share_(views, None)
    bias = None
    if one.bias is not None:
        bias = torch.stack([cast("Tensor", linear.bias).data for linear in linears])
        for linear, view in zip(linears, bias, strict=True):
            cast("Tensor", linear.bias).data = view  # so that it is changed with the parameter
    for tensor in wholes if one.packed()[0].is_cuda else []:
        torch._dynamo.mark_static_address(tensor)  # CUDA graphs would take a copy of it for each replay
    return Stack(kernel, one.layer, wholes, bias, parts)
