"""A low-rank adapter that gives a packed model back part of what quantization took (EoRA, arXiv 2410.21271).

The calibration windows run through the packed model's own blocks, one in memory at a time. For every packed linear
the error against the original weight is weighed with the Hessian of the inputs that it has there, and its loudest
part becomes two thin matrices. They are written as a PEFT LoRA folder; the packed files are not touched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor, nn

from llmq.calibration import Calibration
from llmq.checkpoint import resolve
from llmq.disk import write_file
from llmq.eora import eora
from llmq.errors import CheckpointError, SolverError, SpecError
from llmq.families import Linear, find_structure, skeleton
from llmq.fp8 import open_checkpoint
from llmq.loading import Loader
from llmq.names import file_names
from llmq.packed import PackedCheckpoint
from llmq.places import placed
from llmq.preflight import Job, check_calibration, model_config, prepare
from llmq.problems import Observed, measure
from llmq.recipe import make_recipe
from llmq.report import REPORT
from llmq.stream import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # PEFT's wrapper around the model
_PARTIAL = ".llmq-partial"  # ends the name of a folder that is not finished


class PackedReader(PackedCheckpoint):
    """A packed folder whose packed layers read as dense weights, by the names of their codes."""

    def __init__(self, path: str | Path) -> None:
        self.codes: dict[str, str] = {}  # recognizing layers reads some tensors as they are
        super().__init__(path)
        self.codes = {layer.keys[layer.format.marker]: module for module, layer in self.layers.items()}
        self.transposed: set[str] = set()  # names of the codes of modules that keep their weight as [K, N]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return tensor `name` as stored or, of the codes of a packed layer, the weight in its module's layout."""
        if name not in self.codes:
            return super().read(name, rows)
        weight = self.dequantized(self.codes[name])
        return (weight.T if name in self.transposed else weight)[rows or slice(None)]


@dataclass(frozen=True)
class Pair:
    """A packed model and the original it was made from, checked to belong together."""

    original: Job
    packed: Job  # the same skeleton, filled from the packed folder
    reader: PackedReader
    base: str  # how the adapter names the packed model


@dataclass(frozen=True)
class Compensation:
    """What the adapter does for one linear layer."""

    name: str
    out_features: int
    in_features: int
    loss_before: float  # tr(E H Eᵀ), E = W - Q and H = 2 X Xᵀ / T
    loss_after: float  # the same of E - B A
    energy: float  # tr(W H Wᵀ)


@dataclass(frozen=True)
class Adapter:
    """The factors of all layers, by PEFT's names, and what they do."""

    base: str
    rank: int
    modules: list[str]  # names in the module tree, or last parts of names where these say the same
    tensors: dict[str, Tensor]  # A [r, K] and B [N, r] of each layer
    layers: list[Compensation]

    @property
    def bits_per_weight(self) -> float:
        """What the adapter adds to the bits of a packed weight."""
        weights = sum(layer.out_features * layer.in_features for layer in self.layers)
        return 8 * sum(tensor.nbytes for tensor in self.tensors.values()) / weights


def open_pair(packed: str | Path, original: str | Path, dtype: str = "auto") -> Pair:
    """Return the pair of a packed folder or hub id and the original, both checked against their headers.

    Args:
        packed: of any format that llmq reads.
        original: the dense checkpoint that it was made from.
        dtype: of the forward pass, as a recipe has it; auto is the original's own.

    Raises:
        SpecError: `packed` is not packed, `original` is, or the packed model's weights were transformed.
        CheckpointError: a folder is incomplete, or they are not the same model.
    """
    reader = PackedReader(resolve(packed))
    _refuse_transformed(reader.path)
    net = skeleton(model_config(reader), torch.float32)
    found = placed(net, {key: reader.info(key) for key in reader}, reader.layers)
    layers = {f"{name}.weight": layer.keys[layer.format.marker] for name, layer in found.items()}
    source = open_checkpoint(resolve(original))
    _check_same(net, skeleton(model_config(source), torch.float32), f"{source.path} and {reader.path}")
    dense = [f"^{re.escape(x.name)}$" for x in find_structure(net).all_linears if f"{x.name}.weight" not in layers]
    # the recipe quantizes nothing: any group size does that fits every layer
    job = prepare(source.path, make_recipe({"method": "rtn", "group_size": -1, "ignore": dense, "dtype": dtype}))
    names = {**file_names(net, reader.keys()), **layers}
    _check_dense(reader, net, names)
    reader.transposed = {names[f"{x.name}.weight"] for x in job.linears if x.transposed}
    base = str(reader.path.resolve()) if Path(packed).exists() else str(packed)
    return Pair(job, replace(job, source=reader, names=names), reader, base)


