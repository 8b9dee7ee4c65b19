"""The GPTQ layout, versions 1 and 2, as GPTQModel, optimum, transformers and vLLM read it.

Per layer of N outputs and K inputs with G groups per row:

    qweight  int32   [K·bits/32, N]  codes of one output packed along the inputs
    qzeros   int32   [G, N·bits/32]  zeros packed along the outputs
    scales   float16 [G, N]
    g_idx    int32   [K]             group of each input; always column // group_size here

Version 1 ("gptq") stores zero - 1, a habit of the first CUDA kernels, and so cannot express a zero of 0: readers
would see the largest code plus one. Version 2 ("gptq_v2") stores the zero itself. Both are named in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmq.errors import CheckpointError, SpecError
from llmq.formats import bits as bitstream
from llmq.grids.uniform import UniformGrid
from llmq.types import QuantizedWeight, QuantSpec

BITS = (2, 3, 4, 8)


def refuses(spec: QuantSpec, out_features: int, in_features: int) -> str | None:
    """Return why a layer of this size cannot be stored, or None if it can."""
    if spec.bits not in BITS:
        return f"the gptq format holds {', '.join(map(str, BITS))} bits, not {spec.bits}"
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size % bitstream.WORD:
            return f"{name} {size} is not a multiple of 32, which the gptq format packs into whole words"
    if in_features % spec.group_columns(in_features):
        return f"group_size {spec.group_size} does not divide in_features {in_features}"
    return None


def layout(spec: QuantSpec, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each stored tensor by its local name."""
    groups = spec.groups(in_features)
    return {
        "qweight": ((in_features * spec.bits // 32, out_features), torch.int32),
        "qzeros": ((groups, out_features * spec.bits // 32), torch.int32),
        "scales": ((groups, out_features), torch.float16),
        "g_idx": ((in_features,), torch.int32),
    }


def pack(weight: QuantizedWeight, spec: QuantSpec) -> dict[str, Tensor]:
    """Return the tensors of one layer by their local names.

    Raises:
        SpecError: a zero of 0 in version 1, or a scale that float16 does not hold exactly.
    """
    zeros = weight.zeros.T - _stored_minus(spec)
    if zeros.min() < 0:
        raise SpecError("version 1 of the gptq format cannot store a zero of 0; use --format gptq_v2 or --sym")
    if zeros.max() >= 2**spec.bits:
        raise SpecError(f"a zero of {int(weight.zeros.max())} does not fit the {spec.bits} bits of a stored zero")
    scales = weight.scales.T.contiguous().half()
    if not torch.equal(scales.float(), weight.scales.T):
        raise SpecError("a scale is not exact in float16, the dtype of the gptq format")
    k = weight.codes.shape[1]
    return {
        "qweight": bitstream.pack(weight.codes, spec.bits).T.contiguous(),
        "qzeros": bitstream.pack(zeros.to(torch.uint8), spec.bits),
        "scales": scales,
        "g_idx": torch.arange(k, dtype=torch.int32, device=scales.device) // weight.group_size,
    }


def unpack(tensors: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
    """Return the weight that the stored `tensors` hold.

    Raises:
        CheckpointError: the groups are not contiguous columns (act-order with dynamic groups).
    """
    codes = bitstream.unpack(tensors["qweight"].T.contiguous(), spec.bits)
    k = codes.shape[1]
    group_size = spec.group_columns(k)
    g_idx = tensors.get("g_idx")
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(k, device=g_idx.device) // group_size):
        raise CheckpointError(
            "g_idx assigns columns to groups out of order (desc_act with dynamic groups); "
            "llmq reads contiguous groups only: quantize again with static groups"
        )
    zeros = bitstream.unpack(tensors["qzeros"], spec.bits).T.float() + _stored_minus(spec)
    scales = tensors["scales"].T.float().contiguous()
    return QuantizedWeight(codes, scales, zeros.contiguous(), UniformGrid(spec.bits, spec.symmetric), group_size)


def config(spec: QuantSpec) -> dict[str, object]:
    """Return the part of config.json's quantization_config that follows from `spec`."""
    return {
        "quant_method": "gptq",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "desc_act": False,
        "sym": spec.symmetric,
        "lm_head": False,
        "checkpoint_format": spec.format,  # the key that older readers know
        "format": spec.format,
        "pack_dtype": "int32",
    }


def _stored_minus(spec: QuantSpec) -> int:
    """Return what the stored zero lacks to the true one."""
    return {"gptq": 1, "gptq_v2": 0}[spec.format]
