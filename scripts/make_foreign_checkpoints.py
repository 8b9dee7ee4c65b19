"""Writes small packed folders with other people's tools: what llmq has to read, and llmq doctor must not complain of.

    PYTHON_OF_THAT_TOOL scripts/make_foreign_checkpoints.py TOOL tests/data/foreign

for TOOL in gptqmodel, llmcompressor, autoround, autoround-label.

Each tool is run in an environment of its own (GPTQModel 7.7.0, llm-compressor 0.14.0.1, AutoRound 0.16.1) on the same
random Llama of two blocks, through its public functions, with as little calibration as it takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_WORDS = 64


def make_model(folder: Path, blocks: int = 2) -> Path:
    """Write the model and its tokenizer to `folder`, and return it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    words = {"<s>": 0, **{f"w{number}": number for number in range(1, _WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    fast.save_pretrained(folder)
    return folder


def tokens() -> list[list[int]]:
    """Return calibration data."""
    return torch.randint(1, _WORDS, (32, 256), generator=torch.Generator().manual_seed(1)).tolist()


def gptqmodel(source: Path, output: Path) -> None:
    """Write what GPTQModel makes."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer it does not start
    from gptqmodel import GPTQModel, QuantizeConfig

    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens()]
    for name, options in {
        "gptq-4": {"bits": 4, "sym": True},
        "gptq-8": {"bits": 8, "sym": True},
        "gptq-4-asym": {"bits": 4, "sym": False, "format": "gptq_v2"},
    }.items():
        config = QuantizeConfig(group_size=32, desc_act=False, device="cpu", **options)
        model = GPTQModel.load(str(source), config)
        model.quantize(data, batch_size=8)
        model.save(str(output / f"gptqmodel-{name}"))


def llmcompressor(source: Path, output: Path) -> None:
    """Write what llm-compressor makes."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    for name, bits, symmetric in (("4", 4, True), ("8", 8, True), ("4-asym", 4, False)):
        weights = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
        recipe = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
        oneshot(model=str(source), recipe=recipe, output_dir=str(output / f"llmcompressor-{name}"))


def autoround(source: Path, output: Path) -> None:
    """Write what AutoRound makes in others' layouts."""
    for name, format, symmetric in (("gptq-4", "auto_gptq", True), ("awq-4-asym", "auto_awq", False)):
        _round(source, output / f"autoround-{name}", format, {"bits": 4, "sym": symmetric})


def autoround_label(source: Path, output: Path) -> None:
    """Write what AutoRound makes under its own label, and what it reads back, see `read_by_autoround`."""
    source = make_model(source.parent / "one-block", blocks=1)  # four folders more are small ones
    mixed = {
        "model.layers.0.mlp.down_proj": {"bits": 8},
        "model.layers.0.self_attn.o_proj": {"bits": 16},
        "k_proj": {"bits": 2, "group_size": 64, "sym": True},
        "lm_head": {"bits": 4},
    }
    kinds: dict[str, dict[str, Any]] = {
        "4": {"bits": 4, "sym": True},
        "4-asym": {"bits": 4, "sym": False},
        "3-asym": {"bits": 3, "sym": False},
        "mixed": {"bits": 4, "sym": False, "layer_config": mixed},
    }
    for name, options in kinds.items():
        folder = output / f"autoround-label-{name}"
        _round(source, folder, "auto_round", options)
        weights = unpacked_by_autoround(folder) if name == "4-asym" else read_by_autoround(folder)
        # a product makes 0 of -0, which codes at the zero of a negative scale stand for
        sums = {module: hashlib.sha256((w + 0.0).numpy().tobytes()).hexdigest() for module, w in weights.items()}
        (folder / "weights.json").write_text(json.dumps(sums, indent=1) + "\n")


def _round(source: Path, output: Path, format: str, options: dict[str, Any]) -> None:
    """Quantize with AutoRound."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tool = AutoRound(
        LlamaForCausalLM.from_pretrained(source, dtype=torch.float16),
        AutoTokenizer.from_pretrained(source),
        group_size=32,
        iters=5,
        nsamples=32,
        seqlen=256,
        dataset=[torch.tensor([row]) for row in tokens()],
        device_map="cpu",
        **options,
    )
    with tempfile.TemporaryDirectory() as folder:
        tool.quantize_and_save(folder, format=format)
        found = next(Path(folder).rglob("config.json")).parent
        shutil.copytree(found, output, dirs_exist_ok=True)


def read_by_autoround(folder: Path) -> dict[str, torch.Tensor]:
    """Return what each packed layer multiplies with as AutoRound loads it, float16 [N, K]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            module.bias = None
            with torch.no_grad():  # a product with ones and zeros is a weight; it rounds them to float16
                weight = module(torch.eye(module.infeatures)).T.contiguous()
            assert torch.equal(weight, weight.half().float())
            found[name] = weight.half()
    return found


def unpacked_by_autoround(folder: Path) -> dict[str, torch.Tensor]:
    """Return what AutoRound unpacks from layers packed as awq, for which it has no layer on a CPU, float16 [N, K]."""
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    tensors = load_file(folder / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    parts = {module: [tensors[f"{module}.{local}"] for local in ("qweight", "qzeros", "scales")] for module in modules}
    return {module: dequantize_gemm(*own, 4, 32).T.contiguous() for module, own in parts.items()}


def main() -> None:
    """Run the script."""
    tool, output = sys.argv[1], Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = make_model(Path(folder) / "model")
        tools = {"gptqmodel": gptqmodel, "llmcompressor": llmcompressor, "autoround": autoround}
        (tools | {"autoround-label": autoround_label})[tool](source, output)


if __name__ == "__main__":
    main()
