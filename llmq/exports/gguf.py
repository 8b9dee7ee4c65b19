"""GGUF, the file format of llama.cpp: a packed folder becomes one file that holds the same codes.

Nothing is rounded again. Each weight gets the smallest block type that holds its codes exactly, or the export is
refused before anything is written; tensors that are dense stay so. docs/gguf.md has the sizes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmq.disk import disk_errors, sync_path
from llmq.errors import CheckpointError, SpecError
from llmq.exports import architectures, blocks
from llmq.exports.gguf_file import ALIGNMENT, GGUFFile
from llmq.exports.vocabulary import Vocabulary, read_vocabulary
from llmq.preflight import model_config
from llmq.shards import write_bytes
from llmq.types import QuantizedWeight

if TYPE_CHECKING:
    from typing import BinaryIO

    from gguf import GGUFWriter, TensorNameMap
    from transformers import PretrainedConfig

    from llmq.packed import PackedCheckpoint

_PARTIAL = ".llmq-partial"  # ends the name of a file that is not finished
_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Part:
    """One tensor of the file to be."""

    name: str
    type: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]  # packed modules, or the dense tensor; several are a stack of experts
    heads: int | None  # that rows are moved within

    @property
    def packed(self) -> bool:
        """Whether it holds codes."""
        return self.type in blocks.BLOCKS


def export(packed: PackedCheckpoint, output: str | Path, *, kind: str | None = None) -> dict[str, str]:
    """Write `packed` as one GGUF file, which is whole or not there, and return the type of each of its tensors.

    Before the file gets its name, all codes in it are read back and compared with those of `packed`.

    Args:
        packed: a folder of an architecture in `architectures.ARCHITECTURES`, with its tokenizer.
        output: file name.
        kind: the block type of all codes, a name in `blocks.BLOCKS`; None takes the smallest for each tensor.

    Raises:
        SpecError: llama.cpp has no such model or tokenizer, no block type holds the codes, or gguf is not installed.
        CheckpointError: `packed` is incomplete, or `output` exists or cannot be written.
    """
    output = Path(output)
    if find_spec("gguf") is None:
        raise SpecError("GGUF files are written with the package gguf: pip install 'llmq[gguf]'")
    if kind is not None and kind not in blocks.BLOCKS:
        raise SpecError(f"GGUF type {kind!r} is unknown; use {', '.join(blocks.BLOCKS)}")
    if output.exists():
        raise CheckpointError(f"{output}: exists; choose another --output")
    config = model_config(packed)
    vocabulary = read_vocabulary(packed.path, config.vocab_size)
    parts = _plan(packed, config, kind)
    factors = architectures.rotary_factors(config)
    partial = output.with_name(output.name + _PARTIAL)
    try:
        with disk_errors(output):
            _write_header(partial, config, vocabulary, parts, packed.path.name, factors)
            with partial.open("r+b") as file:
                _write_tensors(file, packed, parts, factors)
            _prove(partial, packed, parts)
            os.replace(partial, output)
            sync_path(output.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return {part.name: part.type for part in parts}


def _plan(packed: PackedCheckpoint, config: PretrainedConfig, kind: str | None) -> list[Part]:
    """Return the tensors of the file, in its order.

    Raises:
        SpecError: a tensor has no place in the architecture, or no block type holds its codes.
        CheckpointError: an expert is missing, or the head.
    """
    import gguf

    row = architectures.architecture(config)
    [number] = [number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == row.name]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    modules = set(packed.specs)
    members: dict[str, dict[int, str]] = {}  # of each tensor to be, by number
    for source in [*packed.specs, *packed.dense]:
        if architectures.is_derived(source) or (tied and source == "lm_head.weight"):
            continue
        stack, index = architectures.stack_of(source) or (source, 0)
        members.setdefault(_gguf_name(names, stack, source in modules or stack != source), {})[index] = source
    if "output.weight" not in members and not tied:
        raise CheckpointError(f"{packed.path}: lm_head.weight is missing, and tie_word_embeddings is false")
    parts = []
    for name, found in sorted(members.items(), key=lambda item: _place(item[0])):
        count = config.num_experts if "_exps." in name else 1
        if set(found) != set(range(count)):
            where = f"{packed.path}: {name} is put together"
            raise CheckpointError(f"{where} from {count} experts, the files have {len(found)}")
        sources = tuple(found[number] for number in range(count))
        dense = [source for source in sources if source not in modules]
        if dense and len(dense) < count:
            raise SpecError(f"{name}: {dense[0]} is dense and other experts are packed; GGUF has all in one type")
        module = sources[0].rpartition(".")[0] if dense else sources[0]
        heads = architectures.heads_of(module, config, row)
        kind_of, shape = _dense_type(packed, name, sources) if dense else _choose(packed, sources, kind)
        parts.append(Part(name, kind_of, (count, *shape) if "_exps." in name else shape, sources, heads))
    return parts


def _gguf_name(names: TensorNameMap, source: str, bare: bool) -> str:
    """Return GGUF's name of a tensor, or of the weight of a module where the name is `bare`."""
    name = names.get_name(f"{source}.weight" if bare else source, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise SpecError(
            f"GGUF has no place for tensor {source} in this architecture; convert with llama.cpp's own script"
        )
    return str(name)


def _place(name: str) -> tuple[int, int]:
    """Return what sorts tensors by blocks, with the embedding, which is read first, in front."""
    parts = name.split(".")
    return (1, int(parts[1])) if parts[0] == "blk" else (0 if parts[0] == "token_embd" else 2, 0)


def _dense_type(packed: PackedCheckpoint, name: str, sources: tuple[str, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the type that dense tensors keep, and their one shape."""
    infos = [packed.info(source) for source in sources]
    first = infos[0]
    if first.dtype not in _DENSE:
        kept = ", ".join(_DENSE.values())
        raise SpecError(f"{sources[0]} is {first.dtype}; GGUF export keeps dense tensors in {kept}")
    if any((info.shape, info.dtype) != (first.shape, first.dtype) for info in infos):
        raise CheckpointError(f"{packed.path}: the experts of {name} differ in shape or dtype")
    # llama.cpp adds and scales by vectors in float32 only, and has its routers so
    small = len(first.shape) == 1 or "ffn_gate_inp" in name
    return "F32" if small else _DENSE[first.dtype], first.shape


def _choose(packed: PackedCheckpoint, modules: tuple[str, ...], kind: str | None) -> tuple[str, tuple[int, ...]]:
    """Return the block type that holds all `modules`, and their one shape.

    Raises:
        SpecError: there is none.
    """
    possible = [kind] if kind else list(blocks.BLOCKS)
    last = possible[-1]  # what it refuses, the smaller ones do
    shapes = set()
    for module in modules:
        weight = _weight(packed, module)
        shapes.add(tuple(weight.codes.shape))
        refused = {name: reason for name in possible if (reason := blocks.refuses(name, weight)) is not None}
        possible = [name for name in possible if name not in refused]
        if not possible:
            raise SpecError(
                f"{module}: no GGUF block type holds its codes exactly, not even {last}: {refused[last]}; "
                "quantize symmetrically or to 4 bits, in groups of 32 or multiples of it"
            )
    if len(shapes) > 1:
        raise CheckpointError(f"{packed.path}: {modules[0]} and the other experts differ in shape")
    return possible[0], shapes.pop()


def _weight(packed: PackedCheckpoint, module: str) -> QuantizedWeight:
    """Return the codes of a module, refused where columns are not in order."""
    if packed.columns(module) is not None:
        raise SpecError(
            f"{module}: its groups are not contiguous columns (desc_act), which GGUF cannot express; "
            "quantize with static groups"
        )
    return packed.weight(module)


def _moved(weight: QuantizedWeight, heads: int | None) -> QuantizedWeight:
    """Return `weight` with its rows where GGUF has them."""
    if heads is None:
        return weight
    order = architectures.rotary_rows(len(weight.codes), heads)
    return replace(weight, codes=weight.codes[order], scales=weight.scales[order], zeros=weight.zeros[order])


def _write_header(
    path: Path,
    config: PretrainedConfig,
    vocabulary: Vocabulary,
    parts: list[Part],
    model: str,
    factors: Tensor | None,
) -> None:
    """Write metadata and the table of tensors to a new file at `path`."""
    import gguf
    import numpy as np

    row = architectures.architecture(config)
    writer: GGUFWriter = gguf.GGUFWriter(None, row.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model)
    kinds = Counter(part.type for part in parts if part.packed)
    writer.add_file_type(_file_type(kinds.most_common(1)[0][0]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    architectures.describe(config, row, writer)
    vocabulary.describe(writer)
    types = gguf.GGMLQuantizationType
    for part in parts:
        dtype = np.dtype(np.float32)  # its only role: not uint8, whose shapes would be taken for bytes
        writer.add_tensor_info(part.name, part.shape, dtype, _nbytes(part), types[part.type])
    if factors is not None:
        writer.add_tensor_info(architectures.ROTARY_FACTORS, factors.shape, np.dtype(np.float32), factors.nbytes)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _file_type(kind: str) -> int:
    """Return llama.cpp's number for files that are mostly of one block type."""
    import gguf

    names = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M"}
    return int(gguf.LlamaFileType[f"MOSTLY_{names.get(kind, kind)}"])


def _nbytes(part: Part) -> int:
    """Return the size of a tensor."""
    count = 1
    for size in part.shape:
        count *= size
    if part.packed:
        block = blocks.BLOCKS[part.type]
        return count // block.columns * block.nbytes
    return count * (4 if part.type == "F32" else 2)


def _write_tensors(file: BinaryIO, packed: PackedCheckpoint, parts: list[Part], factors: Tensor | None) -> None:
    """Write the bytes of all tensors behind the header, each from a multiple of the alignment on."""
    handle = file.fileno()
    at = os.fstat(handle).st_size
    contents = [_bytes_of(packed, part) for part in parts]
    if factors is not None:
        contents.append(iter([factors]))
    for pieces in contents:
        at += -at % ALIGNMENT
        for piece in pieces:
            write_bytes(handle, piece.contiguous().reshape(-1).view(torch.uint8).numpy().data, at)
            at += piece.nbytes
    os.ftruncate(handle, at + -at % ALIGNMENT)
    os.fsync(handle)


def _bytes_of(packed: PackedCheckpoint, part: Part) -> Iterator[Tensor]:
    """Yield the content of a tensor in pieces."""
    for source in part.sources:
        if part.packed:
            yield from blocks.pack(part.type, _moved(_weight(packed, source), part.heads))
        elif part.heads is not None:
            tensor = packed.read(source)
            yield _dense(tensor[architectures.rotary_rows(len(tensor), part.heads)], part.type)
        else:
            for _, piece in packed.pieces(source):
                yield _dense(piece, part.type)


def _dense(tensor: Tensor, kind: str) -> Tensor:
    return tensor.float() if kind == "F32" else tensor


def _prove(path: Path, packed: PackedCheckpoint, parts: list[Part]) -> None:
    """Read the codes in a file back and compare.

    Raises:
        CheckpointError: they are not those of `packed`.
    """
    written = GGUFFile(path)
    for part in parts:
        for expert, source in enumerate(part.sources if part.packed else ()):
            found, meant = written.weight(part.name, expert), packed.weight(source)
            both = zip(blocks.pieces(found), blocks.pieces(meant), strict=True)
            if not all(torch.equal(one.dequantize(), other.dequantize()) for one, other in both):
                raise CheckpointError(f"{path}: {part.name} read back is not {source}; the disk or llmq is at fault")
    written.close()
