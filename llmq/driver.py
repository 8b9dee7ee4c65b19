"""The layer-wise loop: a checkpoint goes in block by block and comes out packed.

This is the only module that knows the order of events. One block is in memory at a time. Within it, each stage (the
linears that see one input) is run on what the stages before it, already quantized, let through; after the block the
hidden states of all calibration batches have moved on, errors included, so later layers can answer for earlier ones.
Recipes that ask for it send a second stream through the original blocks, to compare with.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq import environment
from llmq.calibration import Calibration, calibration_of, random_windows, split_held_out
from llmq.checkpoint import CheckpointWriter, check_free
from llmq.errors import SolverError, SpecError
from llmq.families import Linear
from llmq.guidance import token_weights, winsorize
from llmq.layers import Observed, Twin, measure, solve_stage
from llmq.loading import Loader
from llmq.output import quantization_config, side_files
from llmq.preflight import Job, check_calibration, check_output, check_weights, prepare, vocabulary
from llmq.recipe import Recipe
from llmq.report import FALLBACKS, REPORT, LayerReport, Progress, Report
from llmq.rewriting import Rewriter
from llmq.stream import Stage, Stream
from llmq.tune.block import BlockRates, Site, tune_block
from llmq.tune.model import Model, ModelRates, tune_model
from llmq.tune.tunable import TunableLinear, put
from llmq.types import QuantizedWeight

# Gradient steps see this many tokens, a compromise between many steps and quiet ones.
_TOKENS_PER_STEP = 2048
_GUIDANCE_CAP = 0.99  # quantile above which the end-loss weights of tokens are cut off: their tails are heavy


def quantize(
    model: str | Path,
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    calibration: Calibration | None = None,
    device: str | torch.device = "cpu",
    force: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Quantize checkpoint `model` into the folder `output` and return the report.

    Args:
        model: a checkpoint folder or a hub id.
        output: the folder to make.
        recipe: what to do; the default is GPTQ at 4 bits in groups of 128.
        calibration: token windows to use instead of the recipe's `calibration` source.
        device: torch device that one block at a time is solved on.
        force: replace the checkpoint in `output`.
        progress: called at every step.

    Raises:
        LlmqError: see `llmq.errors`; nothing that looks like a checkpoint is left behind.
    """
    recipe = recipe or Recipe()
    check_free(output, force=force)
    run = _Run(prepare(model, recipe), torch.device(device), progress)
    with CheckpointWriter(output, recipe.shard_bytes, force=force) as writer:
        check_output(run.job, Path(output))
        if run.job.solver.calibrated:
            with run.timed("calibration"):
                run.load_calibration(calibration)
        with run.timed("check"):
            check_weights(run.job, lambda name: run.tell("checking weights"))
        run.start_streams()
        for index in range(len(run.job.structure.blocks)):
            _quantize_block(run, index, writer)
        run.check_fallbacks()
        if recipe.tune_epochs:
            _tune_model(run, writer)
        _finish(run, writer)
    return run.report


