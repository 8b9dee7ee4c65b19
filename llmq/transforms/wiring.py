"""Which producer feeds which linears of a block: structure proposes, numbers dispose.

One pass shows which linears read one tensor, and which norm wrote it. A norm that wrote it is the producer to try;
failing that, each linear beside the consumers (v_proj beside o_proj, up_proj beside down_proj, the last rows of a fused
qkv_proj) that has the shape for it. No name and no class is looked at: a candidate counts if channels can be rescaled
by random factors without a change of the block's output. So the norm before a router, the GELU between two layers and
whatever else reads a channel refuse themselves, and what is refused is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmq.errors import SpecError
from llmq.families import Linear, same_memory
from llmq.transforms.folds import Fold, Norm, bias_of, scale_consumers_, scale_producer_, touched

Run = Callable[[Tensor], Tensor]  # hidden states [B, T, D] through the block, as the model would call it

TOLERANCE = 1e-5  # of what scaling only one side changes


@dataclass(frozen=True)
class Refusal:
    """A producer or consumer that cannot be folded, and why."""

    name: str
    reason: str
    residual_norm: bool  # whether it is a norm as wide as the hidden states: then nothing may be rotated


@dataclass
class Wiring:
    """What a block is made of, as far as transforms need to know."""

    folds: list[Fold] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    writers: list[Linear] = field(default_factory=list)  # as wide as the hidden states, and not fed by a norm


@dataclass(frozen=True)
class _Event:
    """One call of a module; holds the tensors, so that no two share an address."""

    x: Tensor
    out: Tensor


_Calls = dict[nn.Module, list[_Event]]


@torch.no_grad()
def find_wiring(block: nn.Module, linears: Sequence[Linear], run: Run, x: Tensor) -> Wiring:
    """Return the folds of a block, what was refused, and the linears that write to the residual stream.

    The block is left as it was.

    Args:
        block: loaded, in float32 or float64: checks in less would see only rounding.
        linears: all linears of the block, those that stay dense included. One that is missing counts as an unknown
            reader, so that what feeds it is refused.
        run: how to run the block, deterministic.
        x: hidden states to try it on, [B, T, D]. Real ones of 64 tokens do; the block runs some 15 times.
    """
    assert x.dtype in (torch.float32, torch.float64), "see above"
    calls, out = _observe(block, run, x)
    names = {module: name for name, module in block.named_modules()}
    prefix = linears[0].name.removesuffix(names[linears[0].module]) if linears else ""
    norms = {m: f"{prefix}{names[m]}" for m in calls if is_norm(m)}
    width = x.shape[-1]
    wiring = Wiring()
    fed: set[nn.Module] = set()  # norms that some linear reads
    for consumers in _stages(calls, linears):
        read = calls[consumers[0].module][0].x
        norm = next((m for m in norms if any(same_memory(event.out, read) for event in calls[m])), None)
        if norm is not None:
            fed.add(norm)
            name, reason = norms[norm], "is no plain norm, or is read by more than the linears it feeds"
            d = consumers[0].shape[1]
            candidates = [Fold(probe_norm(name, norm), 0, d, consumers, torch.arange(d))]
        else:
            name, reason = _names(consumers), "are fed by no layer beside them channel by channel"
            candidates = list(_linear_candidates(block, linears, consumers, prefix))
            wiring.writers += [consumer for consumer in consumers if consumer.shape[0] == width]
        fold = next((fold for fold in candidates if _holds(fold, run, x, out)), None)
        if fold is not None:
            wiring.folds.append(fold)
        else:
            wiring.refused.append(Refusal(name, reason, norm is not None and _width(norm) == width))
    unread = [name for module, name in norms.items() if module not in fed and _width(module) == width]
    wiring.refused += [Refusal(name, "is read by no linear layer directly", residual_norm=True) for name in unread]
    return wiring


def refuse_shared(blocks: Sequence[nn.Module]) -> None:
    """Check that no two blocks share a parameter: transforms change blocks one at a time.

    Call it on the skeleton, before tensors are loaded: loading gives every module its own.

    Raises:
        SpecError: two do.
    """
    owners: dict[int, tuple[int, str]] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            other, known = owners.setdefault(id(parameter), (index, name))
            if other != index:
                raise SpecError(
                    f"blocks {other} and {index} share one parameter ({known}, {name}): a transform of one would "
                    "change the other; quantize this model without scaling and rotation"
                )


def _observe(block: nn.Module, run: Run, x: Tensor) -> tuple[_Calls, Tensor]:
    """Return the calls of all modules with parameters that take one tensor and return one, and the block's output."""
    calls: _Calls = {}

    def hook(module: nn.Module, args: tuple[object, ...], named: dict[str, object], out: object) -> None:
        if len(args) == 1 and not named and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            calls.setdefault(module, []).append(_Event(args[0], out))

    leaves = [m for m in block.modules() if any(True for _ in m.parameters(recurse=False))]
    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in leaves]
    try:
        out = run(x)
    finally:
        for handle in handles:
            handle.remove()
    return calls, out


