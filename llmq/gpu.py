"""What a GPU can be asked for."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def runs_triton(device: torch.device) -> bool:
    """Return whether Triton is there and compiles for `device`: an NVIDIA GPU of compute capability 8.0 or newer."""
    return (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and find_spec("triton") is not None
    )
