"""What is written: the layout of an output folder, the tensors of a block, and the files that close it."""

from __future__ import annotations

from pathlib import Path

import torch

from llmq import environment
from llmq.card import CARD, Facts, architecture_of, base_of, card, card_in
from llmq.checkpoint import CONFIG, FOREIGN_WEIGHTS, INDEX, LEGACY_CONFIG, CheckpointReader
from llmq.places import dense_linears
from llmq.preflight import Embedding, Job
from llmq.report import REPORT, coverage
from llmq.run import Run
from llmq.solvers.placing import nearest, place_all, placer
from llmq.writing import CheckpointWriter, Slot

_ROWS = 4096  # of an embedding that are rounded at a time


def slots(job: Job) -> dict[str, Slot]:
    """Return every tensor that the output will hold, by name, in the order of the model."""
    linears = {f"{linear.name}.weight": linear for linear in job.linears}
    found: dict[str, Slot] = {}
    for name, file_name in job.names.items():
        if name in linears:
            layout = job.format.layout(job.spec, *linears[name].shape)
        elif job.embedding is not None and name == f"{job.embedding.name}.weight":
            layout = job.format.layout(job.embedding.spec, *job.embedding.shape)
        else:
            info = job.source.info(file_name)
            found[file_name] = Slot(info.shape, info.dtype)
            continue
        for local, (shape, dtype) in layout.items():
            found[f"{file_name.removesuffix('weight')}{local}"] = Slot(shape, dtype)
    if job.unties:
        head = job.head_name
        found[head] = Slot(tuple(job.model.get_parameter(head).shape), job.stored_dtype)
    replaced = set(job.names.values())
    for key in job.source:
        if key not in replaced:
            info = job.source.info(key)
            found[key] = Slot(info.shape, info.dtype)
    return found


def write_block(run: Run, writer: CheckpointWriter, index: int) -> None:
    """Write the packed weights of a block and everything else in it."""
    job, prefix = run.job, run.prefix(index)
    for linear in job.structure.linears[index]:
        base = job.names[f"{linear.name}.weight"].removesuffix("weight")
        for local, tensor in job.format.pack(run.weights[linear.name], job.spec).items():
            writer.write(f"{base}{local}", tensor)
    packed = {f"{linear.name}.weight" for linear in job.structure.linears[index]}
    _write_dense(run, writer, [name for name in job.names if name.startswith(prefix) and name not in packed])


def _write_embedding(run: Run, writer: CheckpointWriter, embedding: Embedding) -> None:
    """Write the token embedding packed: each row rounded to nearest, with scales that suit it best."""
    job, spec = run.job, embedding.spec
    weight_name = f"{embedding.name}.weight"
    file_name = job.names[weight_name]
    pieces = job.source.pieces(file_name)
    if weight_name in run.rewriter.changed:
        rewritten = job.model.get_parameter(weight_name).detach()
        pieces = ((start, rewritten[start : start + _ROWS]) for start in range(0, len(rewritten), _ROWS))
    place, group_size = placer(embedding.grid, "mse", job.recipe.search_norm), spec.group_columns(embedding.shape[1])
    energy = torch.ones(embedding.shape[1], device=run.device)
    lost = whole = 0.0
    base = file_name.removesuffix("weight")
    for start, piece in pieces:
        w = piece.to(run.device).float()
        rounded = nearest(embedding.grid, group_size, w, place_all(place, w, energy, group_size))
        lost, whole = lost + float((w - rounded.dequantize()).square().sum()), whole + float(w.square().sum())
        for local, tensor in job.format.pack(rounded, spec).items():
            if local != "shape":
                writer.write(f"{base}{local}", tensor, start)
    writer.write(f"{base}shape", torch.tensor(embedding.shape))
    error = (lost / whole) ** 0.5 if whole else 0.0
    run.report.embedding = {
        "name": embedding.name,
        "bits": spec.bits,
        "group_size": spec.group_size,
        "weight_error": error,
    }


def _write_dense(run: Run, writer: CheckpointWriter, names: list[str]) -> None:
    """Write the tensors of these names in the model that are not packed: as they were, or as they have become."""
    for name in names:
        file_name = run.job.names[name]
        if name in run.rewriter.changed:
            dtype = run.job.source.info(file_name).dtype
            writer.write(file_name, run.job.model.get_parameter(name).detach().to(dtype))
        else:
            _copy(run.job, writer, file_name)


def _copy(job: Job, writer: CheckpointWriter, name: str) -> None:
    """Write a tensor of the source as it is."""
    for start, rows in job.source.pieces(name):
        writer.write(name, rows, start)


def finish(run: Run, writer: CheckpointWriter) -> None:
    """Write what is outside the blocks, and close the output with its configuration and the report."""
    job, report = run.job, run.report
    with run.timed("write"):
        outside = [name for name in job.names if not name.startswith(job.structure.prefixes)]
        if job.embedding is not None:
            outside.remove(f"{job.embedding.name}.weight")
            _write_embedding(run, writer, job.embedding)
        _write_dense(run, writer, outside)
        if job.unties:
            writer.write(job.head_name, job.model.get_output_embeddings().weight.detach().to(job.stored_dtype))
        rest = sorted(set(job.source.keys()) - set(job.names.values()))
        for key in rest:
            _copy(job, writer, key)
    report.dense = {
        "ignored_linears": job.structure.ignored,
        "tensors": len(job.source.keys()) - len(job.linears) - (job.embedding is not None),
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
    if job.unties:
        config["tie_word_embeddings"] = False
    report.transforms = run.rewriter.notes
    report.experts = coverage(report.layers)
    legacy = {LEGACY_CONFIG: quantization} if quantization["quant_method"] == "gptq" else {}
    files = {**legacy, REPORT: report.to_dict(), CARD: _card(run)}
    writer.finish(config, files, copies)


def _card(run: Run) -> str:
    """Return the model card of what was made."""
    job = run.job
    specs = {linear.name: job.spec for linear in job.linears}
    shapes = {linear.name: linear.shape for linear in job.linears}
    if job.embedding is not None:
        specs[job.embedding.name], shapes[job.embedding.name] = job.embedding.spec, job.embedding.shape
    source = job.source.path
    facts = Facts(
        base_of(source),
        architecture_of(job.source.config),
        specs,
        shapes,
        frozenset(job.structure.ignored),
        run.report.to_dict(),
    )
    return card(facts, card_in(source))


def quantization_config(job: Job, stage_names: list[list[str]]) -> dict[str, object]:
    """Return config.json's quantization_config: what the format says, which modules are packed, how they were made."""
    recipe = job.recipe
    made = {"quantizer": [f"llmq:{environment.versions()['llmq']}"], "method": recipe.method}
    packed = {linear.name: job.spec for linear in job.linears}
    if job.embedding is not None:
        packed[job.embedding.name] = job.embedding.spec
    dense = dict.fromkeys([*job.structure.ignored, *dense_linears(job.model.config, packed)])
    config = {**job.format.config(packed, list(dense)), "meta": made}
    if config["quant_method"] == "gptq":  # what its tools write
        config |= {"modules_in_block_to_quantize": stage_names, "true_sequential": job.solver.calibrated}
        config |= {"static_groups": True}
        if "damp_percent" in job.solver.options:
            config["damp_percent"] = recipe.damp_percent
    return config


def side_files(source: CheckpointReader) -> tuple[list[Path], list[str]]:
    """Return the files to copy beside the weights, and the names of what is left out."""
    written_anew = {CONFIG, INDEX, CARD, *(source.info(key).file for key in source)}
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
