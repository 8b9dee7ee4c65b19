"""llmq: large language models, four times smaller and as good as before.

>>> import llmq
>>> llmq.quantize("org/model", "model-4bit")  # doctest: +SKIP
>>> model = llmq.load("model-4bit")  # doctest: +SKIP

Importing llmq is cheap: torch, transformers and triton are imported when something needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from llmq.errors import (
    CalibrationError,
    CheckpointError,
    KernelError,
    LlmqError,
    RankError,
    SolverError,
    SpecError,
)

if TYPE_CHECKING:
    from llmq.driver import quantize
    from llmq.hf import load
    from llmq.recipe import Recipe
    from llmq.report import Report
    from llmq.types import QuantSpec

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "KernelError",
    "LlmqError",
    "QuantSpec",
    "RankError",
    "Recipe",
    "Report",
    "SolverError",
    "SpecError",
    "__version__",
    "load",
    "quantize",
]

_LAZY = {
    "QuantSpec": "llmq.types",
    "Recipe": "llmq.recipe",
    "Report": "llmq.report",
    "load": "llmq.hf",
    "quantize": "llmq.driver",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'llmq' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
