"""The GPTQ layout, versions 1 and 2, as GPTQModel, optimum, transformers and vLLM read it.

Per layer of N outputs and K inputs with G groups per row:

    qweight  int32   [K·bits/32, N]  codes of one output packed along the inputs
    qzeros   int32   [G, N·bits/32]  zeros packed along the outputs
    scales   float16 [G, N]
    g_idx    int32   [K]             group of each input; column // group_size unless others wrote it with act-order

Version 1 ("gptq") stores zero - 1, a habit of the first CUDA kernels, and so cannot express a zero of 0: readers
would see the largest code plus one. Version 2 ("gptq_v2") stores the zero itself. Both are named in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmq.errors import CheckpointError, SpecError
from llmq.formats import bits as bitstream
from llmq.formats import order
from llmq.formats.naming import by_rules, left_out, patterns, within_block
from llmq.formats.stored import (
    INDEX_DTYPES,
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
    setting,
    shown,
    stored_scales,
    stored_zeros,
)
from llmq.grids.uniform import UniformGrid
from llmq.types import QuantizedWeight, QuantSpec

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}

marker = "qweight"
parts: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
optional: tuple[str, ...] = ("g_idx",)  # the oldest files lack it
index: str | None = "g_idx"
embeddings = False


def refuses(spec: QuantSpec, out_features: int, in_features: int) -> str | None:
    """Return why a layer of this size cannot be stored, or None if it can."""
    if spec.grid != "uniform":
        return needs_uniform(spec)
    if spec.bits not in BITS:
        return f"the gptq format holds {', '.join(map(str, BITS))} bits, not {spec.bits}"
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size % bitstream.WORD:
            return f"{name} {size} is not a multiple of 32, which the gptq format packs into whole words"
    if in_features % spec.group_columns(in_features):
        return f"group_size {spec.group_size} does not divide in_features {in_features}"
    return None


def layout(spec: QuantSpec, out_features: int, in_features: int) -> TensorLayout:
    """Return shape and dtype of each tensor that `pack` makes, by its local name."""
    groups = spec.groups(in_features)
    return {
        "qweight": ((in_features * spec.bits // 32, out_features), torch.int32),
        "qzeros": ((groups, out_features * spec.bits // 32), torch.int32),
        "scales": ((groups, out_features), spec.scale_dtype),
        "g_idx": ((in_features,), torch.int32),
    }


def recognize(spec: QuantSpec, header: Header, read: Read) -> Stored:
    """Return the layer that a file with the tensors in `header` holds; nothing needs to be read.

    Raises:
        CheckpointError: a tensor is missing, or its shape or dtype does not fit the others and `spec`.
    """
    rows, n = matrix(header, "qweight")
    check_spec(spec, BITS)
    k = rows * 32 // spec.bits
    if n * spec.bits % 32:
        raise CheckpointError(f"qweight has {n} columns, whose zeros of {spec.bits} bits fill no whole words")
    wanted = layout(spec, n, k)
    dtypes = {"scales": SCALE_DTYPES, "g_idx": INDEX_DTYPES}
    expected = {name: (shape, dtypes.get(name, (dtype,))) for name, (shape, dtype) in wanted.items()}
    found = check_header(header, expected, optional, described(spec, n, k))
    return Stored(replace(spec, scale_dtype=found["scales"][1]), n, k, found)


def pack(weight: QuantizedWeight, spec: QuantSpec, columns: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors of one layer by their local names.

    With `columns` (int64 [K], see `columns`) the codes go back to where a file with act-order had them.

    Raises:
        SpecError: a zero of 0 in version 1, a symmetric layer with other zeros than the middle code, or a scale that
            is not exact in the dtype of the file.
    """
    zeros = stored_zeros(weight, spec, stored_minus(spec))
    codes = order.back(weight.codes, columns)
    return {
        "qweight": bitstream.pack(codes, spec.bits).T.contiguous(),
        "qzeros": bitstream.pack(zeros.T, spec.bits),
        "scales": stored_scales(weight, spec).T.contiguous(),
        "g_idx": order.group_index(codes.shape[1], weight.group_size, columns, codes.device),
    }


