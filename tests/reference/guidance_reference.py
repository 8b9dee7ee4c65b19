"""End-loss gradients from their definition: nudge one output of one linear at one token, and see what the loss does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def end_losses(model: nn.Module, ids: Tensor, mask: Tensor | None, counted: Tensor) -> Tensor:
    """Return -Σ log p(next token) over the `counted` positions of each window, float64 [B]."""
    with torch.no_grad():
        attention = None if mask is None else mask.long()
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    assert logits.dtype == torch.float64
    losses = torch.zeros(len(ids), dtype=torch.float64)
    for t in range(ids.shape[1] - 1):
        predicted = logits[:, t].log_softmax(dim=1)[torch.arange(len(ids)), ids[:, t + 1]]
        losses -= torch.where(counted[:, t], predicted, 0.0)
    return losses


def output_gradient(
    model: nn.Module,
    module: nn.Module,
    batch: tuple[Tensor, Tensor | None, Tensor],
    place: tuple[int, int],
    call: int = 0,
) -> Tensor:
    """Return ∂ loss / ∂ y at the token `place` (window, position), float64 [N], by central differences.

    `batch` holds ids, attention mask and counted positions. `call` says which of the calls of `module` within a
    forward pass is nudged. Window u of a batch of N equal ones has output u nudged. At a step of 1e-5 what is left out
    is 1e-10 of the third derivative, and rounding adds 1e-11 of the loss.
    """
    window, position = place
    step = 1e-5
    outputs = 1

    def measure(by: float) -> Tensor:
        nonlocal outputs
        ids, mask, counted = (None if part is None else part[window].expand(outputs, -1) for part in batch)
        assert ids is not None
        assert counted is not None
        calls = 0

        def nudge(_: nn.Module, __: Any, y: Tensor) -> Tensor:
            nonlocal outputs, calls
            outputs = y.shape[-1]
            calls += 1
            if by and calls - 1 == call:
                y = y.clone()
                units = torch.arange(outputs)
                y[units, position, units] += by
            return y

        handle = module.register_forward_hook(nudge)
        try:
            return end_losses(model, ids, mask, counted)
        finally:
            handle.remove()

    measure(0.0)  # tells the number of outputs
    return (measure(step) - measure(-step)) / (2 * step)
