"""The layout "llmq", our own: what no other can hold, and everything that the others hold.

Per layer of N outputs and K inputs with G groups per row:

    shape    int64 [2]              N and K: nothing else tells K where codes do not fill the last byte
    codes    uint8 [N, ⌈K·bits/8⌉]  codes of one output, a stream of bits along the inputs; every row begins a byte
    scales   float16 or others [N, G]
    zeros    uint8 [N, G]           of asymmetric layers only; int16 at 8 bits, where version 1 of gptq knows zero 256
    permutation  int32 [K]          where groups are not of neighbouring inputs: which input each column belongs to

Any N, K and group size, with a short last group where it does not divide K. The configuration has a version, and
every scheme its grid: whoever meets a higher one, another grid or a key that it does not know has to refuse. What is
to be known of a layer besides these tensors gets a grid of its own, so that it cannot be misread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmq.errors import CheckpointError, SpecError
from llmq.formats import bits as bitstream
from llmq.formats.naming import compiled, matches, patterns
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
    setting,
    shown,
    stored_scales,
)
from llmq.grids.uniform import UniformGrid
from llmq.types import QuantizedWeight, QuantSpec

BITS = range(2, 9)
VERSION = 1

marker = "codes"
parts: tuple[str, ...] = ("shape", "codes", "scales", "zeros", "permutation")
optional: tuple[str, ...] = ("zeros", "permutation")
index: str | None = "permutation"
embeddings = True

_GRID = "uniform"
_KEYS = frozenset({"quant_method", "version", "schemes", "meta"})
_SCHEME_KEYS = frozenset({"grid", "bits", "group_size", "symmetric", "modules"})
_WORD_BYTES = 4


def refuses(spec: QuantSpec, out_features: int, in_features: int) -> str | None:
    """Return why a layer of this size cannot be stored, or None if it can."""
    return None if spec.bits in BITS else f"the llmq format holds 2 to 8 bits, not {spec.bits}"


def layout(spec: QuantSpec, out_features: int, in_features: int) -> TensorLayout:
    """Return shape and dtype of each tensor that `pack` makes of columns in order, by its local name."""
    groups = spec.groups(in_features)
    found: TensorLayout = {
        "shape": ((2,), torch.int64),
        "codes": ((out_features, _row_bytes(in_features, spec.bits)), torch.uint8),
        "scales": ((out_features, groups), spec.scale_dtype),
    }
    if not spec.symmetric:
        found["zeros"] = ((out_features, groups), _zero_dtype(spec))
    return found


def recognize(spec: QuantSpec, header: Header, read: Read) -> Stored:
    """Return the layer that a file with the tensors in `header` holds; `shape` is read.

    Raises:
        CheckpointError: a tensor is missing, or its shape or dtype does not fit the others and `spec`.
    """
    check_spec(spec, BITS)
    n, row = _rows(header)
    if "shape" not in header:
        raise CheckpointError("shape is missing; the checkpoint is incomplete")
    if header["shape"] != ((2,), torch.int64):
        raise CheckpointError(f"shape is {header['shape'][1]} {list(header['shape'][0])}; expected torch.int64 [2]")
    outputs, k = (int(size) for size in read("shape"))
    if outputs != n or k < 1 or _row_bytes(k, spec.bits) != row:
        raise CheckpointError(
            f"codes is {[n, row]}; {described(spec, outputs, k)} as shape says, has "
            f"{[outputs, _row_bytes(k, spec.bits)]}"
        )
    wanted = layout(spec, n, k) | {"permutation": ((k,), torch.int32)}
    dtypes = {"scales": SCALE_DTYPES, "permutation": INDEX_DTYPES}
    expected = {name: (size, dtypes.get(name, (dtype,))) for name, (size, dtype) in wanted.items()}
    found = check_header(header, expected, ("permutation",), described(spec, n, k))
    if spec.symmetric and "zeros" in header:
        raise CheckpointError("zeros is there, but config.json says symmetric; set symmetric to false")
    return Stored(replace(spec, scale_dtype=found["scales"][1]), n, k, found)


def pack(weight: QuantizedWeight, spec: QuantSpec, columns: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors of one layer by their local names.

    Codes stay sorted by group; `columns` (int64 [K]) is stored beside them.

    Raises:
        SpecError: a zero is neither a code nor 2^bits, a symmetric layer has others than the middle one, or a scale is
            not exact in the dtype of the file.
    """
    n, k = weight.codes.shape
    stream = bitstream.pack(weight.codes, spec.bits)
    found = {
        "shape": torch.tensor([n, k], device=stream.device),
        "codes": stream.view(torch.uint8)[:, : _row_bytes(k, spec.bits)].contiguous(),
        "scales": stored_scales(weight, spec),
    }
    zeros = _stored_zeros(weight, spec)
    if not spec.symmetric:
        found["zeros"] = zeros
    if columns is not None:
        found["permutation"] = columns.int()
    return found


