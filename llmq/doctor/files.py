"""Checks of the folder: shards, index, and what should lie beside the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llmq.checkpoint import INDEX
from llmq.doctor.findings import ERROR, NOTE, WARNING, Finding, Repair
from llmq.doctor.patient import Patient

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


def unsafe_index(patient: Patient) -> Iterator[Finding]:
    """Report an index that names files outside the folder."""
    names = sorted({name for name in patient.weight_map.values() if Path(name).name != name})
    if names:
        yield Finding(
            "index-unsafe", ERROR, (INDEX,), f"names {names[0]!r}, which is no plain file name",
            "do not load the folder with software that follows it", _if_whole(patient),
        )  # fmt: skip


def index_against_shards(patient: Patient) -> Iterator[Finding]:
    """Report an index that is missing or does not say where tensors are."""
    files = {name for names in patient.files.values() for name in names}
    if patient.index is None:
        if len(files) > 1:
            yield Finding(
                "index-missing", ERROR, (INDEX,), f"{len(files)} files of weights, and no index of them",
                "readers load one file or none; write the index", _if_whole(patient),
            )  # fmt: skip
        return
    weight_map = {key: name for key, name in patient.weight_map.items() if Path(name).name == name}
    absent = sorted(set(weight_map.values()) - {path.name for path in patient.path.glob("*.safetensors")})
    if absent:
        yield Finding("shard-missing", ERROR, tuple(absent), "the index names it", "download it again")
    wrong = [key for key, name in weight_map.items() if name not in absent and name not in patient.files.get(key, [])]
    if wrong:
        seen = f"the index says {weight_map[wrong[0]]}, it is in {patient.files.get(wrong[0], ['no file'])[0]}"
        whole = all(key in patient.files for key in wrong) and not absent
        yield Finding("index-wrong", ERROR, tuple(wrong), seen, "write the index anew", Repair() if whole else None)
    unnamed = [key for key in patient.infos if key not in patient.weight_map]
    if unnamed:
        yield Finding(
            "index-incomplete", ERROR, tuple(unnamed), f"is in {patient.infos[unnamed[0]].file}, but not in the index",
            "readers leave it random; write the index anew", _if_whole(patient),
        )  # fmt: skip


def tensor_twice(patient: Patient) -> Iterator[Finding]:
    """Report tensors in several files."""
    twice = [key for key, names in patient.files.items() if len(names) > 1]
    if twice:
        yield Finding(
            "tensor-twice", ERROR, tuple(twice), f"is in {' and in '.join(patient.files[twice[0]][:3])}",
            "readers differ in which they take; keep the one that belongs to the others",
        )  # fmt: skip


def beside(patient: Patient) -> Iterator[Finding]:
    """Report what users miss: a tokenizer, a chat template, a generation config."""
    there = {path.name for path in patient.path.iterdir()}
    if not there & set(_TOKENIZERS):
        yield Finding(
            "tokenizer-missing", WARNING, (), f"there is none of {', '.join(_TOKENIZERS)}",
            "copy the tokenizer of the original model",
        )  # fmt: skip
    elif not there & set(_TEMPLATES) and not _template_inside(patient):
        yield Finding(
            "chat-template-missing", NOTE, (), "no chat_template.jinja, and none in tokenizer_config.json",
            "a base model has none; copy that of a chat model",
        )  # fmt: skip
    if "generation_config.json" not in there:
        yield Finding(
            "generation-config-missing", NOTE, (), "no generation_config.json",
            "generation goes by defaults; copy that of the original model",
        )  # fmt: skip


def _template_inside(patient: Patient) -> bool:
    file = patient.path / "tokenizer_config.json"
    return file.is_file() and b'"chat_template"' in file.read_bytes()


def _if_whole(patient: Patient) -> Repair | None:
    """Return the repair by writing everything again, if everything is there, once."""
    absent = {Path(name).name for name in patient.weight_map.values()} - {
        path.name for path in patient.path.glob("*.safetensors")
    }
    named = all(key in patient.infos for key in patient.weight_map)
    once = all(len(names) == 1 for names in patient.files.values())
    return Repair() if named and once and not absent else None
