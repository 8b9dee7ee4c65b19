"""Everything that can be known to go wrong before work starts, found before work starts."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from llmq.budget import Budget
from llmq.calibration import Calibration
from llmq.checkpoint import STAGING, CheckpointReader, resolve
from llmq.errors import CalibrationError, CheckpointError, SolverError, SpecError
from llmq.families import Linear, Structure, check_stages, find_structure, skeleton
from llmq.formats import FORMATS, METHODS, Format
from llmq.fp8 import open_checkpoint
from llmq.grid_checks import check_scales, grid_of
from llmq.moe import Bank, left_dense, routers_of
from llmq.names import file_names
from llmq.ranks import ALONE, Ranks
from llmq.recipe import Recipe
from llmq.solvers import Solver
from llmq.solvers.vectors import solvers_of
from llmq.types import Grid, QuantSpec
from llmq.unfused import take_apart

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_Row = TypeVar("_Row")

_COUNT = re.compile(
    r"num_((hidden|decoder|encoder)_)?layers|n_layers?|num_(local_)?experts|n_routed_experts|(de|en)coder_layers|depth"
)  # keys of config.json
_MODULES = 1024  # that transformers makes in no time, whatever the files have
_DISK_MARGIN = 2**20  # tokenizer, configuration, report
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Embedding:
    """A token embedding that will be packed."""

    name: str  # of its module
    shape: tuple[int, int]  # tokens, width
    spec: QuantSpec
    grid: Grid


@dataclass(frozen=True)
class Job:
    """A checked run: what the driver needs to know, and nothing that is still in doubt."""

    source: CheckpointReader
    recipe: Recipe
    spec: QuantSpec
    grid: Grid
    solver: Solver
    format: Format
    model: PreTrainedModel  # on the meta device
    structure: Structure
    names: dict[str, str]  # name in the module tree -> name in the source's files
    dtype: torch.dtype  # of the calibration forward pass
    stored_dtype: torch.dtype  # of what is not packed
    unties: bool  # whether the head, tied to embeddings that are rotated, gets a weight of its own
    packed_bytes: int  # of the packed layers, all their tensors counted
    output_bytes: int  # of all tensors that will be written
    embedding: Embedding | None = None
    budget: Budget = field(default_factory=Budget)
    ranks: Ranks = ALONE  # which processes share it

    @property
    def paired(self) -> bool:
        """Whether inputs are compared with those in the original model."""
        return self.solver.calibrated and (self.solver.paired or self.recipe.shift > 0)

    @property
    def needs_reference(self) -> bool:
        """Whether a second stream runs through the original blocks."""
        return self.paired or self.recipe.tune_steps > 0 or self.recipe.tune_epochs > 0

    @property
    def head_name(self) -> str:
        """The name of the head's weight, in the module tree and, where it is untied, in the output."""
        head = self.model.get_output_embeddings()
        return next(f"{name}.weight" for name, module in self.model.named_modules() if module is head)

    @property
    def linears(self) -> list[Linear]:
        """All linears that will be packed, block by block."""
        return self.structure.all_linears


