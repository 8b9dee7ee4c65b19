"""EoRA in float64 as its paper writes it (arXiv 2410.21271, algorithm 1): project, truncate the SVD, project back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reference(NamedTuple):
    """The factors, the singular values they were cut from, and what H can see."""

    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    singular_values: Tensor  # of E S
    active: Tensor  # [K, K], the projector onto the inputs that occur


def eora_reference(error: Tensor, h: Tensor, rank: int) -> Reference:
    """Return ``B = U_r Σ_r^½`` and ``A = Σ_r^½ V_rᵀ S⁺`` of ``E S = U Σ Vᵀ``, ``H = S Sᵀ``, S = V Λ^½."""
    values, vectors = torch.linalg.eigh(h.double())
    kept = values > values.max() * len(h) * torch.finfo(torch.float32).eps
    values, vectors = values[kept], vectors[:, kept]
    s = vectors * values.sqrt()
    u, sigma, vt = torch.linalg.svd(error.double() @ s, full_matrices=False)
    root = sigma[:rank].sqrt()
    a = root[:, None] * vt[:rank] @ (vectors / values.sqrt()).T
    return Reference(a, u[:, :rank] * root, sigma, vectors @ vectors.T)
