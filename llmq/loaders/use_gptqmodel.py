"""What GPTQModel computes from a packed folder with its own loader; see the package.

It computes in float16. A fourth argument, `torch`, asks for the kernel that is written in torch alone; otherwise
GPTQModel chooses.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from protocol import Answer, serve  # type: ignore[import-not-found]  # the script's own folder


@torch.no_grad()
def run(model: str, ids: Any, new: int) -> Answer:
    """Return the logits of `ids` and what follows the first row."""
    gptqmodel = import_module("gptqmodel")
    # of its kernels for float32 one ignores the zeros of asymmetric layers, and for 8 bits there is none
    options: dict[str, Any] = {"dtype": torch.float16}
    if sys.argv[4:] == ["torch"]:
        method = json.loads(Path(model, "config.json").read_bytes())["quantization_config"]["quant_method"]
        options["backend"] = gptqmodel.BACKEND(f"{method}_torch")
    loaded = gptqmodel.GPTQModel.load(model, device="cpu", **options)
    net = loaded.model
    layers = sorted({type(m).__name__ for m in net.modules() if "qweight" in dict(m.named_buffers(recurse=False))})
    tokens = torch.from_numpy(ids)
    logits = net(tokens).logits
    notes = [f"layers are {', '.join(layers) or 'dense'}"]
    more = net.generate(tokens[:1], max_new_tokens=new, do_sample=False, pad_token_id=0) if new else tokens[:1]
    return Answer(
        logits.float().numpy(), more[0, ids.shape[1] :].tolist(), notes, str(logits.dtype).removeprefix("torch.")
    )


if __name__ == "__main__":
    serve("gptqmodel", ("gptqmodel", "transformers", "torch"), run)