def prepare(model: str | Path, recipe: Recipe) -> Job:
    """Return the job of quantizing `model` by `recipe`, checked against the headers of its checkpoint.

    Raises:
        SpecError: the recipe does not fit the model, a method or a format.
        CheckpointError: the checkpoint is incomplete, or its tensors do not have the model's shapes.
    """
    spec = recipe.spec
    layout = _row(FORMATS, spec.format, "format")
    if recipe.group_size < 1 and recipe.group_size != -1:
        raise SpecError(f"group_size is {recipe.group_size}; use a positive number, or -1 for one per row")
    # a layer that every group size fits: what the format refuses here it refuses everywhere
    if refusal := layout.refuses(spec, 32, 32 * spec.group_columns(32)):
        raise SpecError(refusal)
    grid = grid_of(recipe, spec)
    solver = _row(solvers_of(grid), recipe.method, "method")
    if why := solver.refuses(grid):
        raise SpecError(f"method {recipe.method} {why}")
    for stage in ("tune_steps", "tune_epochs", "guidance_groups", "rotation", "scaling"):
        if getattr(recipe, stage) not in (0, "none") and not solver.calibrated:
            raise SpecError(f"{stage} needs calibration, which method {recipe.method} does without; use --method gptq")
    source = open_checkpoint(resolve(model))
    _check_dense(source)
    own = _own_dtype(source)
    dtype = _forward_dtype(recipe, own)
    net = skeleton(model_config(source), dtype)
    check_stages(net.config, recipe)
    source, banks = take_apart(source, net, recipe.ignore)
    structure = _with_banks(find_structure(net, recipe.ignore), banks, routers_of(net, banks), recipe.ignore)
    names = file_names(net, source.keys())
    _check_complete(net, source, names)
    linears = structure.all_linears
    for linear in linears:
        _check_size(linear, spec, layout)
    embedding = _embedding(net, names, recipe, layout)
    packed = sum(_packed_bytes(linear.shape, spec, layout) for linear in linears)
    replaced = {names[f"{linear.name}.weight"] for linear in linears}
    replaced |= {names[f"{embedding.name}.weight"]} if embedding is not None else set()
    dense = sum(source.info(key).nbytes for key in source if key not in replaced)
    unties = recipe.rotation != "none" and bool(net.config.get_text_config().tie_word_embeddings)
    if unties:
        head = net.get_output_embeddings().weight
        assert isinstance(head, Tensor)
        dense += head.numel() * own.itemsize  # it gets a weight of its own
    if embedding is not None:
        dense += _packed_bytes(embedding.shape, embedding.spec, layout)
    total = packed + dense
    return Job(
        source, recipe, spec, grid, solver, layout, net, structure, names, dtype, own, unties, packed, total, embedding
    )


def _embedding(model: PreTrainedModel, names: Mapping[str, str], recipe: Recipe, layout: Format) -> Embedding | None:
    """Return the token embedding, if the recipe packs it.

    Raises:
        SpecError: the format has no place for it, or the model's embedding is no plain matrix, or shared by more than
            a head.
    """
    spec = recipe.embedding_spec
    if spec is None:
        return None
    if not layout.embeddings:
        holds = ", ".join(name for name, format in FORMATS.items() if format.embeddings)
        raise SpecError(f"embeddings: the {spec.format} format has no packed embeddings; use --format {holds}")
    if refusal := layout.refuses(spec, 1, 1):
        raise SpecError(f"embeddings: {refusal}")
    module, head = model.get_input_embeddings(), model.get_output_embeddings()
    name = next(name for name, own in model.named_modules() if own is module)
    heads = {f"{other}.weight" for other, own in model.named_modules() if own is head and isinstance(head, nn.Linear)}
    if not isinstance(module, nn.Embedding) or f"{name}.weight" not in names:
        raise SpecError(f"embeddings: {name} is a {type(module).__name__}, not a matrix of the files; leave it dense")
    if others := {key for key, own in model.all_tied_weights_keys.items() if own == f"{name}.weight"} - heads:
        raise SpecError(f"embeddings: {min(others)} shares the matrix of {name}; llmq packs it for a head only")
    return Embedding(name, (module.num_embeddings, module.embedding_dim), spec, grid_of(recipe, spec))


def check_output(job: Job, output: Path) -> None:
    """Check that the output is not the source, and that its disk has room.

    Raises:
        CheckpointError: it is, or it has not.
    """
    there = output.absolute()
    if there.exists() and there.samefile(job.source.path):
        raise CheckpointError(f"{output}: is the folder of the original weights; choose another --output")
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free + _occupied(output / STAGING)
    if free < job.output_bytes + _DISK_MARGIN:
        raise CheckpointError(
            f"{output}: the disk is full: the packed checkpoint needs {job.output_bytes / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free; make space or choose another --output"
        )


