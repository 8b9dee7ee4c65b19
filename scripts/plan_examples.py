"""Plan the quantization of large models whose files are not here: headers only, in sparse files that take no disk.

    python scripts/plan_examples.py [--models NAME …] [--max-memory 24GB] [--preset default] [--machine FILE] [--device]

The shapes are those of the public configurations. Nothing of these sizes has been quantized here: what is printed is
what `llmq plan` extrapolates from the code run on shapes and from speeds of a machine.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from pathlib import Path

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from llmq.cli.app import app

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, object]] = {
    "Llama-3.1-8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-3.1-70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "Qwen3-235B-A22B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
}


def names_and_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the tensors that files of the model have, experts one by one."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    found: dict[str, list[int]] = {}
    for name, tensor in model.state_dict().items():
        shape = list(tensor.shape)
        if name.endswith("experts.gate_up_proj"):
            half = [shape[1] // 2, shape[2]]
            for i in range(shape[0]):
                found |= {
                    f"{name.removesuffix('gate_up_proj')}{i}.{part}.weight": half for part in ("gate_proj", "up_proj")
                }
        elif name.endswith("experts.down_proj"):
            found |= {f"{name.removesuffix('down_proj')}{i}.down_proj.weight": shape[1:] for i in range(shape[0])}
        else:
            found[name] = shape
    return found


def make(folder: Path, config: dict[str, object]) -> None:
    """Write config.json and one safetensors file that is all hole behind its header."""
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in names_and_shapes(folder).items():
        size = 2
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options, rest = parser.parse_known_args()
    for name in options.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name
            folder.mkdir()
            make(folder, MODELS[name])
            print(f"## {name}", flush=True)
            app(["plan", str(folder), *rest], standalone_mode=False)
            print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
