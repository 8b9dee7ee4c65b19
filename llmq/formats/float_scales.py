"""Scales that files hold as small floats: E8M0, and E4M3 beside a scale of the whole layer, `global_scale`.

That one is the least power of two that brings all scales of the layer within E4M3, so that a weight has one file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llmq.errors import CheckpointError
from llmq.formats.stored import SCALE_DTYPES, TensorLayout, stored_scales
from llmq.grids.float_scales import shared_unit
from llmq.grids.scales import MAX_SCALE, MIN_SCALE
from llmq.types import QuantizedWeight, QuantSpec

GLOBAL = "global_scale"


def layout(spec: QuantSpec, out_features: int, groups: int) -> TensorLayout:
    """Return shape and dtype of the tensors that hold the scales of a layer."""
    found: TensorLayout = {"scales": ((out_features, groups), spec.scale_dtype)}
    return found | {GLOBAL: ((1,), torch.float32)} if _has_global(spec) else found


def pack(weight: QuantizedWeight, spec: QuantSpec) -> dict[str, Tensor]:
    """Return the tensors that hold the scales of `weight`.

    Raises:
        SpecError: one is not exact in the dtype of the file.
    """
    if not _has_global(spec):
        return {"scales": stored_scales(weight, spec)}
    unit = shared_unit(float(weight.scales.max()))
    scales = stored_scales(replace(weight, scales=weight.scales / unit), spec)
    return {"scales": scales, GLOBAL: torch.tensor([unit], device=scales.device)}


def unpack(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor:
    """Return the scales [..., N, G] in the `tensors` of one layer, or of several stacked, in a dtype of numbers.

    Raises:
        CheckpointError: small floats are scales that llmq cannot multiply by.
    """
    stored = tensors["scales"]
    if stored.dtype in SCALE_DTYPES:
        return stored.contiguous()
    scales = stored.float()
    if _has_global(spec):
        unit = tensors[GLOBAL]
        if not bool((unit.frexp().mantissa == 0.5).all()):
            raise CheckpointError(f"{GLOBAL} is {unit.flatten()[0].item():g}; llmq reads powers of two")
        scales = scales * unit[..., None]
    if not bool(((scales >= MIN_SCALE) & (scales <= MAX_SCALE)).all()):
        raise CheckpointError(
            f"scales are {float(scales.min()):g} to {float(scales.max()):g}; those of the {spec.grid} grid are "
            f"{MIN_SCALE:g} to {MAX_SCALE:g}"
        )
    return scales


def _has_global(spec: QuantSpec) -> bool:
    return spec.scale_dtype == torch.float8_e4m3fn
