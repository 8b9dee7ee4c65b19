"""GPTQ by llm-compressor 0.14 on the given windows, for scripts/bench_quantize.py; run in llm-compressor's environment.

    python llmcompressor_gptq.py MODEL OUTPUT WINDOWS.json BITS GROUP_SIZE

Prints a line of JSON: seconds from the loaded libraries to the written checkpoint.
"""

import json
import sys
import time
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM


def main() -> None:
    model, output, windows, bits, group_size = sys.argv[1:]
    ids = json.loads(Path(windows).read_text())
    start = time.perf_counter()
    weights = {
        "num_bits": int(bits),
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": int(group_size),
        "actorder": "static",
    }
    net = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    oneshot(
        model=net,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=GPTQModifier(
            config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"], dampening_frac=0.01
        ),
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
    )
    net.save_pretrained(output, save_compressed=True)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
