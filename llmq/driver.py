"""The layer-wise loop: a checkpoint goes in block by block and comes out packed.

This is the only module that knows the order of events. One block is in memory at a time. Within it, each stage (the
linears that see one input) is run on what the stages before it, already quantized, let through; after the block the
hidden states of all calibration batches have moved on, errors included, so later layers can answer for earlier ones.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmq import environment
from llmq.calibration import Calibration, load_calibration
from llmq.checkpoint import CONFIG, FOREIGN_WEIGHTS, INDEX, CheckpointReader, CheckpointWriter, check_free
from llmq.errors import SolverError, SpecError
from llmq.families import Linear
from llmq.preflight import Job, check_calibration, check_output, check_weights, prepare
from llmq.recipe import Recipe
from llmq.refine import refine
from llmq.stream import Stage, Stream
from llmq.types import QuantizedWeight, Solution

REPORT = "report.json"


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear layer."""

    name: str
    block: int
    out_features: int
    in_features: int
    tokens: int  # calibration tokens in its Hessian; 0 if the method uses none
    dropped_tokens: int  # left out because an input was not finite
    loss: float | None  # tr(E H Eᵀ), H = 2 X Xᵀ / T: twice the squared output error per token
    relative_loss: float | None  # that over tr(W H Wᵀ)
    weight_error: float  # ‖W - Q‖ / ‖W‖
    damp_percent: float
    remedies: tuple[str, ...]