def _stages(calls: _Calls, linears: Sequence[Linear]) -> list[list[Linear]]:
    """Return the linears that ran, together with those that read the same memory, in the order of the first.

    Only the first call counts. What else a linear reads or a norm writes in another, the check of the fold brings up.
    """
    stages: list[list[Linear]] = []
    for linear in linears:
        if linear.module not in calls:
            continue
        read = calls[linear.module][0].x
        stage = next((s for s in stages if same_memory(calls[s[0].module][0].x, read)), None)
        if stage is None:
            stages.append([linear])
        else:
            stage.append(linear)
    return stages


def _linear_candidates(
    block: nn.Module, linears: Sequence[Linear], consumers: list[Linear], prefix: str
) -> Iterator[Fold]:
    """Yield the linears beside `consumers`, and the parts of them, that could feed them channel by channel."""
    parent = consumers[0].name.rpartition(".")[0]
    owner = block.get_submodule(parent.removeprefix(prefix)) if len(parent) > len(prefix) else block
    head_dim = getattr(owner, "head_dim", None)
    k = consumers[0].shape[1]
    for producer in linears:
        if producer.name.rpartition(".")[0] != parent or producer in consumers:
            continue
        n = producer.shape[0]
        # whole; values behind queries and keys; either half of gate and up
        parts = [(0, n), (n - (n - k) // 2, (n - k) // 2), (k, k), (0, k)]
        for start, channels in dict.fromkeys(parts):
            source = _source(channels, k, head_dim)
            if source is not None and start >= 0 and start + channels <= n:
                yield Fold(producer, start, channels, consumers, source, head_dim)


def _source(channels: int, k: int, head_dim: object) -> Tensor | None:
    """Return which channel feeds each of `k` inputs, int64 [K]: one to one, or kv heads repeated for query groups."""
    if channels == k:
        return torch.arange(k)
    if not isinstance(head_dim, int) or channels <= 0 or k % channels or channels % head_dim:
        return None
    heads = torch.arange(channels).view(-1, 1, head_dim)
    return heads.expand(-1, k // channels, -1).reshape(k)


def _holds(fold: Fold, run: Run, x: Tensor, out: Tensor) -> bool:
    """Return whether the block computes the same with the fold's channels rescaled; weights are put back.

    The factors are powers of two, so that a fold that holds does so to the last bit (but for norms of 1 + weight). What
    is left is compared with the change that one side alone makes: a large residual stream does not hide it.
    """
    generator = torch.Generator().manual_seed(fold.channels)
    c = 2.0 ** torch.randint(-2, 3, (fold.channels,), generator=generator)
    before = [(tensor, tensor.clone()) for tensor in touched(fold)]
    try:
        scale_producer_(fold, c)
        one_side = run(x) - out
        scale_consumers_(fold, c)
        both_sides = run(x) - out
    finally:
        for tensor, value in before:
            tensor.copy_(value)
    noise = 4 * torch.finfo(x.dtype).eps * out.norm()
    return bool(both_sides.norm() <= TOLERANCE * one_side.norm() + noise)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module has what a norm has: a vector of weights, perhaps one of biases, nothing else."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    return weight is not None and weight.dim() == 1 and parameters.keys() <= {"weight", "bias"}


def probe_norm(name: str, module: nn.Module) -> Norm:
    """Return how a norm uses its weight, found by setting it. What is of neither kind fails its fold's check."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    kept, bias = weight.clone(), bias_of(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=generator).to(weight)

    def response(value: float, x: Tensor) -> Tensor:
        weight.fill_(value)
        out: Tensor = module(x)
        return out if bias is None else out - bias

    try:
        silent = not response(-1.0, x).any()
        plain, moved = response(1.0, x), response(1.0, x + 1)
    finally:
        weight.copy_(kept)
    return Norm(name, module, plus_one=bool(silent), centers=torch.allclose(plain, moved, atol=1e-3))


def _width(norm: nn.Module) -> int:
    assert isinstance(norm.weight, Tensor)
    return len(norm.weight)


def _names(linears: Sequence[Linear]) -> str:
    return ", ".join(linear.name for linear in linears)
