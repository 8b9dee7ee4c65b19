"""AutoAWQ's "gemm" layout of 4-bit weights, as transformers, GPTQModel and vLLM read it.

Per layer of N outputs and K inputs with G groups per row:

    qweight  int32   [K, N/8]  codes of one input, eight outputs to a word
    qzeros   int32   [G, N/8]  zeros, in the same arrangement
    scales   float16 [G, N]

Nibble j of a word, from the lowest, is that of the word's output 0, 2, 4, 6, 1, 3, 5, 7: a kernel that expands two
nibbles at once gets neighbours that way. Zeros are stored as they are, always: readers want them of symmetric layers
too, where each is 8. Groups are contiguous; there is no index of them. Scales and codes mean what they mean in gptq, so
that 4-bit layers of either go into the other without loss (FORMATS 1.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmq.errors import CheckpointError, SpecError
from llmq.formats import bits as bitstream
from llmq.formats.naming import by_rules, left_out
from llmq.formats.stored import (
    SCALE_DTYPES,
    Header,
    Read,
    Stored,
    TensorLayout,
    check_header,
    check_spec,
    described,
    group_columns,
    group_size_of,
    header_of,
    matrix,
    needs_uniform,
    only_spec,
    setting,
    shown,
    stored_scales,
    stored_zeros,
)
from llmq.grids.uniform import UniformGrid
from llmq.types import QuantizedWeight, QuantSpec

BITS = 4
EIGHT = 8  # codes in a word

marker = "qweight"
parts: tuple[str, ...] = ("qweight", "qzeros", "scales")
optional: tuple[str, ...] = ()
index: str | None = None
embeddings = False

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output in nibble 0, 1, …
_MIDDLE = 0x88888888 - 2**32  # a word of symmetric zeros


def refuses(spec: QuantSpec, out_features: int, in_features: int) -> str | None:
    """Return why a layer of this size cannot be stored, or None if it can."""
    if spec.grid != "uniform":
        return needs_uniform(spec)
    if spec.bits != BITS:
        return f"the awq format holds 4 bits, not {spec.bits}"
    if out_features % EIGHT:
        return f"out_features {out_features} is not a multiple of 8, which the awq format packs into a word"
    if in_features % spec.group_columns(in_features):
        return f"group_size {spec.group_size} does not divide in_features {in_features}"
    return None


def layout(spec: QuantSpec, out_features: int, in_features: int) -> TensorLayout:
    """Return shape and dtype of each stored tensor by its local name."""
    groups, words = spec.groups(in_features), out_features // EIGHT
    return {
        "qweight": ((in_features, words), torch.int32),
        "qzeros": ((groups, words), torch.int32),
        "scales": ((groups, out_features), spec.scale_dtype),
    }


def recognize(spec: QuantSpec, header: Header, read: Read) -> Stored:
    """Return the layer that a file with the tensors in `header` holds.

    Its zeros are read: nothing else tells whether they are symmetric.

    Raises:
        CheckpointError: a tensor is missing, or its shape or dtype does not fit the others and `spec`.
    """
    stored = _checked(spec, header)
    symmetric = spec.symmetric or is_symmetric(read("qzeros"))
    return replace(stored, spec=replace(stored.spec, symmetric=symmetric))


def pack(weight: QuantizedWeight, spec: QuantSpec, columns: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors of one layer by their local names.

    Raises:
        SpecError: `columns` are given, a zero is not a code, or a scale is not exact in the dtype of the file.
    """
    if columns is not None:
        raise SpecError("the awq format has no g_idx: columns with act-order cannot be stored in it")
    zeros = stored_zeros(weight, spec)
    return {
        "qweight": _pack_outputs(weight.codes.T),
        "qzeros": _pack_outputs(zeros.T),
        "scales": stored_scales(weight, spec).T.contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
    """Return the weight that the stored `tensors` hold.

    Raises:
        CheckpointError: the tensors do not fit each other or `spec`.
    """
    stored = _checked(spec, header_of(tensors))
    n, k = stored.out_features, stored.in_features
    zeros = unpack_outputs(tensors["qzeros"], n).T.float()
    if spec.symmetric and not bool((zeros == 2 ** (BITS - 1)).all()):
        raise CheckpointError(
            f"the label says symmetric (zero_point false), whose zeros are stored as 8, but they are "
            f"{int(zeros.min())} to {int(zeros.max())}; set zero_point to true"
        )
    scales = tensors["scales"].T.float().contiguous()
    codes = unpack_outputs(tensors["qweight"], n).T.contiguous()
    return QuantizedWeight(codes, scales, zeros.contiguous(), UniformGrid(BITS, spec.symmetric), group_columns(spec, k))


def columns(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor | None:
    """Return None: the columns are in order, always."""
    return None


def config(specs: Mapping[str, QuantSpec], dense: Sequence[str]) -> dict[str, object]:
    """Return the quantization_config for these packed modules, and `dense`, linears that stay dense.

    `zero_point` is true of symmetric layers, too: their zeros are there, and vLLM's fast kernel wants it so. Whether
    they are symmetric can be seen from them.

    Raises:
        SpecError: the specs differ; AWQ has one for all.
    """
    spec = only_spec(specs, "the awq format")
    return {
        "quant_method": "awq",
        "bits": spec.bits,
        "group_size": spec.group_size,
        "zero_point": True,
        "version": "gemm",  # AutoAWQ's name for the layout, which transformers and vLLM read
        "format": "gemm",  # GPTQModel's
        "modules_to_not_convert": list(dense),
        **({"dynamic": left_out(dense)} if dense else {}),  # the same for GPTQModel
    }


def specs(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, QuantSpec]:
    """Return what the quantization_config `config`, in AutoAWQ's or transformers' spelling, says of `modules`.

    Raises:
        CheckpointError: a key is missing, has a value that llmq does not read, or contradicts another.
    """
    if (backend := config.get("backend")) == "llm-awq":
        raise CheckpointError(f"quantization_config: backend is {backend!r}, a layout of its own; llmq reads gemm")
    version = setting(config, ("version", "format", "checkpoint_format"), str, "gemm", "gemm")
    if version != "gemm":
        raise CheckpointError(f"quantization_config: version is {version!r}; llmq reads gemm")
    return by_rules(config, modules, _spec)


def _spec(config: Mapping[str, Any]) -> QuantSpec:
    """Return the spec that `config` describes."""
    bits = setting(config, ("bits", "w_bit"), int, BITS, "4")
    if bits != BITS:
        raise CheckpointError(f"quantization_config: bits is {shown(bits)}; llmq reads awq of 4 bits")
    group_size = group_size_of(config, ("group_size", "q_group_size"), 128)
    zero_point = setting(config, ("zero_point",), bool, True, "true or false")
    return QuantSpec(bits, group_size, not zero_point, "awq")


def is_symmetric(qzeros: Tensor) -> bool:
    """Return whether all stored zeros, int32 [G, N/8], are the middle code."""
    return bool((qzeros == _MIDDLE).all())


def _pack_outputs(codes: Tensor) -> Tensor:
    """Return int32 words [R, N/8] of uint8 `codes` [R, N]."""
    rows, n = codes.shape
    return bitstream.pack(codes.reshape(rows, n // EIGHT, EIGHT)[:, :, list(_ORDER)].reshape(rows, n), BITS)


def unpack_outputs(words: Tensor, n: int) -> Tensor:
    """Return the uint8 codes [R, N] in int32 `words` [R, N/8]."""
    nibbles = bitstream.unpack(words, BITS, n).reshape(len(words), n // EIGHT, EIGHT)
    codes = torch.empty_like(nibbles)
    codes[:, :, list(_ORDER)] = nibbles
    return codes.reshape(len(words), n)


def _checked(spec: QuantSpec, header: Header) -> Stored:
    """Return the layer in `header`, its symmetry as `spec` has it."""
    k, words = matrix(header, "qweight")
    n = words * EIGHT
    check_spec(spec, (BITS,))
    if k % group_columns(spec, k):
        raise CheckpointError(f"qweight has {k} rows, of which group_size {spec.group_size} leaves some over")
    dtypes = {"scales": SCALE_DTYPES}
    expected = {name: (shape, dtypes.get(name, (dtype,))) for name, (shape, dtype) in layout(spec, n, k).items()}
    found = check_header(header, expected, optional, described(spec, n, k))
    return Stored(replace(spec, scale_dtype=found["scales"][1]), n, k, found)
