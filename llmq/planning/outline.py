"""What a model consists of, observed on the meta device: stages, and what a forward pass of a block does and holds.

No weight is read. What is around the blocks runs once, on zeros that take no memory, to see what it passes to the
blocks; each kind of block then runs on shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq.activations import HiddenStates
from llmq.calls import Call, record
from llmq.moe import Bank, banks_of
from llmq.planning.counting import Counting, Held, Work, side, total
from llmq.preflight import Job
from llmq.stream import Batch, Stage, Stream

_META = torch.device("meta")
# what configurations call the number of experts that get a token
_PICKS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts")
_CALLS_PER_EXPERT = 12  # operations in the forward pass of one expert


@dataclass(frozen=True)
class StageOutline:
    """Linears that see one input; of a bank, those of one expert, of which there are `copies`."""

    names: tuple[str, ...]  # within the block
    shapes: tuple[tuple[int, int], ...]  # outputs and inputs of each
    copies: int = 1
    share: float = 1.0  # of all tokens that reach it
    bank: str = ""  # name of the bank within the block
    before: Work = field(default_factory=Work)  # of a forward pass up to here, for the tokens of `Outline.tokens`
    here: Work = field(default_factory=Work)  # of that, if what is final is replayed
    there: Work = field(default_factory=Work)  # and in the original block, with the last stage to its end

    @property
    def rows(self) -> int:
        """Outputs of all its linears together."""
        return sum(n for n, _ in self.shapes)

    @property
    def inputs(self) -> int:
        """Inputs of each."""
        return self.shapes[0][1]


@dataclass(frozen=True)
class BlockOutline:
    """A kind of block."""

    numbers: tuple[int, ...]  # which blocks are of it
    weight_bytes: int  # of one, all its tensors, in the dtype that it runs in
    linear_bytes: int  # of these, what will be packed
    largest_bytes: int  # of its largest tensor
    stages: tuple[StageOutline, ...]
    forward: Work  # of one pass, for the tokens of `Outline.tokens`
    advance: Work  # of the last one, if what is final is replayed
    kept: tuple[int, int]  # bytes that are kept to be replayed, of the block and of the original, for the same tokens
    workspace: int  # bytes held at once in that pass, its input and result not counted


@dataclass(frozen=True)
class Outline:
    """A model, as far as a plan needs it."""

    blocks: tuple[BlockOutline, ...]
    tokens: int  # that the forward passes of this outline are of
    width: int  # of hidden states
    outside_bytes: int  # of what is around the blocks, in the dtype that it runs in
    head: tuple[int, int]  # words and inputs of the head; (0, 0) where there is none


def outline(job: Job, windows: int, seq_len: int) -> Outline:
    """Return the outline of a job's model, with passes of one batch of `windows` windows of `seq_len` tokens.

    Raises:
        SpecError: the model's forward pass is not one that llmq can follow, or it never uses a linear.
    """
    entering, calls = _entrance(job, windows, seq_len)
    batch = Batch(_ids(windows, seq_len), None, slice(0, windows), False, True, None, [_to_meta(c) for c in calls])
    kinds: dict[object, list[int]] = {}
    for index in range(len(job.structure.blocks)):
        kinds.setdefault(_kind(job, index), []).append(index)
    return Outline(
        tuple(_block(job, _stream(batch, entering, numbers[0]), numbers) for numbers in kinds.values()),
        windows * seq_len,
        entering.shape[-1],
        sum(_bytes(job, name) for name in job.model.state_dict() if not name.startswith(job.structure.prefixes)),
        _head(job),
    )


def _ids(windows: int, seq_len: int) -> Tensor:
    return torch.zeros(windows, seq_len, dtype=torch.long)


def _entrance(job: Job, windows: int, seq_len: int) -> tuple[Tensor, list[Call]]:
    """Return what enters the first block, all zeros, and the calls of all blocks."""
    structure = job.structure
    outside = [name for name in job.model.state_dict() if not name.startswith(structure.prefixes)]
    if structure.family.shared:
        starts = tuple(structure.prefixes[start] for start in structure.starts)
        outside += [name for name in job.model.state_dict() if name.startswith(starts)]
    with _zeros(job.model, outside):
        return record(job.model, structure, _ids(windows, seq_len), None)


@contextmanager
def _zeros(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Let parameters be one zero each, seen in all places, for the duration of the context."""
    with ExitStack() as stack:
        for name in names:
            parent, _, local = name.rpartition(".")
            module = model.get_submodule(parent)
            old = module._parameters.get(local)
            if old is None or not old.is_meta:
                continue
            zero = torch.zeros((), dtype=old.dtype).expand(old.shape)
            module._parameters[local] = nn.Parameter(zero, requires_grad=False)
            stack.callback(module._parameters.__setitem__, local, old)
        yield


