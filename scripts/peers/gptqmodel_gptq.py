"""GPTQ by GPTQModel 7.7 on the given windows, for scripts/bench_quantize.py; run in GPTQModel's environment.

    python gptqmodel_gptq.py MODEL OUTPUT WINDOWS.json BITS GROUP_SIZE

Symmetric, which is the only kind that it makes. Prints a line of JSON: seconds from the loaded libraries to the written
checkpoint.
"""

import json
import sys
import time
from pathlib import Path

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def main() -> None:
    model, output, windows, bits, group_size = sys.argv[1:]
    ids = json.loads(Path(windows).read_text())
    start = time.perf_counter()
    config = QuantizeConfig(bits=int(bits), group_size=int(group_size), sym=True, desc_act=False, device="cpu")
    net = GPTQModel.load(model, config)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    net.quantize(rows, batch_size=1, backend=BACKEND.AUTO)
    net.save(output)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
