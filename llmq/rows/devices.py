"""Which devices rows run on: functions that return why a row does not run on one, or None."""

from __future__ import annotations

import torch


def not_cpu(device: torch.device) -> str | None:
    """Return why what runs on a CPU does not run on `device`, or None if it does."""
    return None if device.type == "cpu" else f"runs on a CPU, not on {device.type}"


def no_tensor_cores(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton's kernels do not run on `device` with activations of `dtype`, or None if they do."""
    if device.type != "cuda":
        return f"runs on an NVIDIA GPU, not on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 or newer"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype} activations: tensor cores multiply float16 and bfloat16"
    return None