def _stream(batch: Batch, entering: Tensor, index: int) -> Stream:
    """Return a stream on the meta device in front of a block; what an encoder returns lies beside its own states."""
    hidden = HiddenStates(_META)
    width = entering.shape[-1] + batch.calls[index].memory
    hidden.append(torch.empty(*entering.shape[:-1], width, dtype=entering.dtype, device=_META))
    return Stream([batch], hidden, replays=True)


def _to_meta(call: Call) -> Call:
    def moved(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(_META)
        if isinstance(x, tuple):
            return tuple(moved(y) for y in x)
        return {name: moved(y) for name, y in x.items()} if isinstance(x, dict) else x

    return replace(call, args=moved(call.args), kwargs=moved(call.kwargs))


def _kind(job: Job, index: int) -> object:
    """Return what two blocks have in common that compute the same."""
    block, prefix = job.structure.blocks[index], job.structure.prefixes[index]
    linears = tuple((linear.name.removeprefix(prefix), linear.shape) for linear in job.structure.linears[index])
    attention = [getattr(m, "is_sliding", None) for m in block.modules() if hasattr(m, "is_sliding")]
    return type(block).__name__, linears, tuple(attention), index >= job.structure.starts[-1]


def _block(job: Job, stream: Stream, numbers: list[int]) -> BlockOutline:
    index = numbers[0]
    block, prefix, linears = job.structure.blocks[index], job.structure.prefixes[index], job.structure.linears[index]
    banks = banks_of(block)
    with _on_meta(block), _stubs(banks.values()), _fused_attention():
        stages = stream.stages(block, index, linears) if linears else []
        watched = [banks[stage.experts.bank] if stage.experts else stage.linears[0].module for stage in stages]
        marks: dict[nn.Module, Work] = {}
        with Held() as held, Counting() as counting, _marking(watched, marks, counting), torch.no_grad():
            result = stream.through(block, index, 0, stream.hidden[0])
        passes = _passes(stream, block, index, stages)
    tokens = stream.batches[0].ids.numel()
    experts = total(_experts_work(job, bank, tokens) for bank in banks.values())
    found = tuple(
        _stage(job, stage, prefix, (marks[module], here, there), tokens)
        for stage, module, here, there in zip(stages, watched, passes.here, passes.there, strict=True)
    )
    sizes = [_bytes(job, name) for name in job.names if name.startswith(prefix)]
    packed = sum(_bytes(job, f"{linear.name}.weight") for linear in linears)
    return BlockOutline(
        tuple(numbers),
        sum(sizes),
        packed,
        max(sizes, default=0),
        found,
        counting.work + experts,
        passes.advance + experts,
        passes.kept,
        held.peak - result.nbytes,
    )


@dataclass(frozen=True)
class _Passes:
    """What the passes of one batch take while a block is worked on."""

    here: list[Work]  # by stage
    there: list[Work]  # in the original block
    advance: Work
    kept: tuple[int, int]


def _passes(stream: Stream, block: nn.Module, index: int, stages: list[Stage]) -> _Passes:
    """Run all passes that a block gets from its first stage on."""
    reference = stream.fork()
    reference.follow(stream, block)
    found: tuple[list[Work], list[Work]] = ([], [])
    kept = [0, 0]
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        for which, (one, works) in enumerate(zip((stream, reference), found, strict=True)):
            with Counting() as counting:
                if stage.experts is None:
                    one.inputs(block, index, stage, 0, passing=last and one is reference)
                elif not stage.experts.last:
                    one.arguments(block, index, 0, block.get_submodule(stage.experts.bank), stage.calls)
                kept[which] = max(kept[which], one.kept_bytes)
                if last and one is reference and stage.experts is not None:
                    one.advance(block, index)
            works.append(counting.work)
    with Counting() as counting:
        stream.advance(block, index)
    return _Passes(*found, counting.work, (kept[0], kept[1]))


def _stage(job: Job, stage: Stage, prefix: str, works: tuple[Work, Work, Work], tokens: int) -> StageOutline:
    """Return the outline of a stage; that of a bank stands for one expert."""
    experts, linears = stage.experts, stage.linears
    if experts is None:
        names = tuple(linear.name.removeprefix(prefix) for linear in linears)
        shapes = tuple(linear.shape for linear in linears)
        return StageOutline(names, shapes, before=works[0], here=works[1], there=works[2])
    first = linears[0].name.rpartition(".")[0]
    mine = [linear for linear in linears if linear.name.rpartition(".")[0] == first]
    bank = next(m for m in job.model.modules() if isinstance(m, Bank) and linears[0].module in m.places())
    copies, share = len(linears) // len(mine), _picks(job) / bank.size
    if experts.last:  # nothing but the experts themselves runs once more
        once = _experts_work(job, bank, tokens)
        works = once * (2 / 3), works[1] + once * (2 / 3), works[2] + once * (5 / 3)
    names = tuple(linear.name.removeprefix(prefix) for linear in mine)
    return StageOutline(names, tuple(linear.shape for linear in mine), copies, share, experts.bank, *works)


def _picks(job: Job) -> int:
    """Return how many experts get each token."""
    config = job.model.config.get_text_config()
    return next((int(getattr(config, key)) for key in _PICKS if getattr(config, key, None)), 1)


def _experts_work(job: Job, bank: Bank, tokens: int) -> Work:
    """Return what a bank's forward pass takes."""
    first, last = bank.projections(0)
    weights = [module.weight for module in (*first, last)]
    rows = tokens * _picks(job)
    dtype = str(job.dtype).removeprefix("torch.")
    flops = sum(2.0 * rows * w.shape[0] * w.shape[1] for w in weights if isinstance(w, Tensor))
    width = sum(w.shape[0] + w.shape[1] for w in weights if isinstance(w, Tensor)) * job.dtype.itemsize
    work = Work(far=float(rows * width), calls=float(_CALLS_PER_EXPERT * bank.size))
    work.products[dtype, side(rows / bank.size)] = flops
    return work


@contextmanager
def _marking(modules: Iterable[nn.Module], marks: dict[nn.Module, Work], counting: Counting) -> Iterator[None]:
    """Note what has been done when each of `modules` is first called."""

    def mark(module: nn.Module, _: Any) -> None:
        marks.setdefault(module, counting.work + Work())

    handles = [module.register_forward_pre_hook(mark) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _on_meta(block: nn.Module) -> Iterator[None]:
    """Let buffers that a block has computed be shapes only, for the duration of the context."""
    with ExitStack() as stack:
        for module in block.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    stack.callback(module._buffers.__setitem__, name, buffer)
                    module._buffers[name] = buffer.to(_META)
        yield


@contextmanager
def _stubs(banks: Iterable[Bank]) -> Iterator[None]:
    """Let banks return nothing of their experts: which token goes where is not known on the meta device."""
    with ExitStack() as stack:
        for bank in banks:
            bank.forward = _no_expert  # type: ignore[method-assign]
            stack.callback(delattr, bank, "forward")
        yield


def _no_expert(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(hidden_states)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Let attention be the fused kernel that devices run; on the meta device torch takes the one that holds scores."""
    usual = nn.functional.scaled_dot_product_attention

    def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any) -> Any:
        if q.shape[-1] != v.shape[-1] or q.ndim != 4:
            return usual(q, k, v, attn_mask, dropout_p, **options)
        heads = q.shape[1] // k.shape[1]
        k, v = (x.unsqueeze(2).expand(-1, -1, heads, -1, -1).flatten(1, 2) if heads > 1 else x for x in (k, v))
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        causal = bool(options.get("is_causal", False))
        return run(q, k, v, dropout_p, causal, attn_mask=attn_mask, scale=options.get("scale"))[0]

    nn.functional.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = usual


def _bytes(job: Job, name: str) -> int:
    """Return the bytes that a tensor of the model takes in memory; 0 if it is none of the files."""
    if name not in job.names:
        return 0
    info = job.source.info(job.names[name])
    itemsize = job.dtype.itemsize if info.dtype.is_floating_point else info.dtype.itemsize
    return math.prod(info.shape) * itemsize


def _head(job: Job) -> tuple[int, int]:
    head = job.model.get_output_embeddings()
    weight = None if head is None else head.weight
    return tuple(weight.shape) if isinstance(weight, Tensor) else (0, 0)  # type: ignore[return-value]
