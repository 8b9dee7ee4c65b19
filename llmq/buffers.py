"""What all modules with packed tensors do alike: they keep the dtypes of these, and stand in for a dense weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def stand_in(like: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of nothing, of the dtype of `like` and on `device`, for models that ask a weight for these."""
    empty = like.to(device)
    empty._is_hf_initialized = True  # type: ignore[attr-defined]  # some want to fill it with random numbers
    return empty


def keep_dtypes_(module: nn.Module, before: Mapping[str, Tensor | None]) -> None:
    """Give buffers of `module` the values and dtypes that they had `before`, on the device where they are now."""
    for name, old in before.items():
        new = module._buffers[name]
        if old is not None and new is not None and new.dtype != old.dtype:
            module._buffers[name] = old.to(new.device)
