"""What llmq computes from a packed folder, in float32 on the CPU; see the package."""

from __future__ import annotations

from typing import Any

import torch
from protocol import Answer, serve  # type: ignore[import-not-found]  # the script's own folder

from llmq.hf import load


@torch.no_grad()
def run(model: str, ids: Any, new: int) -> Answer:
    """Return the logits of `ids` and what follows the first row."""
    loaded: Any = load(model, dtype=torch.float32)
    tokens = torch.from_numpy(ids)
    logits = loaded(tokens).logits.float().numpy()
    more = loaded.generate(tokens[:1], max_new_tokens=new, do_sample=False, pad_token_id=0) if new else tokens[:1]
    return Answer(logits, more[0, ids.shape[1] :].tolist())


if __name__ == "__main__":
    serve("llmq", ("llmq", "torch", "transformers"), run)