@torch.no_grad()
def compensate(
    pair: Pair,
    calibration: Calibration,
    rank: int,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[Compensation], None] = lambda _: None,
) -> Adapter:
    """Return the adapter of `rank` that leaves least of the packed model's layer losses on `calibration`.

    Args:
        pair: of `open_pair`.
        calibration: token windows.
        rank: inner size r of every correction B A.
        device: torch device that one block at a time is computed on.
        progress: told of every layer.

    Raises:
        SpecError: the rank does not fit the smallest layer, or the weights are not a quantization of the original's.
        CalibrationError: the windows do not fit the model, or inputs of a layer are not finite.
    """
    job = pair.packed
    check_calibration(job, calibration)
    smallest = min(job.linears, key=lambda linear: min(linear.shape))
    if not 1 <= rank <= min(smallest.shape):
        n, k = smallest.shape
        raise SpecError(f"--rank {rank}: {smallest.name} has {n} outputs and {k} inputs; use 1 to {min(n, k)}")
    loader = Loader(job, torch.device(device))
    loader.outer()
    stream = Stream.start(job.model, job.structure, calibration, loader.device)
    adapter = Adapter(pair.base, rank, _targets(job), {}, [])
    for index, linears in enumerate(job.structure.linears):
        block = loader.block(index)
        for stage in stream.stages(block, index, linears):
            [problem] = measure(Observed(stream, block, index), stage, None, {})
            assert problem.train is not None, "the stream has batches"
            h = problem.train.mean(problem.name)
            for linear in stage.linears:
                _compensate(pair, adapter, linear, h)
                progress(adapter.layers[-1])
        stream.advance(block, index)
        loader.release(index)
    return adapter


def _compensate(pair: Pair, adapter: Adapter, linear: Linear, h: Tensor) -> None:
    """Add the factors of one layer to `adapter`."""
    name = f"{linear.name}.weight"
    w = pair.original.source.read(pair.original.names[name]).to(h.device, torch.float32)
    w = w.T if linear.transposed else w
    error = w - pair.reader.dequantized(pair.reader.codes[pair.packed.names[name]]).to(h.device)
    if error.norm() > w.norm():
        raise SpecError(
            f"{linear.name}: the packed weight is farther from the original's than 0 is; it was made from another "
            "model, or transformed (rotated, scaled) before it was quantized, which an adapter cannot follow"
        )
    try:
        factors = [factor.to(pair.original.stored_dtype) for factor in eora(error, h, adapter.rank)]
    except SolverError as failure:
        raise SolverError(f"{linear.name}: {failure}") from failure
    a, b = (factor.float() for factor in factors)
    losses = [float(((x @ h) * x).sum()) for x in (error, error - b @ a, w)]
    adapter.layers.append(Compensation(linear.name, *linear.shape, *losses))
    for local, factor in zip(("lora_A", "lora_B"), factors, strict=True):
        adapter.tensors[f"{_PREFIX}{linear.name}.{local}.weight"] = factor.contiguous().cpu()


def save(adapter: Adapter, output: str | Path) -> None:
    """Write `adapter` as a PEFT LoRA folder, which is whole or not there.

    Raises:
        CheckpointError: `output` holds something already, or cannot be written.
    """
    output = Path(output)
    check_absent(output)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,  # PEFT multiplies by lora_alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": adapter.modules,
        "inference_mode": True,
    }
    tensors = safetensors.torch.save(adapter.tensors, metadata={"format": "pt"})
    staging = output.with_name(f"{output.name}{_PARTIAL}")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        staging.mkdir(parents=True)
        write_file(staging / WEIGHTS, tensors)
        write_file(staging / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        os.replace(staging, output)  # an empty folder there gives way
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written: {error}; choose another --output") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_absent(output: Path) -> None:
    """Check that nothing is at `output` but perhaps an empty folder.

    Raises:
        CheckpointError: there is.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise CheckpointError(f"{output}: exists and is not an empty folder; choose another --output")


def _refuse_transformed(folder: Path) -> None:
    """Check that llmq's report in `folder`, if there is one, tells of no transform of the weights."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        done = [*report.get("transforms", ()), *report["recipe"].get("transforms", ())]
    # no report, or another tool's: layers whose weights do not fit are noticed one by one
    except (OSError, ValueError, AttributeError, KeyError):
        return
    if done:
        raise SpecError(
            f"{folder}: its weights were transformed before they were quantized ({done[0]}), so that their errors "
            "cannot be told by the original's; quantize without transforms"
        )


def _check_same(packed: nn.Module, original: nn.Module, where: str) -> None:
    """Check that two skeletons have the same tensors."""
    ours, theirs = ({name: tuple(t.shape) for name, t in net.state_dict().items()} for net in (original, packed))
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            shapes = " and ".join(str(list(x[name])) if name in x else "missing" for x in (ours, theirs))
            raise CheckpointError(
                f"{where} are not the same model: {name} is {shapes}; give the one that was quantized"
            )


def _check_dense(reader: PackedReader, net: PreTrainedModel, names: dict[str, str]) -> None:
    """Check that the packed folder has all that is not packed, in the model's shapes."""
    for name, tensor in net.state_dict().items():
        if name not in names:
            if name in net.all_tied_weights_keys:
                continue
            raise CheckpointError(f"{reader.path}: tensor {name} is missing; the checkpoint is incomplete")
        found = reader.info(names[name]).shape
        if names[name] not in reader.codes and found != tuple(tensor.shape):
            raise CheckpointError(
                f"{reader.path}: tensor {names[name]} has shape {list(found)}, config.json says {list(tensor.shape)}"
            )


def _targets(job: Job) -> list[str]:
    """Return PEFT's target_modules: last parts of names where they mean the packed linears only, else whole names."""
    names = {linear.name for linear in job.linears}
    ends = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in job.model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if meant == names else names)
