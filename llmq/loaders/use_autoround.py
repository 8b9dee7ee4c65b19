"""What AutoRound computes from a packed folder, through transformers; see the package.

Folders of another label, gptq or awq, are loaded as its documentation says, with an `AutoRoundConfig`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import Answer, serve  # type: ignore[import-not-found]  # the script's own folder
from use_transformers import compute, remarks  # type: ignore[import-not-found]

PACKAGES = ("auto-round", "transformers", "torch")


def run(model: str, ids: Any, new: int) -> Answer:
    """Return the logits of `ids` and what follows the first row."""
    config = transformers.AutoConfig.from_pretrained(model)
    auto: Any = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    stored = getattr(config, "quantization_config", None) or {}
    own = "auto-round" in stored.get("quant_method", "")
    options: dict[str, Any] = {} if own else {"quantization_config": transformers.AutoRoundConfig()}
    loaded, info = auto.from_pretrained(model, dtype=torch.float32, output_loading_info=True, **options)
    return compute(loaded, remarks(info), ids, new)


if __name__ == "__main__":
    serve("auto-round", PACKAGES, run)