def _occupied(folder: Path) -> int:
    """Return the bytes of the disk that an unfinished run holds: its output has its room already."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def check_calibration(job: Job, calibration: Calibration) -> None:
    """Check that the model can be run on the windows of `calibration`.

    Raises:
        CalibrationError: they are longer than the model's positions, or hold tokens that it has no embedding for.
    """
    length = calibration.input_ids.shape[1]
    limit = getattr(job.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise CalibrationError(
            f"{calibration.source}: calibration windows have {length} tokens, the model has {limit} positions; "
            f"use --seq-len {limit} or less"
        )
    largest, rows = int(calibration.input_ids.max()), vocabulary(job)
    if largest >= rows:
        raise CalibrationError(
            f"{job.source.path}: the tokenizer gives token {largest}, the model has embeddings for {rows} tokens; "
            "the tokenizer belongs to another model"
        )


def vocabulary(job: Job) -> int:
    """Return how many tokens the model has embeddings for."""
    embeddings = job.model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    return embeddings.shape[0]


def check_weights(job: Job, report: Callable[[str], None]) -> str:
    """Read every parameter once, looking for NaN, infinity and, where it will be packed, scales beyond float16.

    Hours may lie between the first and the last weight; a damaged one is found in the first minute. `report` is told
    the name of each. Returns the sha256 of all of them, hexadecimal, by which the model is known again.

    Raises:
        SolverError: a weight is not finite or too large; CheckpointError: it cannot be read.
    """
    packed = {f"{linear.name}.weight": linear for linear in job.linears}
    digest = hashlib.sha256(json.dumps(job.source.config, sort_keys=True).encode())
    for name, _ in job.model.named_parameters():
        if name not in job.names:
            continue
        report(name)
        info = job.source.info(job.names[name])
        digest.update(f"{name} {info.dtype} {list(info.shape)}".encode())
        linear = packed.get(name)
        for _, part in job.source.pieces(job.names[name]):
            if not part.isfinite().all():
                bad = int((~part.isfinite()).sum())
                raise SolverError(
                    f"{name}: {bad} of {part.numel()} values are NaN or infinite; the checkpoint is damaged"
                )
            if linear is not None and not linear.transposed:
                check_scales(linear.name, part, job.spec, job.grid)
            elif job.embedding is not None and name == f"{job.embedding.name}.weight":
                check_scales(job.embedding.name, part, job.embedding.spec, job.embedding.grid)
            digest.update(part.contiguous().flatten().view(torch.uint8).numpy().data)
        if linear is not None and linear.transposed:  # its groups lie across the pieces
            check_scales(linear.name, job.source.read(job.names[name]).T, job.spec, job.grid)
    return digest.hexdigest()


def _with_banks(
    structure: Structure, banks: Mapping[str, Bank], routers: Collection[str], ignore: Sequence[str]
) -> Structure:
    """Return `structure` with routers dense: they are small, and a token that goes astray costs more than they do.

    A bank of which every linear is ignored is named once, and not each of its linears.
    """
    linears = [[linear for linear in block if linear.name not in routers] for block in structure.linears]
    fused = left_dense(zip(structure.names, structure.blocks, strict=True), ignore)
    ignored = {**structure.ignored, **fused, **dict.fromkeys(routers, "a router of experts")}
    for name, bank in banks.items():
        members = {f"{name}.{part.name.rpartition('.')[0]}" for part in bank.parts()}
        if members <= ignored.keys():
            reason = ignored[min(members)]
            ignored = {other: why for other, why in ignored.items() if other not in members} | {name: reason}
    return replace(structure, linears=linears, ignored=ignored)


def _row(table: Mapping[str, _Row], name: str, what: str) -> _Row:
    """Return row `name` of a registry; `what` it registers is named in the error."""
    if name not in table:
        raise SpecError(f"unknown {what} {name!r}; there are {', '.join(table)}")
    return table[name]


def _check_dense(source: CheckpointReader) -> None:
    """Check that no tensor of the checkpoint has been quantized before."""
    configs = [source.config, source.config.get("text_config")]
    found = [c["quantization_config"] for c in configs if isinstance(c, dict) and c.get("quantization_config")]
    packed = [key for key in source for format in METHODS.values() if key.endswith(f".{format.marker}")]
    if found or packed:
        method = found[0].get("quant_method", "unknown") if found and isinstance(found[0], dict) else "unknown"
        seen = f"quant_method {method}" if found else f"tensor {packed[0]}"
        raise SpecError(f"{source.path}: is already quantized ({seen}); start from the original weights")


def model_config(source: CheckpointReader) -> PretrainedConfig:
    """Return what transformers makes of config.json; code that a checkpoint brings along is never run."""
    from transformers import AutoConfig

    kind = source.config.get("model_type")
    _check_counts(source)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    # ValueError, KeyError: an unknown type; for wrong values in the file each model class has errors of its own
    except Exception as error:
        raise SpecError(
            f"{source.path / 'config.json'}: transformers cannot use this configuration of model type {kind!r}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return config


def _check_counts(source: CheckpointReader) -> None:
    """Check that the files could hold so many blocks and experts: transformers makes the modules of all, one by one."""
    most = max(_MODULES, len(source.keys()))
    inner = [value for value in source.config.values() if isinstance(value, dict)]
    for part in (source.config, *inner):
        for key, value in part.items():
            if isinstance(value, int) and value > most and _COUNT.fullmatch(key):
                raise SpecError(
                    f"{source.path}: config.json: {key} is {value}, but the files have {len(source.keys())} tensors; "
                    "it belongs to another checkpoint, or is damaged"
                )


def _own_dtype(source: CheckpointReader) -> torch.dtype:
    """Return the dtype of the checkpoint's largest float tensor."""
    infos = [source.info(key) for key in source]
    floats = [info for info in infos if info.dtype.is_floating_point]
    if not floats:
        raise CheckpointError(f"{source.path}: holds no float tensors")
    return max(floats, key=lambda info: info.nbytes).dtype


