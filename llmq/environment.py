"""What a run happened on: versions, machine, memory. For reports; nothing depends on it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import version
from importlib.util import find_spec

import torch

_PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "triton", "tokenizers", "datasets")


def versions() -> dict[str, str]:
    """Return the versions of Python, llmq and the packages it stands on, as installed."""
    import llmq

    found = {"python": platform.python_version(), "llmq": llmq.__version__}
    return found | {package: version(package) for package in _PACKAGES if find_spec(package) is not None}


def machine(device: torch.device) -> dict[str, object]:
    """Return platform, processor count, threads and the device's name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": name,
    }


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the largest resident size of this process so far, and of the device's allocations, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # Linux reports KiB
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