@dataclass
class Report:
    """What `quantize` did, written to report.json in the output folder."""

    versions: dict[str, str]
    machine: dict[str, object]
    source: str
    recipe: dict[str, object]
    calibration: dict[str, object] | None
    layers: list[LayerReport] = field(default_factory=list)
    dense: dict[str, object] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as what JSON can hold."""
        return asdict(self)


class Progress(NamedTuple):
    """How far a run is: `done` of `total` linear layers; `layer` is set when one has just been finished."""

    phase: str
    done: int
    total: int
    block: int
    blocks: int
    layer: LayerReport | None = None


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
        stream = run.start_stream()
        for index in range(len(run.job.structure.blocks)):
            _quantize_block(run, index, stream, writer)
        run.check_fallbacks()
        _finish(run, writer)
    return run.report


class _Run:
    """A job on its way: where it runs, what it has reported so far."""

    def __init__(self, job: Job, device: torch.device, progress: Callable[[Progress], None]) -> None:
        self.job = job
        self.device = device
        self.calibration: Calibration | None = None
        self.written: set[str] = (
            set()
        )  # names in the source's files whose tensors are in the output, packed or as they were
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
        self.calibration = given or load_calibration(
            recipe.calibration,
            _tokenizer(self.job),
            num_samples=recipe.num_samples,
            seq_len=recipe.seq_len,
            seed=recipe.seed,
        )
        check_calibration(self.job, self.calibration)
        samples, seq_len = self.calibration.input_ids.shape
        self.report.calibration = {
            "source": self.calibration.source,
            "samples": samples,
            "seq_len": seq_len,
            "tokens": self.calibration.tokens,
            "fingerprint": self.calibration.fingerprint,
        }

    def start_stream(self) -> Stream | None:
        """Return the hidden states in front of the first block, or None if the solver needs none."""
        if self.calibration is None:
            return None
        with self.timed("load"):
            prefix = f"{self.job.structure.blocks_name}."
            names = _state_names(self.job.model, self.job.model.base_model)
            self._materialize(name for name in names if not name.startswith(prefix))
            self._move_buffers(self.job.model.base_model)
        with self.timed("forward"):
            return Stream.start(self.job.model, self.job.structure, self.calibration, self.device)

    def load_block(self, index: int) -> nn.Module:
        """Return block number `index` with its tensors on the device."""
        with self.timed("load"):
            name, block = self.job.structure.blocks_name, self.job.structure.blocks[index]
            self._materialize(f"{name}.{index}.{key}" for key in block.state_dict())
            self._move_buffers(block)
        return block

    def _move_buffers(self, part: nn.Module) -> None:
        """Bring what `part` computed instead of loading (rotary frequencies, scales of embeddings) to the device."""
        for module in part.modules():
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, buffer.to(self.device))

    def _materialize(self, names: Iterable[str]) -> None:
        """Read the tensors of these names from the files into the model."""
        from accelerate.utils import set_module_tensor_to_device

        for name in names:
            if name not in self.job.names:
                continue  # tied to another tensor, or a buffer that is computed
            tensor = self.job.source.read(self.job.names[name])
            dtype = self.job.dtype if tensor.is_floating_point() else tensor.dtype
            set_module_tensor_to_device(self.job.model, name, self.device, value=tensor, dtype=dtype)

    def check_fallbacks(self) -> None:
        """Stop a run in which too many Hessians were unusable.

        Raises:
            SolverError: more layers than the recipe allows ended rounded to nearest.
        """
        lost = [layer.name for layer in self.report.layers if "round to nearest" in layer.remedies]
        allowed = self.job.recipe.max_fallback
        if len(lost) > allowed * len(self.report.layers):
            raise SolverError(
                f"{len(lost)} of {len(self.report.layers)} layers have a Hessian that no damping repairs (first "
                f"{lost[0]}) and would be rounded to nearest; check the calibration data, or raise max_fallback"
            )


def _quantize_block(run: _Run, index: int, stream: Stream | None, writer: CheckpointWriter) -> None:
    """Quantize all linears of one block, write its tensors, and move the hidden states past it."""
    run.block = index
    block = run.load_block(index)
    linears = run.job.structure.linears[index]
    if stream is None:
        stages = [Stage([linear], calls=0) for linear in linears]
    else:
        with run.timed("forward"):
            stages = stream.stages(block, index, linears)
    prefix = f"{run.job.structure.blocks_name}.{index}."
    names = [[linear.name.removeprefix(prefix) for linear in stage.linears] for stage in stages]
    run.stage_names.extend(stage for stage in names if stage not in run.stage_names)
    for stage in stages:
        _quantize_stage(run, index, stage, stream, writer)
    with run.timed("write"):
        for key in block.state_dict():
            file_name = run.job.names.get(prefix + key)
            if file_name is not None and file_name not in run.written:
                writer.add({file_name: run.job.source.read(file_name)})
                run.written.add(file_name)
    if stream is not None:
        with run.timed("forward"):
            stream.advance(block, index)
    block.to("meta")


def _quantize_stage(run: _Run, index: int, stage: Stage, stream: Stream | None, writer: CheckpointWriter) -> None:
    """Solve the linears of one stage together, put the results back into the block, and write them packed."""
    job = run.job
    h, tokens, dropped = None, 0, 0
    if stream is not None:
        with run.timed("forward"):
            total = stream.hessian(job.structure.blocks[index], index, stage)
            h, tokens, dropped = total.mean(stage.linears[0].name), total.tokens, total.dropped
    for linear, solution in zip(stage.linears, _solve(run, stage, h), strict=True):
        with run.timed("write"):
            packed = job.format.pack(solution.weight, job.spec)
            original = job.names[f"{linear.name}.weight"]
            writer.add({f"{original.removesuffix('weight')}{local}": tensor for local, tensor in packed.items()})
            run.written.add(original)
        layer = _layer_report(linear, index, solution, h, (tokens, dropped))
        linear.weight.copy_(solution.weight.dequantize())
        run.report.layers.append(layer)
        run.tell("solve", layer)


def _solve(run: _Run, stage: Stage, h: Tensor | None) -> list[Solution]:
    """Return the solution of each linear; rows are independent, so all are stacked into one problem."""
    job = run.job
    options = {name: getattr(job.recipe, name) for name in job.solver.options}
    rows = [linear.shape[0] for linear in stage.linears]
    weights = torch.cat([linear.weight.float() for linear in stage.linears])
    with run.timed("solve"):
        try:
            solved = job.solver.run(weights, h, job.grid, job.spec.group_columns(weights.shape[1]), **options)
        except SolverError as error:
            raise SolverError(f"{stage.linears[0].name}: {error}") from error
    whole = solved.weight
    if h is not None and solved.damp_percent > 0:  # 0: the Hessian was unusable
        with run.timed("refine"):
            damped = h.clone()  # H is K² numbers: no identity matrix beside it
            damped.diagonal().add_(solved.damp_percent * h.diagonal().mean())
            whole = refine(whole, weights, damped, job.recipe.refine_rounds)
    parts = zip(whole.codes.split(rows), whole.scales.split(rows), whole.zeros.split(rows), strict=True)
    return [
        Solution(QuantizedWeight(*part, whole.grid, whole.group_size), solved.damp_percent, solved.remedies)
        for part in parts
    ]


def _layer_report(
    linear: Linear, block: int, solution: Solution, h: Tensor | None, tokens: tuple[int, int]
) -> LayerReport:
    """Return what the solution lost; `linear` still holds the original weight."""
    weight = linear.weight.float()
    error = weight - solution.weight.dequantize()
    loss = relative = None
    if h is not None:
        loss = float(((error @ h) * error).sum())
        energy = float(((weight @ h) * weight).sum())
        relative = loss / energy if energy else 0.0
    norm = float(weight.norm())
    return LayerReport(
        linear.name,
        block,
        *linear.shape,
        *tokens,
        loss,
        relative,
        float(error.norm()) / norm if norm else 0.0,
        solution.damp_percent,
        solution.remedies,
    )


def _finish(run: _Run, writer: CheckpointWriter) -> None:
    """Copy what was not packed, and close the output with its configuration and the report."""
    job, report = run.job, run.report
    with run.timed("write"):
        rest = [key for key in job.source if key not in run.written]
        for key in rest:
            writer.add({key: job.source.read(key)})
    known = set(job.names.values())
    report.dense = {
        "ignored_linears": job.structure.ignored,
        "tensors": len(job.source.keys()) - len(job.linears),
        "not_in_files": [name for name in job.model.state_dict() if name not in job.names],  # tied, or of another head
        "not_in_model": [key for key in rest if key not in known],
    }
    copies, left_out = _side_files(job.source)
    report.files = {"copied": [path.name for path in copies], "left_out": left_out}
    report.bytes = {
        "source_tensors": sum(job.source.info(key).nbytes for key in job.source),
        "output_tensors": job.output_bytes,
        "packed": job.packed_bytes,
    }
    report.peak_memory_bytes = environment.peak_memory(run.device)
    quantization = quantization_config(job, run.stage_names)
    config = {**job.source.config, "quantization_config": quantization}
    writer.finish(config, {"quantize_config.json": quantization, REPORT: report.to_dict()}, copies)


def quantization_config(job: Job, stage_names: list[list[str]]) -> dict[str, object]:
    """Return config.json's quantization_config: what the format says, which modules are packed, how they were made."""
    recipe = job.recipe
    made = {"quantizer": [f"llmq:{environment.versions()['llmq']}"], "method": recipe.method}
    config = {**job.format.config(job.spec), "modules_in_block_to_quantize": stage_names}
    if job.structure.ignored:  # for GPTQModel and vLLM; "-:" excludes
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in job.structure.ignored}
    if "damp_percent" in job.solver.options:
        config["damp_percent"] = recipe.damp_percent
    return {**config, "true_sequential": job.solver.calibrated, "static_groups": True, "meta": made}


def _side_files(source: CheckpointReader) -> tuple[list[Path], list[str]]:
    """Return the files to copy beside the weights, and the names of what is left out."""
    written_anew = {CONFIG, INDEX, *(source.info(key).file for key in source)}
    foreign = (*FOREIGN_WEIGHTS, ".safetensors", ".index.json")
    copies, left_out = [], []
    for path in sorted(source.path.iterdir()):
        if path.name in written_anew:
            continue
        if path.is_file() and not path.name.endswith(foreign) and path.name != REPORT:
            copies.append(path)
        else:
            left_out.append(path.name)
    return copies, left_out


def _tokenizer(job: Job) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(job.source.path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise SpecError(
            f"{job.source.path}: has no usable tokenizer, which calibration text needs "
            f"({' '.join(str(error).split())[:200]}); add tokenizer.json, or use --method rtn"
        ) from error


def _state_names(model: nn.Module, part: nn.Module) -> list[str]:
    """Return the names in `model` of all parameters and stored buffers of its submodule `part`."""
    prefix = next(name for name, module in model.named_modules() if module is part)
    return [f"{prefix}.{key}" if prefix else key for key in part.state_dict()]
