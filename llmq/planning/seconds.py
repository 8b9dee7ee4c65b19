"""How long a run takes: what each phase does, as outlines and miniatures of it show, at the speeds of a machine."""

from __future__ import annotations

from llmq.planning.counting import Work, total
from llmq.planning.machine import Machine
from llmq.planning.miniature import adding, packing_growth, solver_growth
from llmq.planning.outline import BlockOutline, Outline, StageOutline
from llmq.preflight import Job

_TUNING_TOKENS = 2048  # per gradient step
_BACKWARD = 3.0  # passes that a gradient step takes: forward, and twice that back
_AGAIN = 4.0  # where blocks are run once more on the way back
_GUIDED = 3.0  # no gradients of weights: forward, again, back
_CHECKS = 11  # looks at held-out batches while a block is tuned
_FAKE = 60.0  # bytes per weight and gradient step, to quantize it and to move it
_ENTERED = 3  # files made safe for each stage: its record, its tensors, the folder


class TimeModel:
    """What a job takes.

    Args:
        job: the job.
        outline: its model.
        windows: all that run through the model.
        seq_len: tokens of each.
        machine: how fast it is.
    """

    def __init__(self, job: Job, outline: Outline, windows: int, seq_len: int, machine: Machine) -> None:
        self.job, self.outline, self.machine = job, outline, machine
        self.tokens = windows * seq_len if job.solver.calibrated else 0
        size = max(1, job.budget.batch_tokens // seq_len)
        self.batches = -(-windows // size)
        self.passes = self.tokens / outline.tokens  # of the outline's batch
        self.growth = {few: solver_growth(job, few_tokens=few) for few in {self._few(s) for s in self._stages()}}
        self.packing = packing_growth(job)

    def phases(self) -> dict[str, float]:
        """Return the seconds of each phase, by the names that reports have."""
        job, blocks = self.job, self.outline.blocks
        found = {"check": self._checking()}
        if job.solver.calibrated and (job.recipe.guidance_groups or job.recipe.tune_epochs):
            found |= self._whole_model()
        found["load"] = sum(len(b.numbers) * b.weight_bytes for b in blocks) / self.machine.far
        if job.solver.calibrated:
            found["forward"] = sum(len(b.numbers) * self._forward(b) for b in blocks)
        found["solve"] = sum(len(b.numbers) * self._solving(b) for b in blocks)
        if job.solver.calibrated and job.recipe.tune_steps:
            found["tune blocks"] = sum(len(b.numbers) * self._tuning(b) for b in blocks)
        found["write"] = self._writing()
        return found

    def _stages(self) -> list[StageOutline]:
        return [stage for block in self.outline.blocks for stage in block.stages]

    def _few(self, stage: StageOutline) -> bool:
        """Return whether the solver tries stronger damping too (`llmq.layers`)."""
        return self.tokens * stage.share < 16 * stage.inputs

    def _checking(self) -> float:
        """Return the time of reading and hashing every weight and looking at it."""
        size = sum(self.job.source.info(key).nbytes for key in self.job.names.values())
        looks = total(self.packing.at(n, k) for n, k in (linear.shape for linear in self.job.linears))
        return size / self.machine.read + size / self.machine.hash + self.machine.seconds(looks) / 2

    def _forward(self, block: BlockOutline) -> float:
        """Return the time that hidden states and Hessians of one block take."""
        job = self.job
        replays, pairs = job.budget.replays, job.paired and len(block.stages) > 0
        work = [(block.advance if replays else block.forward) * self.passes]
        for stage in block.stages:
            work.append((stage.here if replays else stage.before) * self.passes)
            if pairs:
                work.append((stage.there if replays else stage.before) * self.passes)
            work.append(self._adding(stage) * stage.copies)
        if pairs and not replays:  # the pass for the last stage goes on to the end
            work += [block.forward * self.passes, block.stages[-1].before * -self.passes]
        if job.needs_reference and not pairs:
            work.append(block.forward * self.passes)
        states = self.tokens * self.outline.width * self.job.dtype.itemsize * (1 + self.job.needs_reference)
        files = self.batches * (1 + self.job.needs_reference) * self.machine.sync
        return self.machine.seconds(total(work)) + states / self.machine.write + files

    def _adding(self, stage: StageOutline) -> Work:
        return adding(self.job, self.tokens * min(1.0, stage.share), stage.inputs)

    def _solving(self, block: BlockOutline) -> float:
        return self.machine.seconds(total(self._stage(stage) * stage.copies for stage in block.stages))

    def _stage(self, stage: StageOutline) -> Work:
        """Return the work of solving a stage, as many rows at a time as the budget says."""
        growth = self.growth[self._few(stage)]
        rows = min(self.job.budget.solver_rows or stage.rows, stage.rows)
        whole, rest = divmod(stage.rows, rows)
        work = growth.at(rows, stage.inputs) * whole
        return work + growth.at(rest, stage.inputs) if rest else work

    def _tuning(self, block: BlockOutline) -> float:
        """Return the time of the gradient steps on a block."""
        recipe, held_out = self.job.recipe, max(self.job.recipe.held_out, 1 / max(1, self.batches))
        steps = block.forward * (_BACKWARD * recipe.tune_steps * min(_TUNING_TOKENS, self.tokens) / self.outline.tokens)
        looks = block.forward * (_CHECKS * held_out * self.passes)
        weights = block.linear_bytes // self.job.dtype.itemsize
        fake = Work(far=_FAKE * weights * recipe.tune_steps)
        return self.machine.seconds(steps + looks + fake)

    def _whole_model(self) -> dict[str, float]:
        """Return the times of passes through all blocks with gradients."""
        recipe, (words, width) = self.job.recipe, self.outline.head
        blocks = total(b.forward * (len(b.numbers) * self.passes) for b in self.outline.blocks)
        head = Work(far=40.0 * self.tokens * words)
        head.products[str(self.job.dtype).removeprefix("torch."), 10] += 2.0 * self.tokens * words * width
        once = self.machine.seconds(blocks), self.machine.seconds(head)
        found = {}
        if recipe.guidance_groups:
            found["guidance"] = _GUIDED * (once[0] + once[1])
        if recipe.tune_epochs:
            weights = sum(len(b.numbers) * b.linear_bytes for b in self.outline.blocks) // self.job.dtype.itemsize
            steps = recipe.tune_epochs * self.tokens / _TUNING_TOKENS
            fake = self.machine.seconds(Work(far=_FAKE / 2 * weights * steps))
            looks = 1 + recipe.held_out
            found["tune model"] = recipe.tune_epochs * looks * (_AGAIN * once[0] + 2 * _BACKWARD * once[1]) + fake
        return found

    def _writing(self) -> float:
        """Return the time of packing, writing and making it safe, stage by stage and block by block."""
        job = self.job
        work = total(self.packing.at(n, k) for n, k in (linear.shape for linear in job.linears))
        stages = sum(len(b.numbers) * (len(b.stages) * _ENTERED + 2) for b in self.outline.blocks)
        size = job.output_bytes + sum(n * k for n, k in (linear.shape for linear in job.linears))  # and the journal
        return self.machine.seconds(work) / 2 + size / self.machine.write + stages * self.machine.sync