class _Run:
    """A job on its way: where it runs, what it has reported so far."""

    def __init__(self, job: Job, device: torch.device, progress: Callable[[Progress], None]) -> None:
        self.job = job
        self.device = device
        self.loader = Loader(job, device)
        self.rewriter = Rewriter(job)
        self.calibration: Calibration | None = None
        self.random: Calibration | None = None  # windows of random tokens, which train along
        self.held_out: Calibration | None = None
        self.stream: Stream | None = None  # through the blocks as they are quantized
        self.reference: Stream | None = None  # through the original blocks
        self.start: Stream | None = None  # where both began, for tuning the model
        self.token_weights: dict[str, Tensor] = {}  # by linear [groups, S, L]; empty: all tokens count alike
        self.weights: dict[str, QuantizedWeight] = {}  # of the blocks that are not written yet
        self.written: set[str] = set()  # names in the source's files whose tensors are in the output, packed or not
        self.stage_names: list[list[str]] = []  # within a block, for config.json
        self.block = 0
        self._progress = progress
        self.report = Report(
            versions=environment.versions(),
            machine=environment.machine(device),
            source=str(job.source.path),
            recipe=job.recipe.model_dump(mode="json"),
            calibration=None,
        )

    @property
    def parts(self) -> list[Calibration]:
        """All windows, in the order of the streams."""
        return [part for part in (self.calibration, self.random, self.held_out) if part is not None]

    def tell(self, phase: str, layer: LayerReport | None = None) -> None:
        """Report progress."""
        blocks = len(self.job.structure.blocks)
        self._progress(Progress(phase, len(self.report.layers), len(self.job.linears), self.block, blocks, layer))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to `phase` in the report."""
        self.tell(phase)
        start = time.perf_counter()
        yield
        self.report.seconds[phase] = self.report.seconds.get(phase, 0.0) + time.perf_counter() - start

    def load_calibration(self, given: Calibration | None) -> None:
        """Set the calibration windows: those given, or the recipe's."""
        recipe = self.job.recipe
        whole = given or calibration_of(recipe, _tokenizer(self.job))
        check_calibration(self.job, whole)
        samples, seq_len = whole.input_ids.shape
        # a single window cannot be split, and one that judges itself judges nothing
        share = recipe.held_out if samples > 1 else 0.0
        self.calibration, self.held_out = split_held_out(whole, share, recipe.seed)
        if not recipe.response_only:  # random tokens answer nothing
            self.random = random_windows(whole, recipe.random_windows, vocabulary(self.job), recipe.seed)
        self.report.calibration = {
            "source": whole.source,
            "samples": samples,
            "random_samples": 0 if self.random is None else self.random.input_ids.shape[0],
            "held_out_samples": 0 if self.held_out is None else self.held_out.input_ids.shape[0],
            "seq_len": seq_len,
            "tokens": whole.tokens,
            "fingerprint": whole.fingerprint,
        }

    def start_streams(self) -> None:
        """Set the hidden states in front of the first block, and the weights of tokens, if the recipe needs any."""
        if self.calibration is None:
            return
        job, recipe = self.job, self.job.recipe
        with self.timed("load"):
            self.loader.outer()
        if recipe.guidance_groups:
            with self.timed("guidance"):  # of the original model, before it is rewritten
                self.token_weights = self._guidance()
        elif recipe.response_only:
            answers = torch.cat([part.counted for part in self.parts]).float()[None]
            self.token_weights = {linear.name: answers for linear in job.linears}
        with self.timed("transform"):
            self.rewriter.outer()
        with self.timed("forward"):
            self.stream = Stream.start(
                job.model,
                job.structure,
                self.calibration,
                self.device,
                random=self.random,
                held_out=self.held_out,
                batch_tokens=_TOKENS_PER_STEP if recipe.tune_steps or recipe.tune_epochs else None,
            )
        if job.needs_reference:
            self.reference = self.stream.fork()
        if recipe.tune_epochs:
            self.start = self.stream.fork()

    def _guidance(self) -> dict[str, Tensor]:
        """Return the end-loss weights of all windows, those held out last."""
        blocks = range(len(self.job.structure.blocks))
        for index in blocks:
            self.loader.block(index)
        found: list[dict[str, Tensor]] = []
        for part in self.parts:
            weights = token_weights(
                self.job.model,
                self.job.linears,
                part,
                groups=self.job.recipe.guidance_groups,
                loss="self",
                seed=self.job.recipe.seed,
            )
            found.append(winsorize(weights, _GUIDANCE_CAP, part.attention_mask))
        for index in blocks:
            self.loader.release(index)
        return {name: torch.cat([weights[name] for weights in found], dim=1) for name in found[0]}

    def check_fallbacks(self) -> None:
        """Stop a run in which too many Hessians were unusable.

        Raises:
            SolverError: more layers than the recipe allows ended rounded to nearest.
        """
        lost = [layer.name for layer in self.report.layers if FALLBACKS & set(layer.remedies)]
        allowed = self.job.recipe.max_fallback
        if len(lost) > allowed * len(self.report.layers):
            raise SolverError(
                f"{len(lost)} of {len(self.report.layers)} layers have a Hessian that no damping repairs (first "
                f"{lost[0]}) and would do without; check the calibration data, or raise max_fallback"
            )


def _quantize_block(run: _Run, index: int, writer: CheckpointWriter) -> None:
    """Quantize all linears of one block, move the hidden states past it, and write it unless it is tuned later."""
    job, stream, run.block = run.job, run.stream, index
    with run.timed("load"):
        block = run.loader.block(index)
    linears, prefix = job.structure.linears[index], f"{job.structure.blocks_name}.{index}."
    if stream is not None:
        with run.timed("transform"):
            run.rewriter.block(block, index, stream)
    originals = {linear.name: linear.weight.clone() for linear in linears} if job.recipe.tune_steps else {}
    seen: Observed | None = None
    twins: dict[int, Twin] = {}
    if stream is None:
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
        _quantize_stage(run, index, stage, seen, twins.get(number))
    if seen is not None and run.reference is not None and seen.original is not None and not twins:
        with run.timed("forward"):
            run.reference.advance(seen.original, index)
    if originals:
        _tune_block(run, block, index, prefix, originals)
    if stream is not None:
        with run.timed("forward"):
            stream.advance(block, index)
    if job.recipe.tune_epochs:
        put(block, prefix, {x.name: TunableLinear(x, run.weights[x.name]) for x in linears})
    else:
        _write_block(run, index, writer)
        run.loader.release(index)


def _with_reference(run: _Run, seen: Observed, stages: list[Stage], prefix: str) -> tuple[Observed, dict[int, Twin]]:
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


def _quantize_stage(run: _Run, index: int, stage: Stage, seen: Observed | None, twin: Twin | None) -> None:
    """Solve the linears of one stage and put the results back into the block."""
    with run.timed("forward"):
        problems = measure(seen, stage, twin, run.token_weights)
    with run.timed("solve"):
        for layer in solve_stage(run.job, index, problems):
            layer.linear.weight.copy_(layer.weight.dequantize())
            run.weights[layer.linear.name] = layer.weight
            run.report.layers.append(layer.report)
            run.tell("solve", layer.report)