def unpack(tensors: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
    """Return the weight that the stored `tensors` hold; its columns are sorted by group, see `columns`.

    Raises:
        CheckpointError: the tensors do not fit each other or `spec`, groups are of unequal size, or the zeros of a
            symmetric layer are those of the other version.
    """
    stored = recognize(spec, header_of(tensors), tensors.__getitem__)
    n, k = stored.out_features, stored.in_features
    if spec.symmetric and (wrong := mislabelled(tensors["qzeros"], spec)) is not None:
        raise CheckpointError(wrong)
    codes = bitstream.unpack(tensors["qweight"].T.contiguous(), spec.bits, k)
    sorted_columns = columns(tensors, spec)
    if sorted_columns is not None:
        codes = codes[:, sorted_columns]
    zeros = bitstream.unpack(tensors["qzeros"], spec.bits, n).T.float() + stored_minus(spec)
    scales = tensors["scales"].T.float().contiguous()
    grid = UniformGrid(spec.bits, spec.symmetric)
    return QuantizedWeight(codes, scales, zeros.contiguous(), grid, group_columns(spec, k))


def columns(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor | None:
    """Return int64 [K], which input each column of the unpacked weight belongs to, or None if they are in order.

    Raises:
        CheckpointError: the groups are not of equal size.
    """
    g_idx = tensors.get("g_idx")
    if g_idx is None:
        return None
    found = order.by_group(g_idx, spec, "g_idx")
    return None if order.is_in_order(found) else found


def mislabelled(qzeros: Tensor, spec: QuantSpec) -> str | None:
    """Return what is wrong if the zeros of one layer, `qzeros` [G, N·bits/32], are not those of the version in `spec`.

    Symmetric zeros are one constant per version, which tells (FORMATS 1.1). Of asymmetric layers only those are found
    whose zeros all happen to be the other version's constant.
    """
    fields = bitstream.unpack(qzeros, spec.bits, qzeros.shape[1] * 32 // spec.bits)
    low, high = (int(extreme) for extreme in fields.aminmax())
    middle = 2 ** (spec.bits - 1)
    own = middle - stored_minus(spec)
    other, its_name = (middle, "gptq_v2") if own != middle else (middle - 1, "gptq")
    if low == high == other:
        return (
            f"the label says {spec.format}, whose symmetric zeros are stored as {own}, but all are {other}, as "
            f'{its_name} stores them; set checkpoint_format and format to "{its_name}"'
            ", or packing_format to that of it where the label is auto-round"
        )
    if spec.symmetric and not low == high == own:
        return (
            f"the label says symmetric and {spec.format}, whose zeros are stored as {own}, but they are {low} to "
            f"{high}; set sym to false"
        )
    return None


def config(specs: Mapping[str, QuantSpec], dense: Sequence[str]) -> dict[str, object]:
    """Return the quantization_config for these packed modules, and `dense`, linears or parts of the model without any.

    Where specs differ, the most common one stands above, and `dynamic` names the others: GPTQModel and vLLM follow it,
    transformers does not.

    Raises:
        SpecError: the specs differ in version, of which a checkpoint has one.
    """
    versions = {spec.format for spec in specs.values()}
    if len(versions) != 1:
        raise SpecError(f"one checkpoint is of one format, not of {' and '.join(sorted(versions)) or 'none'}")
    groups: dict[tuple[int, int, bool], list[str]] = {}
    for name, spec in specs.items():
        groups.setdefault((spec.bits, spec.group_size, spec.symmetric), []).append(name)
    base = max(groups, key=lambda kind: len(groups[kind]))
    dynamic = left_out(dense)
    for kind, own in groups.items():
        if kind != base:
            others = [*(name for other in groups if other != kind for name in groups[other]), *dense]
            settings: dict[str, object] = dict(zip(("bits", "group_size", "sym"), kind, strict=True))
            dynamic |= {f"+:{pattern}": settings for pattern in patterns(own, others)}
    inside = [name for name in map(within_block, specs) if name is not None]
    label = versions.pop()
    found: dict[str, object] = {
        "quant_method": "gptq",
        "bits": base[0],
        "group_size": base[1],
        "desc_act": False,
        "sym": base[2],
        "lm_head": len(inside) < len(specs),
        "checkpoint_format": label,  # the key that older readers know
        "format": label,
        "pack_dtype": "int32",
        "modules_in_block_to_quantize": [list(dict.fromkeys(inside))],
    }
    return found | ({"dynamic": dynamic} if dynamic else {})


def specs(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, QuantSpec]:
    """Return what the quantization_config `config` says of each of the packed `modules`.

    Raises:
        CheckpointError: a key is missing, has a value that llmq does not read, or contradicts another or the modules.
    """
    label = setting(config, ("checkpoint_format", "format"), str, "gptq", "gptq and gptq_v2")
    if label not in VERSIONS or config.get("is_marlin_format"):
        seen = label if label not in VERSIONS else "marlin (is_marlin_format)"
        raise CheckpointError(f"quantization_config: unknown checkpoint_format {seen!r}; llmq reads gptq, gptq_v2")
    words = setting(config, ("pack_dtype",), str, "int32", "int32")
    if words != "int32":
        raise CheckpointError(f"quantization_config: pack_dtype is {words!r}; llmq reads int32")
    _check_selected(config, modules)
    return by_rules(config, modules, lambda own: _spec(own, label))


def _spec(config: Mapping[str, Any], label: str) -> QuantSpec:
    """Return the spec that `config` describes, with the spellings of older tools."""
    reads = ", ".join(map(str, BITS[:-1]))
    bits = setting(config, ("bits", "w_bit", "wbits"), int, None, f"{reads} and {BITS[-1]}")
    if bits not in BITS:
        raise CheckpointError(f"quantization_config: bits is {shown(bits)}; llmq reads {reads} and {BITS[-1]}")
    group_size = group_size_of(config, ("group_size", "groupsize"), -1)
    return QuantSpec(bits, group_size, setting(config, ("sym",), bool, True, "true or false"), label)


def _check_selected(config: Mapping[str, Any], modules: Sequence[str]) -> None:
    """Check that `modules_in_block_to_quantize`, by which optimum chooses, leaves none of the packed modules out."""
    chosen = setting(config, ("modules_in_block_to_quantize",), list, None, "a list of lists of names")
    if chosen is None:
        return
    names = [name for stage in chosen for name in (stage if isinstance(stage, list) else [stage])]
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"quantization_config: modules_in_block_to_quantize is {shown(chosen)}; llmq reads a list of lists of names"
        )
    endings = {name.rpartition(".")[2] for name in names}  # files and models may differ in what stands before
    for module in modules:
        if module.rpartition(".")[2] not in endings and within_block(module) is not None:
            raise CheckpointError(
                f"quantization_config: {module} is packed, but modules_in_block_to_quantize does not name it"
            )


def stored_minus(spec: QuantSpec) -> int:
    """Return what the stored zero lacks to the true one."""
    return {"gptq": 1, "gptq_v2": 0}[spec.format]
