"""The safetensors file format: headers are read, checked and made here, tensors are read and written by position.

A file is 8 bytes with the length of its header (little-endian), the header (JSON: name to dtype, shape and the first
and last byte in what follows), and the tensors one after the other without holes. Files are not mapped into memory:
mapped pages count as the process's own until they are dropped, and a run that is held to a limit is killed for them.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PREFIX = 8  # bytes that hold the header's length
LARGEST_JSON = 64 * 2**20  # bytes of a header or another JSON file of a checkpoint
_MOST_OBJECTS = 10**6  # and lists in it, three to a tensor; each takes twenty times its bytes once it is parsed
_LARGEST_SIZE = 2**63  # bytes and numbers that torch can count
_MOST_DIMENSIONS = 64
_METADATA = "__metadata__"
_PIECE = 64 * 2**20  # bytes of a tensor that are copied at a time
_OWN_PAGES = 2**20  # bytes from which a tensor gets memory straight from the system

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PACKED = "F4"  # a header counts its numbers, torch the bytes that hold two of them


class Entry(NamedTuple):
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    offset: int  # of its first byte in the file


class HeaderError(ValueError):
    """A file is not what safetensors allows; the message says in what."""


class DtypeError(ValueError):
    """A header names a dtype that torch does not have."""


def read_header(handle: int) -> dict[str, Entry]:
    """Return the tensors of the open file `handle`, by name in alphabetical order.

    Raises:
        HeaderError: the file is truncated, or its header and its bytes do not agree.
        DtypeError: torch has no such numbers.
        OSError: it cannot be read.
    """
    size = os.fstat(handle).st_size
    if size < _PREFIX:
        raise HeaderError(f"{size} bytes are no safetensors file")
    length = int.from_bytes(_read(handle, 0, _PREFIX), "little")
    if length > min(LARGEST_JSON, size - _PREFIX):
        raise HeaderError(f"a header of {length} bytes in a file of {size}")
    try:
        content = parse_json(_read(handle, _PREFIX, length), _no_pair_twice)
    except ValueError as error:
        raise HeaderError(f"its header is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise HeaderError("its header is not a JSON object")
    content.pop(_METADATA, None)
    start = _PREFIX + length
    entries = {name: _entry(name, content[name], start) for name in sorted(content)}
    _check_dense(entries, start, size)
    return entries


def make_header(slots: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> tuple[bytes, dict[str, Entry]]:
    """Return the first bytes of a file for tensors of these shapes and dtypes, and where in it they are.

    Tensors are put in descending order of item size, so that each is aligned to its own.
    """
    ordered = sorted(slots, key=lambda name: -slots[name][1].itemsize)
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    ends = [0]
    for name in ordered:
        shape, dtype = slots[name]
        ends.append(ends[-1] + math.prod(shape) * dtype.itemsize)
        code = _CODES[dtype]
        counted = (*shape[:-1], 2 * shape[-1]) if code == _PACKED else shape
        header[name] = {"dtype": code, "shape": list(counted), "data_offsets": ends[-2:]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = _PREFIX + len(text)
    entries = {
        name: Entry(*slots[name], end - begin, start + begin)
        for name, begin, end in zip(ordered, ends, ends[1:], strict=False)
    }
    return len(text).to_bytes(_PREFIX, "little") + text, entries


def read_tensor(handle: int, entry: Entry, rows: slice | None = None) -> Tensor:
    """Return a tensor of the open file `handle`, or only `rows` of its first dimension, in memory of its own.

    Safe in several threads and forked processes at once: a position of the file is not shared.

    Raises:
        HeaderError: the file has become shorter.
        OSError: it cannot be read.
    """
    shape, offset = entry.shape, entry.offset
    if rows is not None:
        first, last, step = rows.indices(shape[0])
        if step != 1:
            raise ValueError(f"rows are read one after the other, not in steps of {step}")
        offset += first * (entry.nbytes // max(1, shape[0]))
        shape = (max(0, last - first), *shape[1:])
    raw = _allocate(math.prod(shape) * entry.dtype.itemsize)
    read_bytes(handle, raw.numpy().data, offset)
    return raw.view(entry.dtype).reshape(shape)


def read_bytes(handle: int, target: memoryview, offset: int) -> None:
    """Fill `target` with the bytes from a position of the open file `handle` on; errors as for `read_tensor`."""
    _transfer(lambda part, at: os.preadv(handle, [part], at), target, offset)


def write_tensor(handle: int, tensor: Tensor, offset: int) -> None:
    """Write a tensor of any layout, on any device, to a position of the open file `handle`, copied in small pieces.

    Raises:
        OSError: the disk does not take it.
    """
    for piece in _pieces(tensor):
        write_bytes(handle, piece.numpy().data, offset)
        offset += piece.nbytes


def write_tensors(handle: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a whole file of `tensors` from its start on; of each only a piece is copied at a time.

    Raises:
        OSError: the disk does not take it.
    """
    header, entries = make_header({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    write_bytes(handle, header, 0)
    for name, entry in entries.items():
        write_tensor(handle, tensors[name].detach(), entry.offset)


def read_tensors(handle: int) -> dict[str, Tensor]:
    """Return all tensors of an open file; errors as for `read_header` and `read_tensor`."""
    return {name: read_tensor(handle, entry) for name, entry in read_header(handle).items()}


def holds(handle: int, header: bytes, size: int) -> bool:
    """Return whether an open file has this header and size."""
    return os.fstat(handle).st_size == size and os.pread(handle, len(header), 0) == header


def reserve(handle: int, header: bytes, size: int) -> None:
    """Make an open file this long, of zeros after the header; the room on the disk is its own from now on."""
    os.ftruncate(handle, 0)
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(handle, size)  # a file system that cannot reserve
    write_bytes(handle, header, 0)
    os.fsync(handle)


def write_bytes(handle: int, content: bytes | memoryview, offset: int) -> None:
    """Write bytes to a position of the open file `handle`.

    Raises:
        OSError: the disk does not take them.
    """
    _transfer(lambda part, at: os.pwrite(handle, part, at), memoryview(content), offset)


def parse_json(content: bytes, pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None) -> Any:
    """Return what a JSON text of anybody says; objects are made by `pairs`, if given.

    Raises:
        ValueError: it is not JSON, or would take more than a GB of memory or too deep a stack.
    """
    if len(content) > LARGEST_JSON:
        raise ValueError(f"it has {len(content)} bytes, more than {LARGEST_JSON}")
    if (count := content.count(b"[") + content.count(b"{")) > _MOST_OBJECTS:
        raise ValueError(f"it has {count} lists and objects, more than {_MOST_OBJECTS}")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the bytes of a tensor in order (uint8, contiguous, on the CPU), at most `_PIECE` of them copied."""
    if tensor.nbytes <= _PIECE or (tensor.is_contiguous() and tensor.device.type == "cpu"):
        yield tensor.contiguous().cpu().reshape(-1).view(torch.uint8)
        return
    rows = max(1, _PIECE * len(tensor) // tensor.nbytes)
    for part in tensor.split(rows):
        yield from _pieces(part if len(part) > 1 else part[0])


def _allocate(nbytes: int) -> Tensor:
    """Return memory, uint8 [nbytes], that goes back to the system when it is dropped.

    malloc does not promise that: reading 20 tensors of 10 MiB one after the other left it with 50 to 70 MiB.
    """
    if nbytes < _OWN_PAGES:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")  # whatever the default device is
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _read(handle: int, offset: int, count: int) -> bytes:
    content = bytearray(count)
    _transfer(lambda part, at: os.preadv(handle, [part], at), memoryview(content), offset)
    return bytes(content)


def _transfer(call: Callable[[memoryview, int], int], view: memoryview, offset: int) -> None:
    """Repeat a system call, which may stop short of all bytes (a signal, or more than 2 GiB), until all are through."""
    done = 0
    while done < len(view):
        count = call(view[done:], offset + done)
        if count == 0:
            raise HeaderError(f"it ends {len(view) - done} bytes early")
        done += count


def _no_pair_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has two entries of one name")
    return found


def _entry(name: str, value: Any, start: int) -> Entry:
    """Return what a header says of one tensor; `start` is the first byte after the header."""
    if not name.isascii() and name.encode("utf-8", "ignore").decode() != name:
        raise HeaderError(f"a tensor is called {_shortened(ascii(name))}")
    try:
        code, shape, (begin, end) = str(value["dtype"]), tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise HeaderError(f"its header does not describe tensor {_shortened(name)}") from error
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise HeaderError(
            f"tensor {_shortened(name)} has shape {_shortened(str(shape))} at bytes {_shortened(f'{begin} to {end}')}"
        )
    if code not in DTYPES:
        raise DtypeError(
            f"tensor {_shortened(name)} has dtype {_shortened(code)}, which torch {torch.__version__} cannot read"
        )
    if code == _PACKED:
        if not shape or shape[-1] % 2:
            raise HeaderError(f"tensor {name} has shape {list(shape)}, but pairs of numbers in a byte")
        shape = (*shape[:-1], shape[-1] // 2)
    if len(shape) > _MOST_DIMENSIONS or math.prod(max(1, size) for size in shape) * 8 >= _LARGEST_SIZE:
        raise HeaderError(f"tensor {_shortened(name)} has {len(shape)} dimensions, too many or too large")
    nbytes = math.prod(shape) * DTYPES[code].itemsize
    if end - begin != nbytes:
        raise HeaderError(f"tensor {name} needs {nbytes} bytes and has {end - begin}")
    return Entry(shape, DTYPES[code], nbytes, start + begin)


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_dense(entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Check that the tensors lie one after the other and end where the file ends."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != at:
            raise HeaderError(f"tensor {name} begins at byte {entry.offset} of the file, not at {at}")
        at += entry.nbytes
    if at != size:
        raise HeaderError(f"its tensors end at byte {at}, the file at {size}")