def _tune_block(run: _Run, block: nn.Module, index: int, prefix: str, originals: dict[str, Tensor]) -> None:
    """Move codes and scales of a solved block by gradients, and put the results back into it."""
    assert run.stream is not None, "tuning is calibrated"
    assert run.reference is not None, "tuning compares with the original"
    layers = {x.name: (x, originals[x.name], run.weights[x.name]) for x in run.job.structure.linears[index]}
    with run.timed("tune blocks"):
        site = Site(block, index, prefix, run.stream, run.reference.hidden)
        tuned, report = tune_block(site, layers, BlockRates(run.job.recipe.tune_steps), run.job.recipe.seed)
        for name, (linear, _, _) in layers.items():
            linear.weight.copy_(tuned[name].dequantize())
    run.weights |= tuned
    run.report.tuning.append(report)


def _tune_model(run: _Run, writer: CheckpointWriter) -> None:
    """Move the scales, norms and biases of the quantized model by gradients, and write its blocks."""
    job, structure = run.job, run.job.structure
    assert run.start is not None, "tuning is calibrated"
    assert run.reference is not None, "tuning compares with the original"
    layers: dict[str, TunableLinear] = {}
    for block in structure.blocks:
        layers |= {m.name: m for m in block.modules() if isinstance(m, TunableLinear)}
    with run.timed("tune model"):
        model = Model(job.model, structure, layers, job.stored_dtype)
        weights, report = tune_model(
            model, run.start, run.reference.hidden, ModelRates(job.recipe.tune_epochs), job.recipe.seed
        )
    run.weights |= weights
    run.report.tuning.append(report)
    if report.kept_step:
        run.rewriter.changed |= set(model.vectors)
    for index in range(len(structure.blocks)):
        _write_block(run, index, writer)


def _write_block(run: _Run, index: int, writer: CheckpointWriter) -> None:
    """Write the packed weights of a block and everything else in it."""
    job, prefix = run.job, f"{run.job.structure.blocks_name}.{index}."
    with run.timed("write"):
        for linear in job.structure.linears[index]:
            packed = job.format.pack(run.weights.pop(linear.name), job.spec)
            original = job.names[f"{linear.name}.weight"]
            writer.add({f"{original.removesuffix('weight')}{local}": tensor for local, tensor in packed.items()})
            run.written.add(original)
        _write_dense(run, writer, [name for name in job.names if name.startswith(prefix)])


def _write_dense(run: _Run, writer: CheckpointWriter, names: list[str]) -> None:
    """Write the tensors of these names in the model that are not packed: as they were, or as they have become."""
    for name in names:
        file_name = run.job.names[name]
        if file_name in run.written:
            continue
        tensor = run.job.source.read(file_name)
        if name in run.rewriter.changed:
            tensor = run.job.model.get_parameter(name).detach().to(tensor.dtype)
        writer.add({file_name: tensor})
        run.written.add(file_name)


def _finish(run: _Run, writer: CheckpointWriter) -> None:
    """Write what is outside the blocks, and close the output with its configuration and the report."""
    job, report = run.job, run.report
    with run.timed("write"):
        _write_dense(run, writer, list(job.names))
        if run.rewriter.untied:
            head = job.model.get_output_embeddings().weight
            name = next(name for name, p in job.model.named_parameters() if p is head)
            writer.add({name: head.detach().to(job.stored_dtype)})
        rest = [key for key in job.source if key not in run.written]
        for key in rest:
            writer.add({key: job.source.read(key)})
    report.dense = {
        "ignored_linears": job.structure.ignored,
        "tensors": len(job.source.keys()) - len(job.linears),
        "rewritten": sorted(run.rewriter.changed),
        "not_in_files": [name for name in job.model.state_dict() if name not in job.names],  # tied, or of another head
        "not_in_model": rest,
    }
    copies, left_out = side_files(job.source)
    report.files = {"copied": [path.name for path in copies], "left_out": left_out}
    report.bytes = {
        "source_tensors": sum(job.source.info(key).nbytes for key in job.source),
        "output_tensors": job.output_bytes,
        "packed": job.packed_bytes,
    }
    report.peak_memory_bytes = environment.peak_memory(run.device)
    quantization = quantization_config(job, run.stage_names)
    config = {**job.source.config, "quantization_config": quantization}
    if run.rewriter.untied:
        config["tie_word_embeddings"] = False
    report.transforms = run.rewriter.notes
    writer.finish(config, {"quantize_config.json": quantization, REPORT: report.to_dict()}, copies)


def _tokenizer(job: Job) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(job.source.path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise SpecError(
            f"{job.source.path}: has no usable tokenizer, which calibration text needs "
            f"({' '.join(str(error).split())[:200]}); add tokenizer.json, or use --method rtn"
        ) from error
