"""What onnxruntime computes on the CPU from a folder of `llmq convert --format onnx`; see the package."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Answer, serve  # type: ignore[import-not-found]  # the script's own folder


class Session:
    """A graph that takes keys and values of the tokens before, and returns those of all tokens."""

    def __init__(self, folder: str) -> None:
        onnxruntime = import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # errors only
        path = str(Path(folder) / "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._past = [x for x in self._session.get_inputs() if x.name.startswith("past_key_values.")]

    def empty(self, rows: int) -> list[Any]:
        """Return the cache before the first token, float32 [rows, heads, 0, size] each."""
        return [np.zeros((rows, x.shape[1], 0, x.shape[3]), dtype=np.float32) for x in self._past]

    def run(self, ids: Any, past: list[Any]) -> tuple[Any, list[Any]]:
        """Return the logits [rows, L, V] of `ids` [rows, L], which follow what is in the cache, and the new cache."""
        before, (rows, new) = past[0].shape[2], ids.shape
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, before + new), dtype=np.int64),
            "position_ids": np.tile(np.arange(before, before + new, dtype=np.int64), (rows, 1)),
        }
        feed |= {x.name: tensor for x, tensor in zip(self._past, past)}  # noqa: B905  this Python may be an old one
        logits, *present = self._session.run(None, feed)
        return logits, present


def run(model: str, ids: Any, new: int) -> Answer:
    """Return the logits of `ids` and what follows the first row."""
    net = Session(model)
    logits, _ = net.run(ids, net.empty(len(ids)))
    last, past = net.run(ids[:1], net.empty(1))
    more: list[int] = []
    for _ in range(new):
        more.append(int(np.argmax(last[0, -1])))
        last, past = net.run(np.array([more[-1:]], dtype=np.int64), past)
    return Answer(logits, more)


if __name__ == "__main__":
    serve("onnxruntime", ("onnxruntime", "numpy"), run)
