"""The constants of an ONNX graph: functions that read one tensor each from a packed folder when the file is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmq.errors import CheckpointError, SpecError
from llmq.exports import matmul_nbits
from llmq.exports.onnx_plan import Plan

if TYPE_CHECKING:
    import onnx_ir as ir

    from llmq.packed import PackedCheckpoint

MODULE = "llmq.module"  # property of a node: the module of the model that it is
_DTYPES = {"codes": torch.uint8, "scales": torch.float32, "zero_points": torch.uint8}
_Value = tuple[torch.dtype, Callable[[], Tensor]]  # the dtype it is kept in, and how to read it


def attach(graph: ir.Model, packed: PackedCheckpoint, planned: Plan, parameters: dict[str, str]) -> None:
    """Simplify the graph, and give its constants functions that read their values.

    Raises:
        CheckpointError: a parameter is not in the files.
    """
    read = reader(packed, planned)
    weights: list[tuple[ir.Value, _Value]] = []
    for name, constant in _named(graph.graph, parameters).items():
        if (value := read(name)) is not None:
            weights.append((constant, value))
        elif name in parameters:
            raise CheckpointError(f"{packed.path}: tensor {name} is missing")
    for constant, _ in weights:  # inputs meanwhile, of which nothing is known that could be folded
        graph.graph.initializers.pop(str(constant.name))
        constant.const_value = None
        graph.graph.inputs.append(constant)
    _tidy(graph)
    for constant, value in weights:
        graph.graph.inputs.remove(constant)
        _fill(graph.graph, constant, *value)


def _named(graph: ir.Graph, parameters: dict[str, str]) -> dict[str, ir.Value]:
    """Give the graph's constants their names in the model, what is tied one of them, and return them by name."""
    import onnx_ir as ir

    found: dict[str, ir.Value] = {}
    for key, constant in list(graph.initializers.items()):
        name = key.removeprefix("model.")
        name = parameters.get(name, name)  # what is tied may go by either name
        if name in found:
            ir.convenience.replace_all_uses_with(graph.initializers.pop(key), found[name])
            continue
        constant.name, found[name] = name, constant
    return found


def reader(packed: PackedCheckpoint, planned: Plan) -> Callable[[str], _Value | None]:
    """Return a function from the name of a constant to its value; None: the model has computed it, and it is there."""

    @lru_cache(maxsize=1)
    def blocks(name: str) -> tuple[matmul_nbits.Blocks, Tensor | None]:
        node = planned.nodes[name]
        weight, columns = packed.take(node.module)
        try:
            return matmul_nbits.pack(weight, node.block, symmetric=node.symmetric), columns
        except SpecError as error:
            raise SpecError(f"{node.module}: {error}") from error

    def find(name: str) -> _Value | None:
        module, _, local = name.rpartition(".")
        if module in planned.nodes and local == "columns":
            return torch.int64, lambda: blocks(module)[1]  # type: ignore[return-value]
        if module in planned.nodes and local in matmul_nbits.Blocks._fields:
            return _DTYPES[local], lambda: getattr(blocks(module)[0], local)
        if name in planned.dense:
            key = planned.dense[name]
            dtype = kept_as(packed.info(key).dtype, len(packed.info(key).shape))
            return dtype, lambda: packed.read(key).to(dtype)
        return None

    return find


def kept_as(dtype: torch.dtype, rank: int) -> torch.dtype:
    """Return what a dense tensor is in the file: half-precision matrices and integers stay so, all else is float32."""
    kept = not dtype.is_floating_point or (rank > 1 and dtype in (torch.float16, torch.bfloat16))
    return dtype if kept else torch.float32


def _fill(graph: ir.Graph, constant: ir.Value, dtype: torch.dtype, read: Callable[[], Tensor]) -> None:
    """Let `constant` be what `read` returns, turned to the dtype that the graph has for it."""
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

    stored, wanted = from_torch_dtype(dtype), constant.dtype
    assert wanted is not None
    if stored != wanted:
        cast = ir.node("Cast", [constant], {"to": wanted.value})
        cast.outputs[0].dtype, cast.outputs[0].shape = wanted, constant.shape
        ir.convenience.replace_all_uses_with(constant, cast.outputs[0])
        cast.replace_input_with(0, constant)
        constant.dtype = stored
        graph.insert_before(graph[0], cast)
    constant.const_value = ir.LazyTensor(
        lambda: TorchTensor(read().contiguous()),
        dtype=stored,
        shape=ir.Shape(list(constant.shape or ())),
        name=constant.name,
    )
    graph.register_initializer(constant)


def _tidy(graph: ir.Model) -> None:
    """Simplify the graph, and take out what tells of this machine."""
    from onnxscript.optimizer import optimize_ir

    optimize_ir(graph)
    for node in graph.graph.all_nodes():
        module = node.metadata_props.get(MODULE)
        node.metadata_props.clear()
        node.doc_string = None
        if module is not None:
            node.name = node.metadata_props[MODULE] = module
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    graph.producer_name, graph.producer_version, graph.doc_string = "llmq", None, None
