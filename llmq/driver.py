"""The layer-wise loop: a checkpoint goes in block by block and comes out packed.

This is the only module that knows the order of events. One block is in memory at a time. Within it, each stage (the
linears that see one input) is run on what the stages before it, already quantized, let through; after the block the
hidden states of all calibration batches have moved on, errors included, so later layers can answer for earlier ones.
Recipes that ask for it send a second stream through the original blocks, to compare with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from llmq.activations import offload_folder
from llmq.budget import Budget
from llmq.calibration import DEFAULT_SAMPLES, Calibration
from llmq.checkpoint import STAGING
from llmq.errors import CalibrationError, CheckpointError, SolverError, SpecError
from llmq.experts import problems_of
from llmq.families import Linear
from llmq.joining import joined
from llmq.journal import Journal
from llmq.layers import solve_stage
from llmq.output import finish, slots, write_block
from llmq.preflight import Job, check_output, check_weights, prepare
from llmq.problems import Observed, Problem, Twin
from llmq.recipe import Recipe
from llmq.report import Progress, Report
from llmq.run import Run
from llmq.statistics import Statistics, check_collected
from llmq.stream import Stage
from llmq.tune.block import BlockRates, Site, tune_block
from llmq.tune.model import Model, ModelRates, tune_model
from llmq.tune.tunable import TunableLinear, put
from llmq.writing import CheckpointWriter, check_free


def quantize(  # noqa: PLR0913  the front door
    model: str | Path,
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    calibration: Calibration | None = None,
    statistics: str | Path | None = None,
    offload_dir: str | Path | None = None,
    max_memory: int | None = None,
    device: str | torch.device = "cpu",
    force: bool = False,
    checked: Callable[[Job], None] = lambda _: None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Quantize checkpoint `model` into the folder `output` and return the report.

    A run that was killed goes on where it was when it is repeated, and ends in the same bytes. Under torchrun, every
    process calls this, and they share the work.

    Args:
        model: a checkpoint folder or a hub id.
        output: the folder to make.
        recipe: what to do; the default is GPTQ at 4 bits in groups of 128.
        calibration: token windows to use instead of the recipe's `calibration` source.
        statistics: a folder of `llmq.collecting.collect`, to use instead of any calibration.
        offload_dir: where hidden states are kept during the run; the default is inside `output`.
        max_memory: bytes that the process may hold in the host's memory; None: no limit.
        device: torch device that one block at a time is solved on.
        force: replace the checkpoint in `output`, or an unfinished run of other settings.
        checked: called, on one process, with the job once it is known to fit the model, before what takes time.
        progress: called at every step.

    Raises:
        LlmqError: see `llmq.errors`; nothing that looks like a checkpoint is left behind.
    """
    recipe = recipe or Recipe()
    with joined(torch.device(device)) as (ranks, where):
        if ranks.first:
            check_free(output, force=force)
        collected = None if statistics is None else Statistics(statistics)
        job = replace(prepare(model, recipe), ranks=ranks)
        if collected is not None:
            check_collected(job, collected)
        if ranks.first:
            checked(job)
        if max_memory is not None:
            job = replace(job, budget=ranks.from_first(lambda: _budget(job, max_memory, where)))
        staging = Path(output) / STAGING
        states = staging / "states" if offload_dir is None else offload_folder(offload_dir, output)
        with CheckpointWriter(output, force=force) if ranks.first else nullcontext() as writer:
            journal = Journal(staging, ranks)
            if max_memory is not None and journal.begun:
                job = replace(job, budget=_as_begun(job.budget, journal))
            run = Run(job, where, journal, progress, states, collected)
            if writer is None:
                identify(run, calibration, (lambda: None) if force else None)
                _walk(run, None)
            else:
                _lead(run, calibration, writer, force=force)
        return ranks.broadcast(run.report)


def _budget(job: Job, max_memory: int, device: torch.device) -> Budget:
    """Return what keeps the run under a limit.

    Raises:
        SpecError: nothing does.
    """
    from llmq.planning.memory import MemoryModel, windows_of

    recipe = job.recipe
    windows = windows_of(job, recipe.num_samples or DEFAULT_SAMPLES) if job.solver.calibrated else 1
    base = psutil.Process().memory_info().rss
    return MemoryModel(job, windows, recipe.seq_len, base, gpu=device.type == "cuda").fit(max_memory)


def _as_begun(budget: Budget, journal: Journal) -> Budget:
    """Return `budget` with those of its numbers that bytes depend on as the unfinished run here began with them."""
    before = journal.records[0]["identity"]
    return replace(budget, batch_tokens=before["batch_tokens"], solver_rows=before["solver_rows"])


