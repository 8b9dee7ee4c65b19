"""The layout "llmq", our own: what no other can hold, and everything that the others hold.

Per layer of N outputs and K inputs with G groups per row:

    shape    int64 [2]              N and K: nothing else tells K where codes do not fill the last byte
    codes    uint8 [N, ⌈K·bits/8⌉]  codes of one output, a stream of bits along the inputs; every row begins a byte
    scales   float16 or others [N, G]
    global_scale  float32 [1]       of nvfp4 only: a power of two, by which the scales are multiplied
    zeros    uint8 [N, G]           of asymmetric layers only; int16 at 8 bits, where version 1 of gptq knows zero 256
    permutation  int32 [K]          where groups are not of neighbouring inputs: which input each column belongs to
    levels   float32 [T, 2^bits]    of grids with tables: what a code stands for, times the scale; zeros pick the table
             uint8 [N, G, 2^bits / 2 + 2] of grids that learn levels, and have no scales: `llmq.grids.level_bytes`

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
from llmq.formats import float_scales, vectors
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
)
from llmq.grids import ALL_GRIDS, level_bytes, make_grid
from llmq.types import Grid, QuantizedWeight, QuantSpec

VERSION = 1

marker = "codes"
optional: tuple[str, ...] = ("scales", "global_scale", "zeros", "levels", "codebook", "permutation")
parts: tuple[str, ...] = ("shape", "codes", *optional)
index: str | None = "permutation"
embeddings = True

_KEYS = frozenset({"quant_method", "version", "schemes", "meta"})
_SCHEME_KEYS = frozenset({"grid", "bits", "group_size", "symmetric", "modules"})
_WORD_BYTES = 4


def refuses(spec: QuantSpec, out_features: int, in_features: int) -> str | None:
    """Return why a layer of this size cannot be stored, or None if it can."""
    if spec.bits not in ALL_GRIDS[spec.grid].bits:
        known = ", ".join(map(str, ALL_GRIDS[spec.grid].bits))
        return f"the {spec.grid} grid has {known} bits, not {spec.bits}"
    return vectors.refuses(spec, in_features) if vectors.holds(spec) else None


def layout(spec: QuantSpec, out_features: int, in_features: int) -> TensorLayout:
    """Return shape and dtype of each tensor that `pack` makes of columns in order, by its local name."""
    if vectors.holds(spec):
        return vectors.layout(spec, out_features, in_features)
    groups = spec.groups(in_features)
    found: TensorLayout = {
        "shape": ((2,), torch.int64),
        "codes": ((out_features, _row_bytes(in_features, spec.bits)), torch.uint8),
    }
    grid = _grid(spec)
    if grid.learns:
        found["levels"] = ((out_features, groups, level_bytes.size_of(2**spec.bits)), torch.uint8)
    else:
        found |= float_scales.layout(spec, out_features, groups)
    if grid.tables is not None:
        found["levels"] = (tuple(grid.tables.shape), torch.float32)
    if not spec.symmetric:
        found["zeros"] = ((out_features, groups), _zero_dtype(spec))
    return found


def recognize(spec: QuantSpec, header: Header, read: Read) -> Stored:
    """Return the layer that a file with the tensors in `header` holds; `shape` is read.

    Raises:
        CheckpointError: a tensor is missing, or its shape or dtype does not fit the others and `spec`.
    """
    check_spec(spec, ALL_GRIDS[spec.grid].bits)
    if vectors.holds(spec):
        return vectors.recognize(spec, header, read)
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
    dtypes = {"scales": _scale_dtypes(spec), "permutation": INDEX_DTYPES}
    expected = {name: (size, dtypes.get(name, (dtype,))) for name, (size, dtype) in wanted.items()}
    found = check_header(header, expected, ("permutation",), described(spec, n, k))
    if spec.symmetric and "zeros" in header:
        raise CheckpointError("zeros is there, but config.json says symmetric; set symmetric to false")
    return Stored(replace(spec, scale_dtype=found.get("scales", ((), spec.scale_dtype))[1]), n, k, found)


def pack(weight: QuantizedWeight, spec: QuantSpec, columns: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors of one layer by their local names.

    Codes stay sorted by group; `columns` (int64 [K]) is stored beside them.

    Raises:
        SpecError: a zero is neither a code nor 2^bits, a symmetric layer has others than the middle one, or a scale is
            not exact in the dtype of the file.
    """
    if vectors.holds(spec):
        return vectors.pack(weight, spec, columns)
    n, k = weight.codes.shape
    stream = bitstream.pack(weight.codes, spec.bits)
    found = {
        "shape": torch.tensor([n, k], device=stream.device),
        "codes": stream.view(torch.uint8)[:, : _row_bytes(k, spec.bits)].contiguous(),
    }
    if weight.levels is None:
        found |= float_scales.pack(weight, spec)
    else:
        found["levels"] = level_bytes.to_bytes(weight.levels)
    if weight.grid.tables is not None:
        found["levels"] = weight.grid.tables.to(stream.device, copy=True)  # that of each layer is its own
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
    if vectors.holds(spec):
        return vectors.unpack(tensors, stored, words(tensors["codes"]))
    columns(tensors, spec)
    grid = _grid(spec)
    levels = learned_levels(tensors) if grid.learns else None
    scales = float_scales.unpack(tensors, spec).float() if levels is None else torch.ones_like(levels[..., 0])
    if grid.tables is not None and not torch.equal(tensors["levels"].cpu(), grid.tables):
        raise CheckpointError(f"levels are not those of the {spec.grid} grid; another program has written them")
    zeros = torch.full_like(scales, grid.zeros[0]) if spec.symmetric else tensors["zeros"].float().contiguous()
    lowest, highest = zero_range(spec)
    if bool(((zeros < lowest) | (zeros > highest)).any()):
        raise CheckpointError(
            f"zeros are {float(zeros.min()):g} to {float(zeros.max()):g}; {spec.grid} codes of {spec.bits} bits "
            f"have {lowest} to {highest}"
        )
    codes = codes_of(tensors["codes"], spec.bits, k)
    return QuantizedWeight(codes, scales, zeros, grid, group_columns(spec, k), levels)


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


