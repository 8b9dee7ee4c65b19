"""How close is close: one bound for every comparison of a kernel with float64.

The measure is the relative Frobenius error against float64 *on the same codes*. A correct fp16 or bf16
kernel that accumulates in float32 lands at 0.2 to 0.3 machine epsilons whatever K is, since little but the
last rounding is left; a zero that is off by one in one group of 112 lands at 1.9. In float32 the
accumulation itself is seen, and grows like the square root of K. Cosine similarity is no measure here: it
cannot see a wrong scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected64: Tensor) -> float:
    """Return ||actual - expected64|| / ||expected64||; NaN if either has one, 0 if both are all zero."""
    difference = torch.linalg.vector_norm(actual.double() - expected64).item()
    norm = torch.linalg.vector_norm(expected64).item()
    return difference / norm if norm else (math.inf if difference else 0.0)


def bound(dtype: torch.dtype, k: int) -> float:
    """Return the largest relative error that a correct product over `k` columns may have in `dtype`."""
    return (max(2.0, 0.1 * math.sqrt(k)) if dtype == torch.float32 else 1.0) * torch.finfo(dtype).eps


def assert_close_to_float64(actual: Tensor, expected64: Tensor, k: int) -> None:
    """Fail unless `actual`, computed over `k` columns, is as close to float64 as its dtype allows."""
    assert expected64.dtype == torch.float64, f"the expected values are {expected64.dtype}, not float64"
    assert actual.shape == expected64.shape, f"{list(actual.shape)} is not {list(expected64.shape)}"
    if not actual.numel():
        return
    error, limit = relative_error(actual, expected64), bound(actual.dtype, k)
    eps = torch.finfo(actual.dtype).eps
    # Written so that NaN fails.
    assert error <= limit, f"relative error {error / eps:.2f} eps of {actual.dtype}, allowed {limit / eps:.2f}"