def _forward_dtype(recipe: Recipe, own: torch.dtype) -> torch.dtype:
    """Return the dtype that the model is run in; `own` is the checkpoint's.

    Raises:
        SpecError: the recipe transforms weights, which needs float32, and asks for another dtype.
    """
    if recipe.rotation == "none" and recipe.scaling == "none":
        return own if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    if recipe.dtype not in ("auto", "float32"):
        raise SpecError(f"rotation and scaling work in float32, not in {recipe.dtype}; use --dtype float32")
    return torch.float32


def _check_complete(model: PreTrainedModel, source: CheckpointReader, names: dict[str, str]) -> None:
    """Check that the files hold every tensor of the model, in its shape."""
    tied = set(model.all_tied_weights_keys)
    base = model.base_model_prefix if model.base_model is not model else ""  # T5 has no base model inside
    for name, tensor in model.state_dict().items():
        if name not in names:
            if name in tied or not name.startswith(base):
                continue
            raise CheckpointError(f"{source.path}: tensor {name} is missing; the checkpoint is incomplete")
        info = source.info(names[name])
        if tensor.is_floating_point() and info.dtype not in _WEIGHT_DTYPES:
            raise CheckpointError(
                f"{source.path / info.file}: tensor {names[name]} has dtype {info.dtype}; llmq quantizes weights in "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _WEIGHT_DTYPES)}"
            )
        if info.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{source.path / info.file}: tensor {names[name]} has shape {list(info.shape)}, "
                f"config.json says {list(tensor.shape)}"
            )


def _check_size(linear: Linear, spec: QuantSpec, layout: Format) -> None:
    """Check that the format can hold `linear`, and name what would do if not."""
    n, k = linear.shape
    refusal = layout.refuses(spec, n, k)
    if refusal is None:
        return
    advice = "leave the layer out with --ignore"
    if "group_size" in refusal:
        sizes = [str(g) for g in (1024, 512, 256, 128, 64, 32) if k % g == 0]
        advice = f"use --group-size {', '.join([*sizes, '-1'])}, or {advice}"
    raise SpecError(f"{linear.name}: {refusal}; {advice}")


def _packed_bytes(shape: tuple[int, int], spec: QuantSpec, layout: Format) -> int:
    """Return the bytes of all stored tensors of one layer."""
    tensors = layout.layout(spec, *shape).values()
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors)
