"""What llama.cpp computes from a GGUF file; see the package."""

from __future__ import annotations

import os
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Answer, serve  # type: ignore[import-not-found]  # the script's own folder

F32 = 0  # llama.cpp's number for it


def load(model: str, length: int) -> Any:
    """Return the loaded model; what llama.cpp writes to stderr alone becomes the error's words."""
    llama_cpp = import_module("llama_cpp")
    with tempfile.TemporaryFile() as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            # keys and values are kept as float32, so that only what the weights' type brings along differs
            return llama_cpp.Llama(
                model, n_ctx=length, n_batch=length, n_ubatch=length, n_threads=1, n_threads_batch=1, n_gpu_layers=0,
                logits_all=True, type_k=F32, type_v=F32,
            )  # fmt: skip
        except (ValueError, AssertionError, OSError, RuntimeError) as error:
            log.seek(0)
            said = [line for line in log.read().decode(errors="replace").splitlines() if "error" in line.lower()]
            raise RuntimeError(said[0] if said else str(error)) from error
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def run(model: str, ids: Any, new: int) -> Answer:
    """Return the logits of `ids` and what follows the first row."""
    net = load(model, max(ids.shape[1] + new, 64))
    rows = []
    for row in ids:
        net.reset()
        net.eval(row.tolist())
        rows.append(net.scores[: len(row)].copy())
    more: list[int] = []
    net.reset()
    net.eval(ids[0].tolist())
    for _ in range(new):
        more.append(int(np.argmax(net.scores[net.n_tokens - 1])))
        net.eval(more[-1:])
    library = Path(import_module("llama_cpp").__file__ or "").parent / "lib"
    # with it, batches of 32 tokens and more are multiplied in float32, other ones with activations of 8 bits
    blas = any(library.glob("*ggml-blas*"))
    return Answer(np.stack(rows), more, ["built with BLAS" if blas else "built without BLAS"])


if __name__ == "__main__":
    serve("llamacpp", ("llama-cpp-python", "numpy"), run)
