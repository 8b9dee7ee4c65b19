"""From what the user typed to a model, its tokenizer, a device and a dtype, for the commands that run models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmq.errors import CheckpointError, SpecError
from llmq.recipe import parse_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "float16", "bfloat16")
DTYPE_HELP = "Dtype of activations: float32, float16 or bfloat16."
DEVICE_HELP = "Where to compute: cpu, cuda, cuda:1."


def parse_bytes(option: str, size: str) -> int:
    """Return the bytes that `option` was given as `size`, e.g. 4GB; raise SpecError if it is no size."""
    try:
        return parse_size(size)
    except ValueError as error:
        raise SpecError(f"{option} {size}: {error}") from error


def parse_device(name: str) -> torch.device:
    """Return the device called `name`; raise SpecError when torch knows none of that name or this machine has none."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SpecError(f"--device {name}: no such device; write cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise SpecError(f"--device {name}: llmq computes on cpu or cuda")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise SpecError(f"--device {name}: torch sees {count} CUDA devices here; use --device cpu")
    return device


def parse_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """Return the dtype to compute in; None stands for the checkpoint's own.

    Float32 is the default on the CPU, where it makes results comparable from machine to machine; on a GPU
    it would double the memory of what stayed dense. Raises SpecError for an unknown name.
    """
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else None
    if name not in DTYPES:
        raise SpecError(f"--dtype {name}: expected one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def load_model(folder: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """Return the model in `folder`, packed layers packed, without the progress bar that transformers shows."""
    from transformers.utils import logging

    from llmq.hf import load

    logging.disable_progress_bar()
    return load(folder, dtype=dtype, device=device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `folder`; raise CheckpointError when there is none that transformers can load."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    # OSError: no files; ValueError, KeyError, ImportError: files of a kind that transformers cannot read
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder}: no usable tokenizer ({reason}); copy the tokenizer files of the original model into it"
        ) from error
    return tokenizer