def codes_of(stored: Tensor, bits: int, count: int) -> Tensor:
    """Return the `count` codes in each of the `stored` rows [R, B], uint8 [R, count]."""
    return bitstream.unpack(words(stored), bits, count)


def config(specs: Mapping[str, QuantSpec], dense: Sequence[str]) -> dict[str, object]:
    """Return the quantization_config for these packed modules.

    One spec is said of all packed modules, which their tensors tell; several get a list of expressions each, which
    match none of the others' modules. `dense` modules have no codes, and are not mentioned.

    Raises:
        SpecError: there are no packed modules.
    """
    members: dict[tuple[str, int, int, bool], list[str]] = {}
    for name, spec in specs.items():
        members.setdefault((spec.grid, spec.bits, spec.group_size, spec.symmetric), []).append(name)
    if not members:
        raise SpecError("nothing is packed: there is no quantization to describe")
    schemes: list[dict[str, object]] = []
    for (grid, bits, group_size, symmetric), own in members.items():
        scheme: dict[str, object] = {"grid": grid, "bits": bits, "group_size": group_size, "symmetric": symmetric}
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
    grid = setting(scheme, ("grid",), str, None, ", ".join(ALL_GRIDS))
    if grid is None:
        raise CheckpointError("quantization_config: a scheme has no grid; llmq writes one, the file is damaged")
    if grid not in ALL_GRIDS:
        raise _newer(f"grid is {shown(grid)}, this llmq reads {', '.join(ALL_GRIDS)}")
    row = ALL_GRIDS[grid]
    known = ", ".join(map(str, row.bits))
    bits = setting(scheme, ("bits",), int, None, known)
    if bits not in row.bits:
        raise CheckpointError(f"quantization_config: bits is {shown(bits)}; llmq reads {known} of the {grid} grid")
    symmetric = setting(scheme, ("symmetric",), bool, None, "true or false")
    if symmetric is None or scheme.get("group_size") is None:
        key = "symmetric" if symmetric is None else "group_size"
        raise CheckpointError(f"quantization_config: a scheme has no {key}; llmq writes one, the file is damaged")
    if symmetric not in row.symmetric:
        raise CheckpointError(f"quantization_config: symmetric is {shown(symmetric)}, the {grid} grid is not")
    return QuantSpec(bits, group_size_of(scheme, ("group_size",), -1), symmetric, "llmq", row.scale_dtype, grid)


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
    zeros, (lowest, highest) = weight.zeros, zero_range(spec)
    if spec.symmetric and not bool((zeros == lowest).all()):
        raise SpecError(f"a symmetric layer has zeros other than {lowest}; store it as asymmetric")
    if not bool(((zeros >= lowest) & (zeros <= highest) & (zeros == zeros.round())).all()):
        raise SpecError(
            f"zeros of {float(zeros.min()):g} to {float(zeros.max()):g}; the llmq format stores whole "
            f"numbers from {lowest} to {highest} of the {spec.grid} grid at {spec.bits} bits"
        )
    return zeros.to(_zero_dtype(spec)).contiguous()


def zero_range(spec: QuantSpec) -> tuple[int, int]:
    """Return the lowest and highest zero in files; version 1 of the gptq format, that may be converted, has 2^bits."""
    lowest, highest = _grid(spec).zeros
    return lowest, highest + (spec.grid == "uniform" and not spec.symmetric)


def _grid(spec: QuantSpec) -> Grid:
    return make_grid(spec.grid, spec.bits, spec.symmetric)


def _scale_dtypes(spec: QuantSpec) -> tuple[torch.dtype, ...]:
    """Return the dtypes that scales may have: those of the grid, if it has its own."""
    own = ALL_GRIDS[spec.grid].scale_dtype
    return SCALE_DTYPES if own in SCALE_DTYPES else (own,)


def learned_levels(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the stored levels of a grid that learns them, float32 [..., N, G, L].

    Raises:
        CheckpointError: they are none that `pack` writes.
    """
    try:
        return level_bytes.from_bytes(tensors["levels"])
    except SpecError as error:
        raise CheckpointError(f"{error}; the file is damaged") from error


def _zero_dtype(spec: QuantSpec) -> torch.dtype:
    return torch.uint8 if spec.bits < 8 else torch.int16


def _row_bytes(in_features: int, bits: int) -> int:
    return -(-in_features * bits // 8)
