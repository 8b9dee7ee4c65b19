"""What every launch of a Triton kernel here needs to know."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton

# Triton 3.9 warns when this is left open, because 3.10 changes the default.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


def interpreted(kernel: Any) -> bool:
    """Return whether `kernel` runs in Triton's interpreter (TRITON_INTERPRET was set when it was defined)."""
    return not isinstance(kernel, triton.JITFunction)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches on `device`: it takes the current one, not that of the arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache
def processors(device: torch.device) -> int:
    """Return the number of SMs of `device`; 1 in the interpreter, where splitting gains nothing."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of `device`, or None if it has none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
