"""Which linear layers of one module see the same input: q, k and v of an attention, gate and up of a gated MLP.

Their names are not asked. A model runs without its weights until each kind of module with candidates has run once; what
is called there with one and the same tensor sees it in all modules of that kind. That takes some milliseconds. A model
that fails on the way has shown less, and no more than that is believed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llmq.moe import Bank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 2  # of the pass: one alone is the way of a cache in some models
_LARGE = 2**22  # elements of stacks of matrices
_Seen = list[tuple[str, Tensor, int]]  # who was called, with what, and how often that had been changed by then


class _Enough(Exception):  # noqa: N818  not an error
    """Ends a pass that has shown everything."""


def sharing(model: PreTrainedModel, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return which of the linear layers `names` are called with the same tensor, in groups, each in order of calls.

    Those of one group are children of one module, which calls each once. Experts of a bank are left out: each sees
    what its router sends to it. The parameters of `model` are on the meta device.
    """
    parents = _parents(model, names)
    kinds: dict[object, list[str]] = {}
    for name, locals_ in parents.items():
        kinds.setdefault(_kind(name, model.get_submodule(name), locals_), []).append(name)
    seen: dict[str, _Seen] = {like[0]: [] for like in kinds.values()}  # by the first module of each kind
    if seen:
        _watch(model, seen, parents)
    return [
        tuple(f"{name}.{local}" for local in group)
        for like in kinds.values()
        for group in _groups(seen[like[0]])
        for name in like
    ]


def _parents(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Return the modules with several of the layers `names` of as many inputs, and the local names of these."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Bank))
    children: dict[str, list[str]] = {}
    for name in names:
        parent, _, local = name.rpartition(".")
        if parent and not name.startswith(inside):
            children.setdefault(parent, []).append(local)
    return {name: locals_ for name, locals_ in children.items() if len(locals_) > 1}


def _kind(name: str, parent: nn.Module, locals_: list[str]) -> object:
    """Return what modules have in common that call their layers in the same way: all but their number."""
    plain = {key: x for key, x in vars(parent).items() if isinstance(x, (bool, str, type(None)))}
    return re.sub(r"\d+", "#", name), type(parent), tuple(locals_), tuple(sorted(plain.items(), key=lambda kv: kv[0]))


def _groups(seen: _Seen) -> Iterator[list[str]]:
    """Yield the layers that were called once, and with the same tensor."""
    called = [local for local, _, _ in seen]
    once = [entry for entry in seen if called.count(entry[0]) == 1]
    while once:
        _, x, version = once[0]
        group = [local for local, other, later in once if other is x and later == version]
        if len(group) > 1:
            yield group
        once = [entry for entry in once if entry[0] not in group]


@torch.no_grad()
def _watch(model: PreTrainedModel, seen: dict[str, _Seen], parents: dict[str, list[str]]) -> None:
    """Run `model` until the modules in `seen` have run, and write down what their layers are called with."""
    missing = set(seen)

    def entering(name: str, local: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name in missing and args and isinstance(args[0], Tensor):
                seen[name].append((local, args[0], args[0]._version))

        return hook

    def leaving(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            missing.discard(name)
            if not missing:
                raise _Enough

        return hook

    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="cpu")
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    known = signature(model.forward).parameters
    with ExitStack() as stack, _hollow(model), torch.device("cpu"):  # a loader may have set another
        for name in seen:
            parent = model.get_submodule(name)
            stack.callback(parent.register_forward_hook(leaving(name)).remove)
            for local in parents[name]:
                hook = parent.get_submodule(local).register_forward_pre_hook(entering(name, local))
                stack.callback(hook.remove)
        try:
            model(**{name: x for name, x in inputs.items() if name in known})
        except Exception:  # `_Enough`, or one of the many ways in which a model fails without its weights
            return


@contextmanager
def _hollow(model: nn.Module) -> Iterator[None]:
    """Let `model` run on a CPU without its weights for the duration of the context: linear layers return zeros.

    Other parameters are one zero each, seen in all places. Large ones, which somebody might copy, stay where they are.
    """
    from transformers.pytorch_utils import Conv1D

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D, Bank)):
                outputs = getattr(module, "nf", getattr(module, "out_features", None))  # None: a bank
                module.forward = partial(_zeros, outputs)  # type: ignore[method-assign]
                stack.callback(delattr, module, "forward")
            for tensors in cast("tuple[dict[str, Any], ...]", (module._parameters, module._buffers)):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta and (tensor.ndim < 3 or tensor.numel() < _LARGE):
                        stack.callback(tensors.__setitem__, name, tensor)
                        zero = torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
                        tensors[name] = zero if tensors is module._buffers else nn.Parameter(zero, requires_grad=False)
        yield


def _zeros(outputs: int | None, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stand for a layer with so many outputs, or with as many as inputs."""
    return x.new_zeros(*x.shape[:-1], x.shape[-1] if outputs is None else outputs)
