"""What llama.cpp computes from a GGUF file: run with the Python of an environment that has llama-cpp-python and numpy.

    python llamacpp.py MODEL.gguf --reference REFERENCE.npz [--prompt TEXT] [--tokens 20]

The reference has `texts` [n] and, for text i, `ids_i` [T] and `logits_i` [T, V] in float32. One line of JSON is
printed: versions, whether the file was loaded (or the message of the refusal), per text whether llama.cpp's own
tokenizer gives the same ids and how far its logits are from the reference, and what it goes on with after the prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

F32 = 0  # llama.cpp's number for it


def load(model: str) -> tuple[llama_cpp.Llama | None, str]:
    """Return the loaded model, or None, and what llama.cpp had to say."""
    with tempfile.TemporaryFile() as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)  # llama.cpp gives its reasons there only
        try:
            # keys and values are kept as float32, so that only what the weights' type brings along differs
            loaded = llama_cpp.Llama(
                model, n_ctx=0, n_threads=1, n_threads_batch=1, n_gpu_layers=0, logits_all=True, type_k=F32, type_v=F32
            )
        except Exception as error:  # ValueError, AssertionError, OSError
            loaded, said = None, [str(error)]
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    if loaded is None:
        said = [line for line in lines if "error" in line.lower() or "failed" in line.lower()] or said
        return None, said[0]
    return loaded, "\n".join(lines)


def compare(model: llama_cpp.Llama, reference: Any) -> list[dict[str, Any]]:
    """Return, per text, what differs from the reference."""
    found = []
    for number, text in enumerate(reference["texts"]):
        ids, expected = reference[f"ids_{number}"].tolist(), reference[f"logits_{number}"].astype(np.float64)
        own = model.tokenize(str(text).encode(), add_bos=True, special=True)
        model.reset()
        model.eval(ids)
        logits = model.scores[: len(ids)].astype(np.float64)
        p, q = (
            x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
            for x in (expected, logits)
        )
        found.append(
            {
                "same_ids": own == ids,
                "max": float(np.abs(logits - expected).max()),
                "mean": float(np.abs(logits - expected).mean()),
                "relative": float(np.linalg.norm(logits - expected) / np.linalg.norm(expected)),
                "kl": float((np.exp(p) * (p - q)).sum(1).mean()),
                "tokens": len(ids),
                "same_top": int((logits.argmax(1) == expected.argmax(1)).sum()),
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--prompt")
    parser.add_argument("--tokens", type=int, default=20)
    options = parser.parse_args()
    result: dict[str, Any] = {"loader": "llama.cpp", "version": f"llama-cpp-python {llama_cpp.__version__}"}
    model, said = load(str(options.model))
    result |= {"loaded": model is not None} if model else {"loaded": False, "message": said}
    if model and options.reference:
        texts = compare(model, np.load(options.reference))
        result["texts"] = len(texts)
        result["same_ids"] = sum(text["same_ids"] for text in texts)
        for key in ("max", "mean", "relative", "kl"):
            result[f"{key}_difference"] = max(text[key] for text in texts)
        result["same_top"] = sum(text["same_top"] for text in texts) / sum(text["tokens"] for text in texts)
    if model and options.prompt:
        model.reset()
        answer = model.create_completion(options.prompt, max_tokens=options.tokens, temperature=0.0)
        result["text"] = answer["choices"][0]["text"]
    print(json.dumps(result))
    return 0 if model else 1


if __name__ == "__main__":
    sys.exit(main())
