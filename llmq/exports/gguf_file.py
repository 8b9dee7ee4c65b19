"""GGUF files, read: the header checked to the last byte, tensors fetched one by one, codes as they are.

A file is a magic number, version, two counts; the metadata (key, type, value); the tensors' names, sizes, types and
offsets; and, from the next multiple of the alignment on, their bytes. All of it is little-endian. Source: the
specification docs/gguf.md in the ggml repository.
"""

from __future__ import annotations

import io
import math
import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from llmq.errors import CheckpointError
from llmq.exports import blocks
from llmq.exports.architectures import rotary_rows
from llmq.shards import Entry, HeaderError, read_tensor
from llmq.types import QuantizedWeight

MAGIC = b"GGUF"
ALIGNMENT = 32  # of tensors, where the metadata does not say
_VERSIONS = (2, 3)  # one layout
_DENSE = {0: ("F32", torch.float32), 1: ("F16", torch.float16), 30: ("BF16", torch.bfloat16)}
_PACKED = {block.number: name for name, block in blocks.BLOCKS.items()}

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

# What real files stay far below, and a damaged one must not get past: memory and time follow these numbers.
_MOST_KEYS, _LONGEST_KEY, _MOST_TENSORS, _LONGEST_NAME, _MOST_ITEMS = 2**16, 2**10, 2**17, 64, 2**24
_LONGEST_KEPT = 256  # bytes of a text in the metadata that is kept; templates are longer

Scalar = int | float | bool | str


class Stored(NamedTuple):
    """What the header says of one tensor."""

    shape: tuple[int, ...]  # as torch has it: rows first
    type: str  # F32, F16, BF16, or a name in `blocks.BLOCKS`; any other type is "number <n>"
    offset: int  # of its first byte in the file
    nbytes: int


class GGUFFile:
    """A GGUF file, opened. `tensors` says what is in it; the file stays open until `close` or the end of its life.

    Raises:
        CheckpointError: it cannot be opened, is truncated, or is not what GGUF allows.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened: {error.strerror}") from error
        self.close = weakref.finalize(self, os.close, self._handle)
        try:
            # its own offset and buffer; the handle itself is only read by position
            with os.fdopen(os.dup(self._handle), "rb") as file:
                self.metadata, self.tensors = _Header(file).parse()
        except (HeaderError, OSError, UnicodeDecodeError) as error:
            self.close()
            raise CheckpointError(f"{self.path}: is not a GGUF file that llmq can read: {error}") from error

    def read(self, name: str) -> Tensor:
        """Return the dense tensor `name` (F32, F16, BF16) as it is stored.

        Raises:
            CheckpointError: there is none, or it is packed.
        """
        stored = self._find(name)
        dtypes = dict(_DENSE.values())
        if stored.type not in dtypes:
            raise CheckpointError(f"{self.path}: tensor {name} is {stored.type}, not dense; read its codes")
        return self._fetch(name, stored.shape, dtypes[stored.type], stored.offset)

    def weight(self, name: str, expert: int = 0) -> QuantizedWeight:
        """Return the codes of the packed tensor `name`, [N, K], or those of one `expert` of a stack [E, N, K].

        Rows come as transformers has them: those of query and key weights of a Llama are put in other places in GGUF.
        Groups are as large as neighbours with equal scales allow, doubling.

        Raises:
            CheckpointError: there is no such tensor, it is dense or of a type that llmq does not read, or damaged.
        """
        stored = self._find(name)
        if stored.type not in blocks.BLOCKS:
            known = ", ".join(blocks.BLOCKS)
            raise CheckpointError(f"{self.path}: tensor {name} is {stored.type}; llmq reads codes of {known}")
        stacks = 1 if len(stored.shape) == 2 else stored.shape[0]
        if len(stored.shape) not in (2, 3) or not 0 <= expert < stacks:
            raise CheckpointError(f"{self.path}: tensor {name} has shape {list(stored.shape)}, no expert {expert}")
        n = stored.shape[-2]
        nbytes = stored.nbytes // stacks
        raw = self._fetch(name, (n, nbytes // n), torch.uint8, stored.offset + expert * nbytes)
        try:
            weight = _merge_groups(blocks.unpack(stored.type, raw))
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: tensor {name} {error}") from error
        order = self._row_order(name, n)
        if order is None:
            return weight
        back = order.argsort()
        return replace(weight, codes=weight.codes[back], scales=weight.scales[back], zeros=weight.zeros[back])

    def _row_order(self, name: str, rows: int) -> Tensor | None:
        """Return which row of transformers' weight each row of tensor `name` is; None: in order."""
        key = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(name.split(".")[-2] if "." in name else "")
        if key is None or self.metadata.get("general.architecture") != "llama":
            return None
        heads = self.metadata.get(f"llama.attention.{key}")
        if type(heads) is not int or heads < 1 or rows % (2 * heads):
            raise CheckpointError(f"{self.path}: tensor {name} has {rows} rows for llama.attention.{key} {heads!r}")
        return rotary_rows(rows, heads)

    def _find(self, name: str) -> Stored:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {name}")
        return self.tensors[name]

    def _fetch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
        try:
            return read_tensor(self._handle, Entry(shape, dtype, math.prod(shape) * dtype.itemsize, offset))
        except (OSError, HeaderError) as error:
            raise CheckpointError(f"{self.path}: tensor {name} cannot be read: {error}") from error


