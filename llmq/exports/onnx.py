"""ONNX for onnxruntime: a packed folder becomes a folder with a graph whose linear layers hold the same codes.

Nothing is rounded again: codes, scales and zeros go into the operator MatMulNBits (com.microsoft) as they are, dense
tensors become float32. What the operator cannot hold is refused before work starts. docs/onnx.md has the details.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmq.checkpoint import CONFIG, without_quantization
from llmq.disk import disk_errors, sync_path, write_file
from llmq.errors import CheckpointError, SpecError
from llmq.exports import matmul_nbits
from llmq.exports.onnx_constants import MODULE, kept_as
from llmq.exports.onnx_graph import draw
from llmq.exports.onnx_plan import Node, Plan, plan

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmq.packed import PackedCheckpoint

GRAPH, DATA = "model.onnx", "model.onnx_data"  # the names that optimum and transformers.js look for
EXACT, FAST = 1, 4  # accuracy levels of MatMulNBits: activations stay float32, or are rounded to 8 bits
_PARTIAL = ".llmq-partial"  # ends the name of a folder that is not finished
_PACKAGES = ("onnx", "onnxscript", "onnx_ir")
# what generating text takes besides the graph
_SIDE_FILES = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "chat_template*", "spiece.model", "LICENSE*",
)  # fmt: skip


def export(packed: PackedCheckpoint, output: str | Path, *, accuracy_level: int = EXACT) -> dict[str, str]:
    """Write `packed` as a folder for onnxruntime, which is whole or not there; return the type of each constant in it.

    Before the folder gets its name, all codes and dense tensors in it are read back and compared with those of
    `packed`. One tensor at a time is in memory.

    Args:
        packed: a folder of a model that predicts text, in 2, 4 or 8 bits.
        output: folder name.
        accuracy_level: of MatMulNBits. `FAST` lets onnxruntime round activations to 8 bits.

    Raises:
        SpecError: MatMulNBits cannot hold the codes, torch.onnx cannot draw the model, or onnx is not installed.
        CheckpointError: `packed` is incomplete, or `output` exists or cannot be written.
    """
    output = Path(output)
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise SpecError(f"ONNX files are written with the package {missing[0]}: pip install 'llmq[onnx]'")
    if accuracy_level not in (EXACT, FAST):
        raise SpecError(f"accuracy_level {accuracy_level} is none of {EXACT} (exact) and {FAST} (8-bit activations)")
    if output.exists():
        raise CheckpointError(f"{output}: exists; choose another --output")
    planned = plan(packed)
    partial = output.with_name(output.name + _PARTIAL)
    try:
        with disk_errors(output):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write(partial, packed, planned, accuracy_level)
            types = _prove(partial / GRAPH, packed, planned)
            for path in (*partial.iterdir(), partial):
                sync_path(path)
            os.replace(partial, output)
            sync_path(output.parent)
    finally:
        with suppress(OSError):
            shutil.rmtree(partial, ignore_errors=True)
    return types


def _write(folder: Path, packed: PackedCheckpoint, planned: Plan, accuracy_level: int) -> None:
    """Write all files."""
    import onnx_ir as ir

    ir.save(draw(packed, planned, accuracy_level), folder / GRAPH, external_data=DATA)
    for pattern in _SIDE_FILES:
        for path in sorted(packed.path.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    write_file(folder / CONFIG, (json.dumps(without_quantization(packed.config), indent=2) + "\n").encode())


def _prove(path: Path, packed: PackedCheckpoint, planned: Plan) -> dict[str, str]:
    """Read a file back and compare it with `packed`; return the types of its constants.

    Raises:
        CheckpointError: it is not the same.
    """
    import onnx_ir as ir

    graph = ir.load(path).graph
    by_module = {node.metadata_props[MODULE]: node for node in graph.all_nodes() if MODULE in node.metadata_props}
    wrong = [name for name, meant in planned.nodes.items() if not _same(by_module.get(name), packed, meant)]
    for name, key in planned.dense.items():
        meant = packed.read(key)
        if (constant := graph.initializers.get(name)) is None or not torch.equal(
            _tensor(constant), meant.to(kept_as(meant.dtype, meant.ndim))
        ):
            wrong.append(name)
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]} read back is not what was meant; the disk or llmq is at fault")
    return {name: str(value.dtype) for name, value in graph.initializers.items()}


def _same(node: ir.Node | None, packed: PackedCheckpoint, meant: Node) -> bool:
    """Return whether a node computes with the codes, scales, zeros and columns that are meant."""
    if node is None:
        return False
    weight, columns = packed.take(meant.module)
    x, codes, scales, zeros = (*node.inputs, None)[:4]
    n, k = meant.shape
    attributes: dict[str, Any] = {name: node.attributes[name].value for name in ("N", "K", "bits", "block_size")}
    if attributes != {"N": n, "K": k, "bits": meant.bits, "block_size": meant.block}:
        return False
    stored = matmul_nbits.Blocks(_tensor(codes), _tensor(scales), None if zeros is None else _tensor(zeros))
    expected = (weight.codes, *matmul_nbits.per_block(weight, meant.block))
    if not all(map(torch.equal, matmul_nbits.unpack(stored, k, meant.bits), expected)):
        return False
    before = x.producer() if x is not None else None
    if columns is None:
        return True
    return before is not None and before.op_type == "Gather" and torch.equal(_tensor(before.inputs[1]), columns)


def _tensor(value: ir.Value | None) -> Tensor:
    """Return the content of a constant."""
    assert value is not None
    assert value.const_value is not None
    array = value.const_value.numpy()
    if value.const_value.dtype.name == "BFLOAT16":  # torch knows no such arrays
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