def _lead(run: Run, calibration: Calibration | None, writer: CheckpointWriter, *, force: bool) -> None:
    """Do what is not finished yet, as the rank that writes; leave nothing behind that cannot be finished."""
    job = run.job
    try:
        check_output(job, writer.path)
        identify(run, calibration, writer.clear if force else None)
        if not writer.allocate(slots(job), job.recipe.shard_bytes) and run.journal.find("block"):
            raise CheckpointError(f"{writer.path}: files of the unfinished run are gone; pass --force to start over")
        _walk(run, writer)
        run.drop_states()
    except (SpecError, CalibrationError, SolverError):  # the same again, however often it is repeated
        if job.ranks.world == 1 or not run.journal.begun:  # else others are writing there still
            run.drop_states()
            writer.discard()
        raise
    except BaseException:
        if not run.journal.begun:
            writer.discard()
        raise


def _walk(run: Run, writer: CheckpointWriter | None) -> None:
    """Do what is not finished yet, and close the output."""
    run.resume()
    run.start_streams()
    first = run.block
    for index in range(len(run.job.structure.blocks)):
        if index < first:
            _pass_finished(run, index)
        else:
            _quantize_block(run, index, writer)
    run.check_fallbacks()
    if writer is not None:
        if run.job.recipe.tune_epochs:
            _tune_model(run, writer)
        finish(run, writer)


def identify(run: Run, calibration: Calibration | None, start_over: Callable[[], None] | None) -> None:
    """Check the inputs, and that an unfinished run in the output folder was given the same ones.

    Raises:
        CheckpointError: it was not, and there is no `start_over`, which removes it.
    """

    def check(**known: object) -> None:
        run.check_ranks(known)
        try:
            run.journal.check(known)
        except CheckpointError:
            if start_over is None:
                raise
            start_over()
            run.journal = Journal(run.journal.folder, run.job.ranks)

    check(**run.identity)  # before anything that takes time
    with run.timed("calibration"):
        fingerprint = run.load_calibration(calibration)
    check(calibration=fingerprint)
    with run.timed("check"):
        weights = run.job.ranks.from_first(lambda: check_weights(run.job, lambda name: run.tell("checking weights")))
    if run.statistics is not None:
        run.statistics.check_weights(weights)
    check(weights=weights)
    run.journal.begin({**run.identity, "calibration": fingerprint, "weights": weights})


def _pass_finished(run: Run, index: int) -> None:
    """Bring back a block that an earlier process finished, if it is still to be tuned."""
    if not run.job.recipe.tune_epochs or not run.job.ranks.first:
        return
    block = run.loader.block(index)
    run.kept_weights(index)
    _hold_for_tuning(run, block, index)


def _hold_for_tuning(run: Run, block: nn.Module, index: int) -> None:
    """Let the scales of a solved block be parameters."""
    linears = run.job.structure.linears[index]
    put(block, run.prefix(index), {x.name: TunableLinear(x, run.weights[x.name]) for x in linears})


def _quantize_block(run: Run, index: int, writer: CheckpointWriter | None) -> None:
    """Quantize all linears of one block, move the hidden states past it, write it and put it on record."""
    job, stream, run.block = run.job, run.stream, index
    with run.timed("load"):
        block = run.loader.block(index)
    linears, prefix = job.structure.linears[index], run.prefix(index)
    if stream is not None:
        with run.timed("transform"):
            run.rewriter.block(block, index, stream)
    originals = {linear.name: linear.weight.clone() for linear in linears} if job.recipe.tune_steps else {}
    seen: Observed | None = None
    twins: dict[int, Twin] = {}
    if run.statistics is not None:
        stages = run.statistics.stages(index, linears)
    elif stream is None:
        stages = [Stage([linear], calls=0) for linear in linears]
    else:
        with run.timed("forward"):
            stages = stream.stages(block, index, linears)
            seen = Observed(stream, block, index)
            if run.reference is not None:
                seen, twins = _with_reference(run, seen, stages, prefix)
    names = [[linear.name.removeprefix(prefix) for linear in stage.linears] for stage in stages]
    run.stage_names.extend(stage for stage in names if stage not in run.stage_names)
    for number, stage in enumerate(stages):
        _quantize_stage(run, (index, number), stage, seen, twins.get(number))
    if seen is not None and run.reference is not None and seen.original is not None and not twins:
        with run.timed("forward"):
            run.reference.advance(seen.original, index)
    if originals:
        _tune_block(run, block, index, prefix, originals)
    if stream is not None:
        with run.timed("forward"):
            stream.advance(block, index)
    with run.timed("write"):
        if writer is not None:
            write_block(run, writer, index)
            writer.sync()
            if job.recipe.tune_epochs:
                run.keep_weights(index)
        run.keep_block(index)
    if job.recipe.tune_epochs and writer is not None:
        _hold_for_tuning(run, block, index)
    else:
        run.weights.clear()
        run.loader.release(index)


