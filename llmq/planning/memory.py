"""How much memory a run holds at once, part by part, and the least that it has to give up to stay under a limit.

Parts that live as long as the run are added up; of what lives for a phase (measuring, solving, writing …) only the
largest counts. Nothing here says what the code does: outlines and miniatures of it are asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from llmq.budget import TOKENS_PER_BATCH, Budget
from llmq.errors import SpecError
from llmq.hessian import HessianSum
from llmq.planning.counting import Held
from llmq.planning.miniature import held
from llmq.planning.outline import BlockOutline, Outline, StageOutline, outline
from llmq.preflight import Job
from llmq.ranks import LANES

_SLACK = 1.04  # of what is beyond the base: holes between the blocks that the allocator hands out
_LIBRARIES = 60 * 10**6  # buffers that MKL and oneDNN keep once they have multiplied
_TUNED = 34  # bytes per weight while a block is tuned: latents, gradients, two moments, the graph, two copies of codes
_KEPT = 9  # bytes per weight of a block that waits for model tuning: codes, scales, norms, and its dense weight once
_LOGITS = 24  # bytes per token and word: logits of teacher and student, their logarithms and gradients
_TUNING_TOKENS = 2048  # per gradient step and per pass of guidance
_LEAST_ROWS = 256


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by what they are for."""

    host: dict[str, int]
    device: dict[str, int] = field(default_factory=dict)  # of a GPU

    @property
    def total(self) -> int:
        """All bytes of the host."""
        return sum(self.host.values())

    @property
    def device_total(self) -> int:
        """All bytes of the device."""
        return sum(self.device.values())


