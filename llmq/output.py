"""What is written: the layout of an output folder, the tensors of a block, and the files that close it."""

from __future__ import annotations

from pathlib import Path

from llmq import environment
from llmq.checkpoint import CONFIG, FOREIGN_WEIGHTS, INDEX, LEGACY_CONFIG, CheckpointReader
from llmq.places import dense_linears
from llmq.preflight import Job
from llmq.report import REPORT, coverage
from llmq.run import Run
from llmq.writing import CheckpointWriter, Slot


def slots(job: Job) -> dict[str, Slot]:
    """Return every tensor that the output will hold, by name, in the order of the model."""
    linears = {f"{linear.name}.weight": linear for linear in job.linears}
    found: dict[str, Slot] = {}
    for name, file_name in job.names.items():
        if name not in linears:
            info = job.source.info(file_name)
            found[file_name] = Slot(info.shape, info.dtype)
            continue
        for local, (shape, dtype) in job.format.layout(job.spec, *linears[name].shape).items():
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
        _write_dense(run, writer, [name for name in job.names if not name.startswith(job.structure.prefixes)])
        if job.unties:
            writer.write(job.head_name, job.model.get_output_embeddings().weight.detach().to(job.stored_dtype))
        rest = sorted(set(job.source.keys()) - set(job.names.values()))
        for key in rest:
            _copy(job, writer, key)
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
    if job.unties:
        config["tie_word_embeddings"] = False
    report.transforms = run.rewriter.notes
    report.experts = coverage(report.layers)
    legacy = {LEGACY_CONFIG: quantization} if quantization["quant_method"] == "gptq" else {}
    writer.finish(config, {**legacy, REPORT: report.to_dict()}, copies)


def quantization_config(job: Job, stage_names: list[list[str]]) -> dict[str, object]:
    """Return config.json's quantization_config: what the format says, which modules are packed, how they were made."""
    recipe = job.recipe
    made = {"quantizer": [f"llmq:{environment.versions()['llmq']}"], "method": recipe.method}
    packed = {linear.name: job.spec for linear in job.linears}
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
