"""What transformers computes from a packed folder with the quantizer that it finds installed; see the package."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import Answer, serve  # type: ignore[import-not-found]  # the script's own folder

PACKAGES = ("transformers", "compressed-tensors", "optimum", "gptqmodel", "torch")


def load(model: str) -> tuple[Any, list[str]]:
    """Return the model, and what was remarkable about loading it."""
    config = transformers.AutoConfig.from_pretrained(model)
    auto: Any = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    notes: list[str] = []
    options = {"dtype": torch.float32, "output_loading_info": True}
    try:
        loaded, info = auto.from_pretrained(model, **options)
    except Exception as error:
        stored = getattr(config, "quantization_config", None) or {}
        if stored.get("quant_method") != "compressed-tensors":
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        notes.append(f"with CompressedTensorsConfig(dequantize=True) only; by default {reason}")
        dense = transformers.CompressedTensorsConfig(dequantize=True)
        loaded, info = auto.from_pretrained(model, quantization_config=dense, **options)
    return loaded, notes + remarks(info)


def remarks(info: dict[str, Any]) -> list[str]:
    """Return what transformers says of tensors that it lacks or has no place for."""
    notes = []
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, info.get(what) or ()))
        notes += [f"{len(names)} {what.replace('_', ' ')}, {names[0]} for one"] if names else []
    return notes


def run(model: str, ids: Any, new: int) -> Answer:
    """Return the logits of `ids` and what follows the first row."""
    return compute(*load(model), ids, new)


@torch.no_grad()
def compute(loaded: Any, notes: list[str], ids: Any, new: int) -> Answer:
    """Return what a model makes of `ids`, and what follows the first row."""
    loaded.eval()
    tokens = torch.from_numpy(ids)
    logits = loaded(tokens).logits
    more = loaded.generate(tokens[:1], max_new_tokens=new, do_sample=False, pad_token_id=0) if new else tokens[:1]
    return Answer(
        logits.float().numpy(), more[0, ids.shape[1] :].tolist(), notes, str(logits.dtype).removeprefix("torch.")
    )


if __name__ == "__main__":
    serve("transformers", PACKAGES, run)
