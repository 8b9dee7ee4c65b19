"""Peak memory of `llmq quantize`, measured from outside, on random models of one width and several depths.

    python scripts/bench_memory.py [--blocks 4,32] [--hidden 512] [--num-samples 32] [--seq-len 512] [--preset default]
        [--work DIR] [-- options of llmq quantize]

Prints the largest resident size of each process, as the kernel counts it, and its ratio to the first one's. With
--max-memory (an option of llmq quantize, behind --) every process is also held to that limit by RLIMIT_DATA: memory
beyond it is refused, and the run dies of it.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmq.recipe import parse_size

WORDS = 4096


def make_model(folder: Path, blocks: int, hidden: int) -> int:
    """Write a random Llama and its tokenizer, block after block so that it need not fit; return its bytes."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")
    words = {"<s>": 0, **{f"w{i}": i for i in range(1, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def peak(command: list[str], limit: int | None) -> int:
    """Run llmq in a process of its own and return its largest resident size in bytes."""
    child = os.fork()
    if child == 0:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        os.execv(sys.executable, [sys.executable, "-m", "llmq", *command])
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"llmq {' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", default="4,32")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--work", type=Path, help="folder to work in; default: a temporary one")
    arguments, more = parser.parse_known_args()
    more = [option for option in more if option != "--"]
    limit = parse_size(more[more.index("--max-memory") + 1]) if "--max-memory" in more else None
    first = 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(1, WORDS, (arguments.num_samples * arguments.seq_len + 1000,), generator=generator)
        (folder / "text.txt").write_text(" ".join(f"w{i}" for i in words.tolist()))
        for blocks in map(int, arguments.blocks.split(",")):
            source = folder / f"model-{blocks}"
            size = make_model(source, blocks, arguments.hidden)
            common = ["--preset", arguments.preset, "--calibration", str(folder / "text.txt")]
            common += ["--num-samples", str(arguments.num_samples), "--seq-len", str(arguments.seq_len), *more]
            found = peak(["quantize", str(source), "--output", str(folder / f"out-{blocks}"), *common], limit)
            first = first or found
            row = f"{blocks:3} blocks, {size / 2**20:7.0f} MiB of weights"
            print(f"{row}: peak {found / 2**20:6.0f} MiB, {found / first:.3f}", flush=True)


if __name__ == "__main__":
    main()
