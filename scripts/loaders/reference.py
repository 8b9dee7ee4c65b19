"""What llmq computes from a packed folder, in float32: what the loaders beside this file are compared with.

    python reference.py PACKED REFERENCE.npz

Run in llmq's own environment. The file has `texts` [n] and, for text i, `ids_i` [T] and `logits_i` [T, V].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmq.hf  # noqa: F401  packed folders load through llmq's layers

# scripts, digits, white space and punctuation that tokenizers treat apart
TEXTS = [
    "The history of the city begins in the 12th century, when",
    "In 1997, 3,456,789 people lived in 12 towns.",
    "  leading and   inner    spaces\n\n\tand tabs\n",
    "I've been there; he's told us they'd, we'll, you're 'RE \"quoted\"",
    "Naïve café über Straße — “quotes” … 10€",
    "Привет, мир! Как дела?",
    "你好，世界。我想在apple工作1314151天～",  # noqa: RUF001
    "こんにちは 世界",
    "🚀 (normal) 😶‍🌫️ (joined) ✅ 🦙🦙 3 33 333 3333 33333",
    "def f(x):\n    return x**2 + 1  # comment\n\n\nclass A:\n\tpass",
    "http://www.example.com/path?query=1&b=2#frag",
    "!!!???...---===___",
    "a",
    "The\r\nwindows\r\nline ends",
    "Ⅷ ² ½ ٣ 五 numerals",
    "zero\u200bwidth and nbsp\u00a0here",
    "MiXeD CaSe WORDS and CamelCase snake_case",
    "កាន់តែពិសេសអាច😁",
    "'S 'T he'S 'Llama x\n\n\ny  \n  z\t\t",
    "The film was directed by John Smith and released in 2004 . Critics praised the acting but not the plot .",
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("packed", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.packed)
    model = AutoModelForCausalLM.from_pretrained(options.packed, dtype=torch.float32).eval()
    arrays = {"texts": np.array(TEXTS)}
    with torch.no_grad():
        for number, text in enumerate(TEXTS):
            ids = tokenizer(text)["input_ids"]
            arrays[f"ids_{number}"] = np.array(ids)
            arrays[f"logits_{number}"] = model(torch.tensor([ids])).logits[0].float().numpy()
    np.savez(options.output, **arrays)


if __name__ == "__main__":
    main()
