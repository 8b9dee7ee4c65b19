"""What all formats share: packed layers as their files have them, and the checks of what files say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.errors import CheckpointError, SpecError
from llmq.types import QuantizedWeight, QuantSpec

TensorLayout = dict[str, tuple[tuple[int, ...], torch.dtype]]
Header = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each tensor, by local name
Read = Callable[[str], Tensor]  # local name to tensor

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Stored:
    """A packed layer as its file has it."""

    spec: QuantSpec  # with what only the file tells: dtype of the scales, arrangement of the bits
    out_features: int
    in_features: int
    layout: TensorLayout  # of the tensors that are there


def header_of(tensors: Mapping[str, Tensor]) -> Header:
    """Return shape and dtype of each of `tensors`."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def matrix(header: Header, name: str) -> tuple[int, int]:
    """Return the shape of the int32 matrix `name`.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    if name not in header:
        raise CheckpointError(f"{name} is missing; the checkpoint is incomplete")
    shape, dtype = header[name]
    if dtype != torch.int32 or len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{name} is {dtype} {list(shape)}; expected torch.int32 with two sizes")
    return shape[0], shape[1]


def check_spec(spec: QuantSpec, bits: Sequence[int]) -> None:
    """Check what a configuration says of a layer, whose format holds `bits`.

    Raises:
        CheckpointError: that cannot be.
    """
    if spec.bits not in bits:
        raise CheckpointError(f"bits is {spec.bits}; {spec.format} has {', '.join(map(str, bits))}")
    if spec.group_size < 1 and spec.group_size != -1:
        raise CheckpointError(f"group_size is {spec.group_size}; use a positive number, or -1 for one group per row")


def check_header(
    header: Header,
    expected: Mapping[str, tuple[tuple[int, ...], Sequence[torch.dtype]]],
    optional: Sequence[str],
    what: str,
) -> TensorLayout:
    """Return what `header` says of the tensors `expected` for a layer that is called `what` in messages.

    Raises:
        CheckpointError: one is missing, and not `optional`, or has another shape or dtype.
    """
    found: TensorLayout = {}
    for name, (shape, dtypes) in expected.items():
        if name not in header:
            if name in optional:
                continue
            raise CheckpointError(f"{name} is missing; the checkpoint is incomplete")
        if header[name][0] != shape or header[name][1] not in dtypes:
            seen = f"{header[name][1]} {list(header[name][0])}"
            wanted = " or ".join(map(str, dtypes))
            raise CheckpointError(f"{name} is {seen}; {what} has {wanted} {list(shape)}")
        found[name] = header[name]
    return found


def group_columns(spec: QuantSpec, in_features: int) -> int:
    """Return the columns of a group in a file: one larger than the layer, which small layers may say, is all of it."""
    return min(spec.group_columns(in_features), in_features)


def described(spec: QuantSpec, out_features: int, in_features: int) -> str:
    """Return what errors call a layer."""
    return (
        f"a layer of {out_features} outputs and {in_features} inputs at {spec.bits} bits, group_size {spec.group_size},"
    )


def needs_uniform(spec: QuantSpec) -> str:
    """Return why a format that knows the uniform grid only cannot hold a layer on another one."""
    return f"the {spec.format} format has no {spec.grid} grid; use --format llmq, or llmq convert --dequantize"


def stored_scales(weight: QuantizedWeight, spec: QuantSpec) -> Tensor:
    """Return the scales [N, G] in the dtype of the file.

    Raises:
        SpecError: one is not exact in it.
    """
    scales = weight.scales.to(spec.scale_dtype)
    if not torch.equal(scales.float(), weight.scales):
        name = str(spec.scale_dtype).removeprefix("torch.")
        raise SpecError(f"a scale is not exact in {name}, the dtype that the file stores")
    return scales.contiguous()


def stored_zeros(weight: QuantizedWeight, spec: QuantSpec, minus: int = 0) -> Tensor:
    """Return the zeros [N, G] less `minus`, as uint8 codes.

    Raises:
        SpecError: one is not a code, or `spec` says symmetric and one is not the middle code.
    """
    if spec.symmetric and not bool((weight.zeros == 2 ** (spec.bits - 1)).all()):
        raise SpecError(f"a symmetric layer has zeros other than {2 ** (spec.bits - 1)}; store it as asymmetric")
    zeros = weight.zeros - minus
    if minus and zeros.min() < 0:
        raise SpecError("version 1 of the gptq format cannot store a zero of 0; use --format gptq_v2 or --sym")
    if zeros.min() < 0 or zeros.max() >= 2**spec.bits or not torch.equal(zeros, zeros.round()):
        seen = f"{float(weight.zeros.min()):g} to {float(weight.zeros.max()):g}"
        raise SpecError(f"zeros of {seen} do not fit the {spec.bits} bits of a stored zero")
    return zeros.to(torch.uint8)


def setting(config: Mapping[str, Any], names: Sequence[str], kind: type, default: Any, wanted: str) -> Any:
    """Return the value that `config` has under one of `names`, or `default`; None counts as not set.

    Text is lowered: no value that llmq reads has capitals.

    Raises:
        CheckpointError: it is not of type `kind`, or several names have different values.
    """
    given = {name: config[name] for name in names if config.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(f"quantization_config: {name} is {shown(value)}; llmq reads {wanted}")
    values = [value.lower() if isinstance(value, str) else value for value in given.values()]
    if any(value != values[0] for value in values):
        raise CheckpointError(
            f"quantization_config contradicts itself: {shown(given)}, and readers differ in which they follow; keep one"
        )
    return values[0] if values else default


def group_size_of(config: Mapping[str, Any], names: Sequence[str], default: int) -> int:
    """Return the group size that `config` says under one of `names`.

    Raises:
        CheckpointError: it is no group size.
    """
    found: int = setting(config, names, int, default, "a positive number or -1")
    if found < 1 and found != -1:
        raise CheckpointError(f"quantization_config: group_size is {found}; llmq reads a positive number or -1")
    return found


def only_spec(specs: Mapping[str, QuantSpec], what: str) -> QuantSpec:
    """Return the one spec that all modules have.

    Raises:
        SpecError: they differ.
    """
    kinds = {(spec.bits, spec.group_size, spec.symmetric, spec.format, spec.grid): spec for spec in specs.values()}
    if len(kinds) != 1:
        raise SpecError(f"{what} has one quantization for all modules, not {len(kinds)}")
    return next(iter(kinds.values()))


def shown(value: object) -> str:
    """Return `value` for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