class MemoryModel:
    """What a job holds, for any budget.

    Args:
        job: the job; its own budget does not matter.
        windows: all that run through the model: text, random tokens and what is held out.
        seq_len: tokens of each.
        base: bytes that the process has resident before work starts.
        gpu: whether blocks are computed on a device with memory of its own.
    """

    def __init__(self, job: Job, windows: int, seq_len: int, base: int, *, gpu: bool = False) -> None:
        self.job, self.windows, self.seq_len, self.base, self.gpu = job, windows, seq_len, base, gpu
        self.calibrated = job.solver.calibrated
        size = max(1, min(windows, TOKENS_PER_BATCH // seq_len))
        self.outline: Outline = outline(job, size, seq_len)
        self._held: dict[tuple[object, ...], int] = {}
        self._adding = _adding(job)

    def estimate(self, budget: Budget) -> Memory:
        """Return what is held at the peak under `budget`."""
        lasting = self._lasting(budget)
        phases = self._phases(budget)
        most = max(phases, key=lambda phase: phases[phase])
        parts = {**lasting, most: phases[most]}
        if not self.gpu:
            beyond = round((_SLACK - 1) * sum(parts.values()))
            base = self.base + (_LIBRARIES if self.calibrated else 0)
            return Memory({"process and libraries": base, **parts, "unused holes": beyond})
        reading = max(self._checking(), 2 * max(block.largest_bytes for block in self.outline.blocks))
        host = {"process and libraries": self.base, "tensors on their way": reading}
        return Memory(host, parts)

    def budgets(self) -> Iterator[Budget]:
        """Yield what a run may do, the fastest first, the thriftiest last."""
        yield Budget()
        if not self.calibrated:
            return
        tokens: int = TOKENS_PER_BATCH
        yield Budget(replays=False)
        thrifty = Budget(replays=False, cached=False)
        yield thrifty
        while tokens // 2 >= self.seq_len:
            tokens //= 2
            yield replace(thrifty, batch_tokens=tokens)
        rows = max(stage.rows for block in self.outline.blocks for stage in block.stages)
        while rows // 2 >= _LEAST_ROWS:
            rows //= 2
            yield replace(thrifty, batch_tokens=tokens, solver_rows=rows)

    def fit(self, limit: int | None) -> Budget:
        """Return the first budget that keeps the run under `limit` bytes; None: no limit.

        Raises:
            SpecError: none does.
        """
        least: Memory | None = None
        for budget in self.budgets():
            memory = self.estimate(budget)
            if limit is None or memory.total <= limit:
                return budget
            least = memory if least is None or memory.total < least.total else least
        assert least is not None, "there is always a first budget"
        name, size = max(least.host.items(), key=lambda part: part[1])
        raise SpecError(
            f"--max-memory {_gib(limit or 0)}: this run needs at least {_gib(least.total)}, of which {_gib(size)} are "
            f"for {name}; allow more, or quantize with a recipe that holds less (--preset fast, --shift 0)"
        )

    def _lasting(self, budget: Budget) -> dict[str, int]:
        """Return what lives as long as blocks are walked through."""
        job, recipe, out = self.job, self.job.recipe, self.outline
        parts: dict[str, int] = {}
        outside = recipe.guidance_groups or recipe.tune_epochs or recipe.rotation != "none"
        if outside and self.calibrated:
            parts["what is around the blocks"] = out.outside_bytes
        largest = max(out.blocks, key=lambda block: block.weight_bytes)
        copies = 2 if job.needs_reference and self.calibrated else 1
        parts["a block" if copies == 1 else "a block and its original"] = copies * largest.weight_bytes
        if recipe.tune_steps:
            parts["original weights to tune by"] = largest.linear_bytes
        parts["packed weights of a block"] = self._codes(largest)
        if self.calibrated:
            tokens, streams = self.windows * self.seq_len, 2 if job.needs_reference else 1
            if not budget.cached:
                tokens = min(tokens, budget.batch_tokens)
            memory = 2 if len(job.structure.starts) > 1 else 1
            parts["hidden states"] = tokens * out.width * memory * job.dtype.itemsize * streams
            if budget.replays:
                kept = max(block.kept[0] + job.paired * block.kept[1] for block in out.blocks)
                parts["parts of a block that are final"] = round(kept * tokens / out.tokens)
            groups = recipe.guidance_groups
            if groups:
                parts["weights of tokens"] = 4 * groups * len(job.linears) * self.windows * self.seq_len
        if recipe.tune_epochs:
            parts["blocks to be tuned together"] = sum(
                len(block.numbers) * _KEPT * block.linear_bytes // job.dtype.itemsize for block in out.blocks
            )
        return parts

    def _phases(self, budget: Budget) -> dict[str, int]:
        """Return what each phase holds besides."""
        job, out = self.job, self.outline
        share = min(budget.batch_tokens, self.windows * self.seq_len) / out.tokens
        phases = {"checking weights": 0 if self.gpu else self._checking()}
        for block in out.blocks:
            workspace = round(block.workspace * share)
            phases["forward pass of a batch"] = max(phases.get("forward pass of a batch", 0), workspace)
            for stage in block.stages:
                what = f"Hessians and solver of {stage.names[0]}"
                phases[what] = max(self._stage(stage, budget, workspace), phases.get(what, 0))
            if job.recipe.tune_steps:
                graph = 4 * block.workspace * _TUNING_TOKENS / out.tokens
                tuned = _TUNED * block.linear_bytes // job.dtype.itemsize
                phases["tuning a block"] = max(phases.get("tuning a block", 0), round(graph) + tuned)
        if job.recipe.guidance_groups or job.recipe.tune_epochs:
            tokens = max(_TUNING_TOKENS, self.seq_len)
            logits = _LOGITS * tokens * out.head[0] + round(4 * out.blocks[0].workspace * tokens / out.tokens)
            whole = sum(len(block.numbers) * block.weight_bytes for block in out.blocks)
            if job.recipe.guidance_groups:
                phases["gradients of the whole model"] = whole + logits
            if job.recipe.tune_epochs:
                phases["tuning the model"] = logits
        return phases

    def _stage(self, stage: StageOutline, budget: Budget, workspace: int) -> int:
        """Return what measuring and solving a stage holds."""
        job, k = self.job, stage.inputs
        judged = self.calibrated and job.recipe.held_out > 0
        if not self.calibrated:
            return self._solving(stage, budget, judged)
        batch = min(budget.batch_tokens, self.windows * self.seq_len)
        one = 4 * k * k * (1 + job.paired)
        lanes = min(LANES, -(-self.windows * self.seq_len // batch))
        sums = one * (1 + judged)
        bank = 0
        if stage.bank:
            tokens = self.windows * self.seq_len
            bank = tokens * self.outline.width * job.dtype.itemsize * (1 + job.paired)
            bank += stage.copies * self._weights(stage) + sums  # those of all tokens
        inputs = batch * k * job.dtype.itemsize
        measuring = (
            sums
            + one * (lanes > 1 + judged)
            + max(workspace + inputs, inputs * (1 + job.paired) + round(self._adding * batch * k))
        )
        return bank + max(measuring, self._solving(stage, budget, judged))

    def _solving(self, stage: StageOutline, budget: Budget, judged: bool) -> int:
        tokens = self.windows * self.seq_len * stage.share
        few = tokens < 64 * stage.inputs  # what the solver decides by the number of tokens is the same above
        key = (stage.shapes, budget.solver_rows, judged, few and tokens)
        if key not in self._held:
            job = replace(self.job, budget=budget)
            self._held[key] = held(job, stage.shapes, tokens if few else 64.0 * stage.inputs, judged=judged)
        return self._held[key]

    def _checking(self) -> int:
        """Return what looking for NaN holds: the largest tensor, its magnitudes, and three bytes per number."""
        infos = [self.job.source.info(key) for key in self.job.names.values()]
        return max(2 * info.nbytes + 3 * (info.nbytes // info.dtype.itemsize) for info in infos)

    def _codes(self, block: BlockOutline) -> int:
        return sum(stage.copies * self._weights(stage) for stage in block.stages)

    def _weights(self, stage: StageOutline) -> int:
        """Return the bytes of the linears of a stage as solved: codes, scales and zeros."""
        return sum(n * k + 8 * n * self.job.spec.groups(k) for n, k in stage.shapes)


def fit(job: Job, windows: int, seq_len: int, limit: int | None, base: int, *, gpu: bool = False) -> Budget:
    """Return the first budget that keeps a job under `limit` bytes of host memory; see `MemoryModel`.

    Raises:
        SpecError: none does.
    """
    if limit is None:
        return Budget()
    return MemoryModel(job, windows, seq_len, base, gpu=gpu).fit(limit)


def windows_of(job: Job, samples: int) -> int:
    """Return how many windows run through the model if the calibration has `samples`."""
    recipe = job.recipe
    held_out = min(max(round(recipe.held_out * samples), 1), samples - 1) if recipe.held_out and samples > 1 else 0
    random = 0
    if recipe.random_windows and not recipe.response_only:
        random = max(1, round(recipe.random_windows * (samples - held_out)))
    return samples + random


def _adding(job: Job) -> float:
    """Return the bytes that adding to a Hessian holds, per token and input."""
    t, k = 512, 64
    x = torch.randn(t, k, generator=torch.Generator().manual_seed(0)).to(job.dtype)
    reference = x.clone() if job.paired else None
    total = HessianSum(k, torch.device("cpu"), paired=job.paired)
    total.add_(x, None, None, reference)  # makes room for the sums
    with Held() as live:
        total.add_(x, None, None, reference)
    return float(live.peak) / (t * k)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


__all__ = ["Memory", "MemoryModel", "fit", "windows_of"]