def _with_reference(run: Run, seen: Observed, stages: list[Stage], prefix: str) -> tuple[Observed, dict[int, Twin]]:
    """Return `seen` with a copy of the block as it is, and the stages in that copy where inputs are to be paired."""
    original = copy.deepcopy(seen.block)
    seen = Observed(seen.stream, seen.block, seen.index, run.reference, original)
    if not run.job.paired:
        return seen, {}
    twins = {}
    for number, stage in enumerate(stages):
        first = stage.linears[0]
        module = original.get_submodule(first.name.removeprefix(prefix))
        twin = Stage([Linear(first.name, module, first.transposed)], stage.calls)
        twins[number] = Twin(twin, last=number == len(stages) - 1)
    return seen, twins


def _quantize_stage(run: Run, where: tuple[int, int], stage: Stage, seen: Observed | None, twin: Twin | None) -> None:
    """Solve the linears of one stage, or take them from the record, and put the results back into the block.

    `where` is the number of the block, and that of the stage within it.
    """
    layers = run.kept_stage(*where, stage)
    if layers is None:
        with run.timed("forward"):
            if run.statistics is not None:
                problems: Iterable[Problem] = run.statistics.problems(where[0], stage, run.device)
            else:
                problems = problems_of(run.job, seen, stage, twin, run.token_weights)
        with run.timed("solve"):
            layers = solve_stage(run.job, where[0], problems)
        run.keep_stage(*where, layers)
    elif twin is not None and twin.last and run.reference is not None and seen is not None:
        assert seen.original is not None, "a twin is part of it"
        with run.timed("forward"):
            run.reference.advance(seen.original, where[0])
    for layer in layers:
        layer.linear.weight.copy_(layer.weight.dequantize())
        run.weights[layer.linear.name] = layer.weight
        run.report.layers.append(layer.report)
        run.done += 1
        run.tell("solve", layer.report)


def _tune_block(run: Run, block: nn.Module, index: int, prefix: str, originals: dict[str, Tensor]) -> None:
    """Move codes and scales of a solved block by gradients, and put the results back into it."""
    assert run.stream is not None, "tuning is calibrated"
    assert run.reference is not None, "tuning compares with the original"
    layers = {x.name: (x, originals[x.name], run.weights[x.name]) for x in run.job.structure.linears[index]}
    with run.timed("tune blocks"):
        site = Site(block, index, prefix, run.stream, run.reference.hidden)
        rates, seed = BlockRates(run.job.recipe.tune_steps), run.job.recipe.seed
        tuned, report = run.job.ranks.from_first(lambda: tune_block(site, layers, rates, seed))
        for name, (linear, _, _) in layers.items():
            linear.weight.copy_(tuned[name].dequantize())
    run.weights |= tuned
    run.report.tuning.append(report)


class _TuningKeeper:
    """Keeps how far model tuning is beside the journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def load(self) -> dict[str, Tensor] | None:
        """Return the state after the last pass that was kept."""
        return self._journal.load("tuning") if self._journal.find("tuning") else None

    def save(self, state: dict[str, Tensor]) -> None:
        """Keep the state after a pass."""
        self._journal.save("tuning", state)
        if not self._journal.find("tuning"):
            self._journal.append("tuning")


def _tune_model(run: Run, writer: CheckpointWriter) -> None:
    """Move the scales, norms and biases of the quantized model by gradients, and write its blocks again."""
    job, structure = run.job, run.job.structure
    assert run.reference is not None, "tuning compares with the original"
    layers: dict[str, TunableLinear] = {}
    for block in structure.blocks:
        layers |= {m.name: m for m in block.modules() if isinstance(m, TunableLinear)}
    with run.timed("tune model"):
        model = Model(job.model, structure, layers, job.stored_dtype)
        rates, seed = ModelRates(job.recipe.tune_epochs), job.recipe.seed
        start, end, keeper = run.begin_stream(), run.reference.hidden, _TuningKeeper(run.journal)
        weights, report = tune_model(model, start, end, rates, seed, keeper=keeper)
    run.weights |= weights
    run.report.tuning.append(report)
    if report.kept_step:
        run.rewriter.changed |= set(model.vectors)
    with run.timed("write"):
        for index in range(len(structure.blocks)):
            write_block(run, writer, index)