class _Header:
    """The parser of one header; every read checks that the file goes on that far."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def parse(self) -> tuple[dict[str, Scalar], dict[str, Stored]]:
        """Return the metadata, without arrays and long texts, and the tensors."""
        if self.take(4) != MAGIC:
            raise HeaderError("it does not begin with GGUF")
        version = self.number("<I")
        if version not in _VERSIONS:
            raise HeaderError(f"its version is {version}, llmq reads 2 and 3")
        tensors, keys = self.count("tensors", _MOST_TENSORS), self.count("metadata keys", _MOST_KEYS)
        metadata: dict[str, Scalar] = {}
        seen: set[str] = set()
        for _ in range(keys):
            key = self.text(_LONGEST_KEY, "a metadata key")
            if key in seen:
                raise HeaderError(f"it has the metadata key {key} twice")
            seen.add(key)
            value = self.value()
            if value is not None:
                metadata[key] = value
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise HeaderError(f"general.alignment is {alignment!r}, not a power of 2 from 8 on")
        found = [self.tensor() for _ in range(tensors)]
        start = -(-self.file.tell() // alignment) * alignment
        return metadata, dict(self._placed(found, start, alignment))

    def _placed(
        self, found: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> Iterator[tuple[str, Stored]]:
        """Yield the tensors by name, checked to lie in the file, each in a place of its own."""
        names: set[str] = set()
        end = 0
        for name, shape, kind, offset in sorted(found, key=lambda item: item[3]):
            if name in names:
                raise HeaderError(f"it has two tensors {name}")
            names.add(name)
            label, nbytes = _size(name, shape, kind)
            if offset % alignment or offset < end or start + offset + nbytes > self.size:
                raise HeaderError(f"tensor {name} of {nbytes} bytes cannot lie at {offset} of its tensors' bytes")
            end = offset + nbytes
            yield name, Stored(shape, label, start + offset, nbytes)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape, number of the type and offset of the next tensor."""
        name = self.text(_LONGEST_NAME, "the name of a tensor")
        dims = int(self.number("<I"))
        if not 1 <= dims <= 4:
            raise HeaderError(f"tensor {name} has {dims} dimensions")
        shape = tuple(int(self.number("<Q")) for _ in range(dims))[::-1]
        if not all(shape):
            raise HeaderError(f"tensor {name} is empty: {list(shape)}")
        return name, shape, int(self.number("<I")), int(self.number("<Q"))

    def value(self) -> Scalar | None:
        """Return the next value of the metadata; None for arrays and long texts, which are skipped."""
        kind = int(self.number("<I"))
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            length = int(self.number("<Q"))
            if length <= _LONGEST_KEPT:
                return self.take(length).decode("utf-8")
            self.skip(length)
            return None
        if kind != _ARRAY:
            raise HeaderError(f"its metadata has a value of type {kind}")
        inner = int(self.number("<I"))
        items = self.count("items of an array", _MOST_ITEMS)
        if inner in _SCALARS:
            self.skip(items * struct.calcsize(_SCALARS[inner]))
            return None
        if inner != _STRING:
            raise HeaderError(f"its metadata has an array of type {inner}")
        for _ in range(items):
            self.skip(int(self.number("<Q")))
        return None

    def text(self, longest: int, what: str) -> str:
        """Return the next text."""
        length = int(self.number("<Q"))
        if length > longest:
            raise HeaderError(f"{what} has {length} bytes")
        return self.take(length).decode("utf-8")

    def count(self, what: str, most: int) -> int:
        """Return the next count of things."""
        number = int(self.number("<Q"))
        if number > most:
            raise HeaderError(f"it claims {number} {what}")
        return number

    def number(self, layout: str) -> int | float | bool:
        """Return the next number of a `struct` layout."""
        found: int | float | bool = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return found

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        content = self.file.read(count)
        if len(content) < count:
            raise HeaderError("it ends within its header")
        return content

    def skip(self, count: int) -> None:
        """Go on behind the next bytes."""
        if self.file.tell() + count > self.size:
            raise HeaderError("it ends within its header")
        self.file.seek(count, io.SEEK_CUR)


def _size(name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
    """Return name and bytes of a tensor of the type of number `kind`; 0 bytes where the type is not known."""
    if kind in _DENSE:
        label, dtype = _DENSE[kind]
        return label, math.prod(shape) * dtype.itemsize
    if kind not in _PACKED:
        return f"number {kind}", 0
    block = blocks.BLOCKS[_PACKED[kind]]
    if shape[-1] % block.columns:
        raise HeaderError(f"tensor {name} has rows of {shape[-1]}, no multiple of {block.columns}")
    return _PACKED[kind], math.prod(shape) // block.columns * block.nbytes


def _merge_groups(weight: QuantizedWeight) -> QuantizedWeight:
    """Return `weight` with groups twice as large, as often as all pairs of neighbours agree."""
    scales, zeros, size = weight.scales, weight.zeros, weight.group_size
    while scales.shape[1] % 2 == 0 and all(torch.equal(t[:, ::2], t[:, 1::2]) for t in (scales, zeros)):
        scales, zeros, size = scales[:, ::2].contiguous(), zeros[:, ::2].contiguous(), 2 * size
    return replace(weight, scales=scales, zeros=zeros, group_size=size)
