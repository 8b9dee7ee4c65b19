"""Tokens per second of a packed model and of a dense one, measured in turns in the same process.

On a GPU a decoding step is a CUDA graph over a cache of fixed size: call by call, launching takes longer than the work
of most models. Where one of the two models cannot be captured neither is, and the result says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmq.checkpoint import resolve
from llmq.environment import machine, peak_memory, versions
from llmq.hf import load
from llmq.packed import PackedCheckpoint
from llmq.verify.reference import folder_of, reference_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COPIED = 256 << 20  # bytes that are copied to find the bandwidth of memory, far beyond the caches
_COPIES = 7
_WARM = 2  # steps in front of a capture: they compile, and allocate what is kept


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats of one measurement."""

    kind: str  # decode: one token more of each sequence, at `length`; prefill: `length` tokens of each at once
    batch: int
    length: int
    packed: float  # tokens per second
    dense: float
    ratio: float  # median of packed over dense, each pair taken one after the other
    bandwidth_share: float | None  # decode: bytes of packed weights per second, over what a copy moves
    how: str  # both were run: as a CUDA graph, or call by call


@dataclass(frozen=True)
class Benchmark:
    """What `benchmark` measured, and on what."""

    path: str
    dense: str  # what the packed model is compared with
    dtype: str
    speeds: tuple[Speed, ...]
    packed_bytes: int  # of weights in memory
    dense_bytes: int
    bandwidth: float  # bytes per second that a large copy reads and writes
    peak_memory: dict[str, int]  # of the process, both models in it
    machine: dict[str, object]
    versions: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        batches: sequences that are decoded at once.
        prompt: tokens of a prefill, and in front of the first token that is decoded.
        repeats: of each measurement.
    """

    batches: Sequence[int] = (1, 4, 16, 64)
    prompt: int = 128
    repeats: int = 15


def benchmark(
    folder: str | Path, plan: Plan, *, dtype: torch.dtype, device: torch.device, against: str | Path | None = None
) -> Benchmark:
    """Return the speed of the packed `folder` next to that of the dense folder `against`, or of its own weights.

    Raises:
        CheckpointError: a folder is not a checkpoint of its kind.
    """
    packed = PackedCheckpoint(resolve(folder))
    model = load(packed.path, dtype=dtype, device=device)
    if against is None:
        dense = reference_model(packed, dtype).to(device)  # type: ignore[arg-type]
    else:
        dense = load(folder_of(resolve(against)).path, dtype=dtype, device=device)
    read, rate = weight_bytes(model, read=True), bandwidth(device)
    speeds = [
        _speed(kind, batch, plan, (model, dense), (read, rate))
        for kind, batches in (("decode", plan.batches), ("prefill", (1,)))
        for batch in batches
    ]
    return Benchmark(
        path=str(packed.path),
        dense="its own weights" if against is None else str(against),
        dtype=str(dtype).removeprefix("torch."),
        speeds=tuple(speeds),
        packed_bytes=weight_bytes(model),
        dense_bytes=weight_bytes(dense),
        bandwidth=rate,
        peak_memory=peak_memory(device),
        machine=machine(device),
        versions=versions(),
    )


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a copy of much more than the caches hold reads and writes, the best of some."""
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED / min(_seconds(lambda: target.copy_(source), device) for _ in range(_COPIES))


def weight_bytes(model: nn.Module, *, read: bool = False) -> int:
    """Return the bytes of the parameters and buffers of `model`; if `read`, of those that one token takes all of."""
    embedding: Any = model.get_input_embeddings() if read else None  # type: ignore[operator]
    head: Any = model.get_output_embeddings() if read else None  # type: ignore[operator]
    tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)
    skipped = () if embedding is None or tied else (*embedding.parameters(), *embedding.buffers())
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for key, tensor in tensors.items() if key not in {id(other) for other in skipped})


@torch.no_grad()
def _speed(
    kind: str, batch: int, plan: Plan, models: tuple[PreTrainedModel, PreTrainedModel], memory: tuple[int, float]
) -> Speed:
    """Measure both models in turns, after one round that does not count."""
    draw = torch.Generator().manual_seed(0)
    device = models[0].device
    vocabulary = int(models[0].config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (batch, plan.prompt), generator=draw).to(device)
    if kind == "decode":
        steps, how = _decoding(models, ids, 1 + plan.repeats)
    else:
        steps, how = [_prefilling(model, ids) for model in models], "call by call"
    times: list[list[float]] = [[_seconds(step, device) for step in steps] for _ in range(1 + plan.repeats)][1:]
    tokens = batch * (1 if kind == "decode" else plan.prompt)
    packed, dense = (median(column) for column in zip(*times, strict=True))
    return Speed(
        kind=kind,
        batch=batch,
        length=plan.prompt,
        packed=tokens / packed,
        dense=tokens / dense,
        ratio=median(other / own for own, other in times),
        bandwidth_share=memory[0] / packed / memory[1] if kind == "decode" else None,
        how=how,
    )


def _decoding(models: Sequence[PreTrainedModel], ids: Tensor, count: int) -> tuple[list[Callable[[], object]], str]:
    """Return what adds one token to each sequence of `ids`, `count` times, with each of the models; and how it runs.

    It runs alike for all, so that their times compare.
    """
    growing = "call by call, with a cache that grows"
    if not _has_graphs(ids.device):
        return [_growing(model, ids) for model in models], growing
    try:
        steps = [_captured(_static(model, ids, _WARM + count), ids.device) for model in models]
    except Exception as error:  # of any type: not every model has such a cache, nor a step that never waits
        reason = next(iter(str(error).splitlines()), "")
        return [_growing(model, ids) for model in models], f"{growing}: no CUDA graph, {type(error).__name__}: {reason}"
    return steps, "as a CUDA graph, with a cache of fixed size"


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _captured(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return what replays `step`, of which `_WARM` have been run."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            alive = (step, step())  # what the graph reads has to live as long as it does

    def replay() -> object:
        graph.replay()
        return alive

    return replay


def _static(model: PreTrainedModel, ids: Tensor, count: int) -> Callable[[], object]:
    """Return what adds one token to each sequence of `ids`, `count` times, in a cache with room for just these."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + count)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    last = ids[:, -1:].clone()
    return lambda: model(last, past_key_values=cache, use_cache=True)


def _growing(model: PreTrainedModel, ids: Tensor) -> Callable[[], object]:
    """Return what adds one token to each sequence of `ids`, and again."""
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    last = ids[:, -1:]
    return lambda: model(last, past_key_values=cache, use_cache=True)


def _prefilling(model: PreTrainedModel, ids: Tensor) -> Callable[[], object]:
    """Return what reads the sequences `ids` from their beginning."""
    return lambda: model(ids, use_cache=True, logits_to_keep=1)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