def unpack(tensors: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedWeight:
    """Return the weight that the stored `tensors` hold; its columns are sorted by group, see `columns`.

    Raises:
        CheckpointError: the tensors do not fit each other or `spec`, or zeros or columns are none.
    """
    stored = recognize(spec, header_of(tensors), tensors.__getitem__)
    spec, k = stored.spec, stored.in_features
    columns(tensors, spec)
    scales = tensors["scales"].float().contiguous()
    zeros = torch.full_like(scales, 2 ** (spec.bits - 1)) if spec.symmetric else tensors["zeros"].float().contiguous()
    if bool(((zeros < 0) | (zeros > 2**spec.bits)).any()):
        raise CheckpointError(
            f"zeros are {float(zeros.min()):g} to {float(zeros.max()):g}; codes of {spec.bits} bits "
            f"have 0 to {2**spec.bits}"
        )
    grid = UniformGrid(spec.bits, spec.symmetric)
    return QuantizedWeight(_codes(tensors["codes"], spec.bits, k), scales, zeros, grid, group_columns(spec, k))


def columns(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Tensor | None:
    """Return int64 [K], which input each column of the unpacked weight belongs to, or None where no order is stored.

    Raises:
        CheckpointError: some input has no column or two, or those of a group do not rise, as every writer has them.
    """
    found = tensors.get("permutation")
    if found is None:
        return None
    if found.dim() != 1 or found.dtype not in INDEX_DTYPES:
        raise CheckpointError(f"permutation is {found.dtype} {list(found.shape)}; expected torch.int32 with one size")
    k = len(found)
    place = found.long()
    if not torch.equal(place.sort().values, torch.arange(k, device=place.device)):
        raise CheckpointError(
            f"permutation has {int(place.min())} to {int(place.max())}, not each of 0 to {k - 1} once"
        )
    falls = (place.diff() < 0).nonzero().flatten() + 1
    if bool((falls % group_columns(spec, k)).any()):
        raise CheckpointError("permutation does not rise within a group; sort each group's, and its codes with them")
    return place


def words(codes: Tensor) -> Tensor:
    """Return stored `codes` [..., B] as the int32 words [..., ⌈B/4⌉] of streams; in place, if B is a multiple of 4."""
    rest, codes = -codes.shape[-1] % _WORD_BYTES, codes.contiguous()
    if rest or codes.storage_offset() % _WORD_BYTES or codes.data_ptr() % _WORD_BYTES:  # bytes of a file lie anywhere
        codes = pad(codes, (0, rest))
    return codes.view(torch.int32)


def config(specs: Mapping[str, QuantSpec], dense: Sequence[str]) -> dict[str, object]:
    """Return the quantization_config for these packed modules.

    One spec is said of all packed modules, which their tensors tell; several get a list of expressions each, which
    match none of the others' modules. `dense` modules have no codes, and are not mentioned.

    Raises:
        SpecError: there are no packed modules.
    """
    members: dict[tuple[int, int, bool], list[str]] = {}
    for name, spec in specs.items():
        members.setdefault((spec.bits, spec.group_size, spec.symmetric), []).append(name)
    if not members:
        raise SpecError("nothing is packed: there is no quantization to describe")
    schemes: list[dict[str, object]] = []
    for (bits, group_size, symmetric), own in members.items():
        scheme: dict[str, object] = {"grid": _GRID, "bits": bits, "group_size": group_size, "symmetric": symmetric}
        if len(members) > 1:
            mine = set(own)
            scheme["modules"] = patterns(own, [name for name in specs if name not in mine])
        schemes.append(scheme)
    return {"quant_method": "llmq", "version": VERSION, "schemes": schemes}


def specs(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, QuantSpec]:
    """Return what the quantization_config `config` says of each of the packed `modules`: the first scheme for it.

    Raises:
        CheckpointError: it is of a newer llmq, says something that cannot be, or nothing of one of them.
    """
    version = setting(config, ("version",), int, None, f"versions up to {VERSION}")
    if version is None or version < 1:
        raise CheckpointError(f"quantization_config: version is {shown(version)}; llmq reads {VERSION}")
    if version > VERSION:
        raise _newer(f"version is {version}, this llmq reads up to {VERSION}")
    _check_keys(config, _KEYS, "")
    given = config.get("schemes")
    if not isinstance(given, list) or not given or not all(isinstance(scheme, Mapping) for scheme in given):
        raise CheckpointError(f"quantization_config: schemes is {shown(given)}; llmq reads a list of objects")
    schemes = [(_modules(scheme, len(given)), _spec(scheme)) for scheme in given]
    found = {}
    for module in modules:
        spec = next((s for own, s in schemes if own is None or any(matches(p, module) for p in own)), None)
        if spec is None:
            raise CheckpointError(f"quantization_config: {module} is packed, but the modules of no scheme name it")
        found[module] = spec
    return found


def _spec(scheme: Mapping[str, Any]) -> QuantSpec:
    """Return what one scheme says."""
    _check_keys(scheme, _SCHEME_KEYS, "schemes: ")
    grid = setting(scheme, ("grid",), str, None, _GRID)
    if grid is None:
        raise CheckpointError("quantization_config: a scheme has no grid; llmq writes one, the file is damaged")
    if grid != _GRID:
        raise _newer(f"grid is {shown(grid)}, this llmq reads {_GRID}")
    bits = setting(scheme, ("bits",), int, None, "2 to 8")
    if bits not in BITS:
        raise CheckpointError(f"quantization_config: bits is {shown(bits)}; llmq reads 2 to 8")
    symmetric = setting(scheme, ("symmetric",), bool, None, "true or false")
    if symmetric is None or scheme.get("group_size") is None:
        key = "symmetric" if symmetric is None else "group_size"
        raise CheckpointError(f"quantization_config: a scheme has no {key}; llmq writes one, the file is damaged")
    return QuantSpec(bits, group_size_of(scheme, ("group_size",), -1), symmetric, "llmq")


def _modules(scheme: Mapping[str, Any], count: int) -> list[Any] | None:
    """Return the expressions for the modules of a scheme, one of `count`; None: it is for all."""
    given = scheme.get("modules")
    if given is None and count == 1:
        return None
    if not isinstance(given, list) or not all(isinstance(pattern, str) for pattern in given):
        raise CheckpointError(
            f"quantization_config: the modules of a scheme are {shown(given)}; llmq reads a list of expressions"
        )
    return [compiled(pattern, "schemes") for pattern in given]


def _check_keys(given: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    """Check that nothing is said that this version does not know: it could be what decides on the weights."""
    strange = sorted(set(given) - known)
    if strange:
        raise _newer(f"{where}{shown(strange[0])} is unknown to this llmq")


def _newer(what: str) -> CheckpointError:
    return CheckpointError(f"quantization_config: {what}; this folder needs a newer llmq")


def _rows(header: Header) -> tuple[int, int]:
    """Return the rows of codes, and the bytes in each."""
    if "codes" not in header:
        raise CheckpointError("codes is missing; the checkpoint is incomplete")
    shape, dtype = header["codes"]
    if dtype != torch.uint8 or len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"codes is {dtype} {list(shape)}; expected torch.uint8 with two sizes")
    return shape[0], shape[1]


def _stored_zeros(weight: QuantizedWeight, spec: QuantSpec) -> Tensor:
    """Return the zeros [N, G] in the dtype of the file."""
    zeros, middle = weight.zeros, 2 ** (spec.bits - 1)
    if spec.symmetric and not bool((zeros == middle).all()):
        raise SpecError(f"a symmetric layer has zeros other than {middle}; store it as asymmetric")
    if not bool(((zeros >= 0) & (zeros <= 2**spec.bits) & (zeros == zeros.round())).all()):
        raise SpecError(
            f"zeros of {float(zeros.min()):g} to {float(zeros.max()):g}; the llmq format stores whole "
            f"numbers from 0 to {2**spec.bits} at {spec.bits} bits"
        )
    return zeros.to(_zero_dtype(spec)).contiguous()


def _zero_dtype(spec: QuantSpec) -> torch.dtype:
    return torch.uint8 if spec.bits < 8 else torch.int16


def _row_bytes(in_features: int, bits: int) -> int:
    return -(-in_features * bits // 8)


def _codes(stored: Tensor, bits: int, in_features: int) -> Tensor:
    """Return uint8 codes [R, K] of stored rows [R, B]."""
    return bitstream.unpack(words(stored), bits, in_features)
