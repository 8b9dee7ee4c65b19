"""The graph of a packed model, drawn by torch.onnx from the model's skeleton: no weight is in memory meanwhile.

Linear layers that are packed are replaced by calls of MatMulNBits, banks of experts by a form that can be drawn, and
all parameters by tensors of the right shape that take no room.
"""

from __future__ import annotations

import logging
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmq.errors import SpecError
from llmq.exports import matmul_nbits
from llmq.exports.onnx_constants import MODULE, attach
from llmq.exports.onnx_plan import Node, Plan
from llmq.moe import Bank

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from llmq.packed import PackedCheckpoint

_DOMAIN = "com.microsoft"
_BATCH, _PAST, _NEW = 2, 5, 3  # sizes to draw with; torch.export takes 0 and 1 for constants


class PackedLinear(nn.Module):
    """A call of MatMulNBits in the place of a packed linear layer.

    Args:
        name: of the module in the model.
        node: what it is to be.
        bias: its bias [N], if it has one.
        accuracy_level: of the operator.
    """

    def __init__(self, name: str, node: Node, bias: nn.Parameter | None, accuracy_level: int) -> None:
        super().__init__()
        n, k = node.shape
        codes, scales, zeros = matmul_nbits.shapes(n, k, node.bits, node.block)
        self.name, self.out_features = name, n
        self.attributes = {"K": k, "N": n, "bits": node.bits, "block_size": node.block}
        self.attributes["accuracy_level"] = accuracy_level
        self.bias = bias
        self.register_buffer("codes", _hollow(codes, torch.uint8), persistent=False)
        self.register_buffer("scales", _hollow(scales, torch.float32), persistent=False)
        self.register_buffer("zero_points", None if node.symmetric else _hollow(zeros, torch.uint8), persistent=False)
        self.register_buffer("columns", _hollow((k,), torch.int64) if node.columns else None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """Nothing, for models that ask their linears for a dtype."""
        return torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return what stands for the output [..., N] of `x` [..., K]."""
        if self.columns is not None:
            inputs = [x, self.get_buffer("columns")]
            x = torch.onnx.ops.symbolic("Gather", inputs, {"axis": -1}, dtype=x.dtype, shape=x.shape)
        constants: list[Tensor | None] = [self.get_buffer("codes"), self.get_buffer("scales")]
        if self.zero_points is not None or self.bias is not None:
            constants.append(self._buffers["zero_points"])
        if self.bias is not None:
            constants += [None, self.bias]  # the first is g_idx, which the operator no longer has
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::MatMulNBits",
            [x, *constants],
            dict(self.attributes),
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
            metadata_props={MODULE: self.name},
        )


def _run_experts(bank: Bank, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Do what `Bank.forward` does, without looking at values: each expert takes the tokens that pick it, even none."""
    out = torch.zeros_like(hidden_states)
    for expert in range(bank.size):
        tokens, slots = torch.where(top_k_index == expert)
        last = bank.projections(expert)[1]
        y = last(bank.inner(expert, hidden_states[tokens])) * top_k_weights[tokens, slots, None]
        out = out.index_add(0, tokens, y)
    return out


class _Flat(nn.Module):
    """A model whose cache goes in and out tensor by tensor."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return logits [B, L, V], and keys and values of all layers in turn, each [B, H, P + L, D]."""
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values))


def draw(packed: PackedCheckpoint, planned: Plan, accuracy_level: int) -> ir.Model:
    """Return the graph, with values that are read from `packed` when they are asked for.

    Raises:
        SpecError: torch.onnx cannot draw it.
    """
    model, nodes, _ = planned
    model.set_attn_implementation("eager")
    for name, node in nodes.items():
        old = model.get_submodule(name)
        parent, _, local = name.rpartition(".")
        setattr(model.get_submodule(parent), local, PackedLinear(name, node, old._parameters["bias"], accuracy_level))
    for module in model.modules():
        if isinstance(module, Bank):
            module.forward = types.MethodType(_run_experts, module)  # type: ignore[method-assign]
    parameters = _hollow_out(model, planned.dense)
    with _quiet(), torch.no_grad():
        try:
            program: Any = _traced(model)
        except Exception as error:  # of whatever kind: torch.export runs code of the model
            why = " ".join(str(error).split())
            raise SpecError(
                f"{type(model).__name__}: torch.onnx cannot draw this model: {type(error).__name__}: {why[:300]}; "
                "export it to gguf, or keep it as it is"
            ) from error
        graph: ir.Model = program.model
        _name_length(graph)
        attach(graph, packed, planned, parameters)
    return graph


def _traced(model: PreTrainedModel) -> Any:
    """Return torch.onnx's program of `model`, not optimized: its values are not there yet."""
    shapes = _cache_shapes(model)
    names = [f"{layer}.{part}" for layer in range(len(shapes) // 2) for part in ("key", "value")]
    past = [torch.zeros(_BATCH, heads, _PAST, size) for heads, size in shapes]
    ids = torch.ones(_BATCH, _NEW, dtype=torch.int64)
    mask = torch.ones(_BATCH, _PAST + _NEW, dtype=torch.int64)
    positions = torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, _NEW).contiguous()
    dim = torch.export.Dim
    batch, new, before = dim("batch_size"), dim("sequence_length"), dim("past_sequence_length")
    moving = {0: batch, 1: new}
    program: Any = torch.onnx.export(
        _Flat(model).eval(),
        (ids, mask, positions, past),
        dynamo=True,
        dynamic_shapes=(moving, {0: batch, 1: dim.DYNAMIC}, moving, [{0: batch, 2: before}] * len(past)),
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        optimize=False,
        verbose=False,
    )
    return program


def _cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return heads and their size of keys and values of each layer, found by running the model on no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        cache = model(input_ids=torch.ones(1, 1, dtype=torch.int64), use_cache=True).past_key_values
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return [(int(t.shape[1]), int(t.shape[3])) for t in tensors]


def _hollow(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of this shape that takes no room."""
    return torch.zeros((), dtype=dtype).expand(shape)


def _hollow_out(model: PreTrainedModel, dense: dict[str, str]) -> dict[str, str]:
    """Replace all parameters by ones that take no room; return the name of the tensor that each of them is in files."""
    tied = {name: first for name, first in model.all_tied_weights_keys.items() if name not in dense}
    made: dict[str, nn.Parameter] = {}
    names: dict[str, str] = {}
    for prefix, module in model.named_modules():
        for local, old in module._parameters.items():
            if old is not None:
                name = f"{prefix}.{local}"
                first = names[name] = tied.get(name, name)
                if first not in made:
                    made[first] = nn.Parameter(_hollow(tuple(old.shape), old.dtype), requires_grad=False)
                module._parameters[local] = made[first]
    return names


def _name_length(graph: ir.Model) -> None:
    """Give the length of the mask, which torch.export names by number, the name that others have for it."""
    import onnx_ir as ir

    mask = graph.graph.inputs[1]
    assert mask.shape is not None
    graph.graph.inputs[1].shape = ir.Shape([mask.shape[0], "total_sequence_length"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch.onnx and torch.export say of their own inner life."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
