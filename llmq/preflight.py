"""Everything that can be known to go wrong before work starts, found before work starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmq.checkpoint import CheckpointReader, resolve
from llmq.errors import CheckpointError, SolverError, SpecError
from llmq.families import Linear, Structure, find_structure, skeleton
from llmq.formats import FORMATS, Format
from llmq.grids import GRIDS
from llmq.names import file_names
from llmq.recipe import Recipe
from llmq.solvers import SOLVERS, Solver
from llmq.types import Grid, QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DISK_MARGIN = 2**20  # tokenizer, configuration, report


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
    packed_bytes: int  # of the packed layers, all their tensors counted
    output_bytes: int  # of all tensors that will be written

    @property
    def linears(self) -> list[Linear]:
        """All linears that will be packed, block by block."""
        return [linear for block in self.structure.linears for linear in block]


def prepare(model: str | Path, recipe: Recipe) -> Job:
    """Return the job of quantizing `model` by `recipe`, checked against the headers of its checkpoint.

    Raises:
        SpecError: the recipe does not fit the model, a method or a format.
        CheckpointError: the checkpoint is incomplete, or its tensors do not have the model's shapes.
    """
    from transformers import AutoConfig

    spec = recipe.spec
    solver = _row(SOLVERS, recipe.method, "method")
    layout = _row(FORMATS, spec.format, "format")
    refusal = layout.refuses(spec, 32, spec.group_columns(32))
    if refusal or (recipe.group_size < 1 and recipe.group_size != -1):
        raise SpecError(refusal or f"group_size is {recipe.group_size}; use a positive number, or -1 for one per row")
    source = CheckpointReader(resolve(model))
    if "quantization_config" in source.config:
        method = source.config["quantization_config"].get("quant_method", "unknown")
        raise SpecError(f"{source.path}: is already quantized (quant_method {method}); start from the original weights")
    try:
        config = AutoConfig.from_pretrained(source.path)
    except (ValueError, OSError, KeyError) as error:
        kind = source.config.get("model_type")
        raise SpecError(
            f"{source.path}: transformers does not know model type {kind!r}: {' '.join(str(error).split())[:200]}"
        ) from error
    dtype = getattr(torch, recipe.dtype) if recipe.dtype != "auto" else _own_dtype(source)
    net = skeleton(config, dtype)
    structure = find_structure(net, recipe.ignore)
    names = file_names(net, source.keys())
    _check_complete(net, source, names)
    for linear in (x for block in structure.linears for x in block):
        _check_size(linear, spec, layout)
    linears = [linear for block in structure.linears for linear in block]
    packed = sum(_packed_bytes(linear, spec, layout) for linear in linears)
    replaced = {names[f"{linear.name}.weight"] for linear in linears}
    dense = sum(source.info(key).nbytes for key in source if key not in replaced)
    grid = GRIDS["uniform"](spec.bits, spec.symmetric)
    return Job(source, recipe, spec, grid, solver, layout, net, structure, names, dtype, packed, packed + dense)


def check_disk(job: Job, output: Path) -> None:
    """Check that the output's disk has room.

    Raises:
        CheckpointError: it has not.
    """
    there = output.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < job.output_bytes + _DISK_MARGIN:
        raise CheckpointError(
            f"{output}: the disk is full: the packed checkpoint needs {job.output_bytes / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free; make space or choose another --output"
        )


def check_weights(job: Job, report: Callable[[str], None]) -> None:
    """Read every weight that will be packed once, looking for NaN, infinity and scales beyond float16.

    Hours may lie between the first and the last weight; a damaged one is found in the first minute. `report` is told
    the name of each.

    Raises:
        SolverError: a weight is not finite or too large; CheckpointError: it cannot be read.
    """
    for linear in job.linears:
        report(linear.name)
        weight = job.source.read(job.names[f"{linear.name}.weight"])
        if not weight.is_floating_point():
            raise SolverError(f"{linear.name}: weight has dtype {weight.dtype}; expected a float dtype")
        if not weight.isfinite().all():
            bad = int((~weight.isfinite()).sum())
            raise SolverError(
                f"{linear.name}: {bad} of {weight.numel()} weights are NaN or infinite; the checkpoint is damaged"
            )
        try:
            job.grid.fit(weight.T if linear.transposed else weight)
        except SolverError as error:
            raise SolverError(f"{linear.name}: {error}") from error


def _row(table: dict[str, object] | dict[str, Solver] | dict[str, Format], name: str, what: str):  # type: ignore[no-untyped-def]
    if name not in table:
        raise SpecError(f"unknown {what} {name!r}; there are {', '.join(table)}")
    return table[name]


def _own_dtype(source: CheckpointReader) -> torch.dtype:
    """Return the dtype of the checkpoint's largest float tensor."""
    infos = [source.info(key) for key in source]
    floats = [info for info in infos if info.dtype.is_floating_point]
    if not floats:
        raise CheckpointError(f"{source.path}: holds no float tensors")
    return max(floats, key=lambda info: info.nbytes).dtype


def _check_complete(model: PreTrainedModel, source: CheckpointReader, names: dict[str, str]) -> None:
    """Check that the files hold every tensor of the model, in its shape."""
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name not in names:
            if name in tied or not name.startswith(model.base_model_prefix):
                continue
            raise CheckpointError(f"{source.path}: tensor {name} is missing; the checkpoint is incomplete")
        info = source.info(names[name])
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


def _packed_bytes(linear: Linear, spec: QuantSpec, layout: Format) -> int:
    """Return the bytes of all stored tensors of one layer."""
    tensors = layout.layout(spec, *linear.shape).values()
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors)
