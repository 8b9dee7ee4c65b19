"""Token embeddings whose rows stay packed, and heads that are tied to them.

A `QuantEmbedding` keeps the tensors of the checkpoint and dequantizes the rows that are asked for. It is made of a
model's own embedding, in place, and stays of its class, so that what some models do to a row (Gemma scales it) is done.
A `TiedHead` multiplies with the same codes, and no file has tensors of it. Where its kernel keeps rows apart, the
embedding looks them up there and holds none itself, until somebody saves, loads or moves it; else both have a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmq import ops
from llmq.buffers import keep_dtypes_, stand_in
from llmq.errors import CheckpointError
from llmq.formats import Stored, llmq_layout, streams
from llmq.types import QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QuantEmbedding(nn.Embedding):
    """A lookup of packed rows; `pack_embedding_` makes one."""

    stored: Stored
    _like: Tensor  # of the dtype of rows
    _lender: tuple[TiedHead, ...] = ()  # who holds the rows; a tuple: a head is no part of an embedding

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Nothing, of the embedding's dtype and on its device, for models that ask for these."""
        return stand_in(self._like, self._device())

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows [..., K] of the tokens `input` [...], whole numbers below the size of the vocabulary."""
        spec, k = self.stored.spec, self.stored.in_features
        if self._lender:
            [head] = self._lender
            tensors, kernel = head.packed(), head.kernel or ""
        else:
            tensors = [self.get_buffer(name) for name in ("codes", "scales", "zeros") if name in self.stored.layout]
            kernel = ""
        columns, symmetric = spec.group_columns(k), spec.symmetric
        found: Tensor = quant_rows(input, tensors, kernel, self._like.dtype, spec.bits, columns, symmetric, k)
        return found

    def fill_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the checkpoint's `tensors`, by their local names."""
        self._lender = ()
        for name in self.stored.layout:
            self._buffers[name] = tensors[name]

    def borrow_(self, head: TiedHead) -> None:
        """Hold no rows any more, but look them up in the arrangement of `head`, which has the very same."""
        self._lender = (head,)
        for name in self.stored.layout:
            self._buffers[name] = None

    @torch.no_grad()
    def restore_(self) -> None:
        """Hold the checkpoint's tensors again."""
        if self._lender:
            self.fill_(self._tensors())

    def prepare_(self, dtype: torch.dtype) -> None:
        """Return rows in `dtype` from now on.

        Raises:
            CheckpointError: the tensors that were loaded do not fit each other.
        """
        self._like = self._like.to(dtype)
        if streams.from_stored(self._tensors(), self.stored.spec, self.stored.in_features) is None:
            self.quantized_weight()  # has the error

    def quantized_weight(self) -> QuantizedWeight:
        """Return all rows on their grid."""
        return llmq_layout.unpack(self._tensors(), self.stored.spec)

    def stream(self) -> streams.Stream:
        """Return all rows for a kernel; they share memory with the tensors of the checkpoint where they can."""
        found = streams.from_stored(self._tensors(), self.stored.spec, self.stored.in_features)
        assert found is not None, "`prepare_` has looked"
        return found

    def extra_repr(self) -> str:
        """Return sizes and bits for printing."""
        spec = self.stored.spec
        return (
            f"{self.stored.out_features}, {self.stored.in_features}, bits={spec.bits}, group_size={spec.group_size}, "
            f"sym={spec.symmetric}"
        )

    def _tensors(self) -> dict[str, Tensor]:
        """Return the checkpoint's tensors, whoever holds the rows now; none before `fill_`."""
        if not self._lender:
            return {name: tensor for name in self.stored.layout if (tensor := self._buffers[name]) is not None}
        [head] = self._lender
        tensors = llmq_layout.pack(head.quantized_weight(), self.stored.spec)
        return {name: tensors[name].to(dtype) for name, (_, dtype) in self.stored.layout.items()}

    def _device(self) -> torch.device:
        if self._lender:
            return self._lender[0].packed()[0].device
        codes = self._buffers.get("codes")
        return self._like.device if codes is None else codes.device

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._tensors().items():
            destination[f"{prefix}{name}"] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore_()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantEmbedding:
        # .half() or .to(dtype) are about what a lookup returns: no dtype of a packed tensor may change
        self.restore_()
        before = {name: self._buffers[name] for name in self.stored.layout}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._like = fn(self._like)
        keep_dtypes_(self, before)
        return self


class TiedHead(nn.Module):
    """``y = x Wᵀ + b`` with the rows of a packed embedding for W."""

    def __init__(self, embedding: QuantEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._source = (embedding,)  # a tuple: it is no part of the head, and its tensors are not the head's
        self.bias = bias
        self.in_features, self.out_features = embedding.stored.in_features, embedding.stored.out_features
        self.kernel: str | None = None  # row of ops.KERNELS
        self._dtype: torch.dtype | None = None  # of the activations that the kernel was chosen for

    @property
    def weight(self) -> Tensor:
        """Nothing, of the head's dtype and on its device."""
        return self._source[0].weight

    @property
    def layer(self) -> ops.Layer:
        """The layer as kernels see it."""
        spec, n, k = self._source[0].stored.spec, self.out_features, self.in_features
        return ops.Layer(spec.bits, spec.group_columns(k), spec.symmetric, n, k)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [..., N] for `x` [..., K]."""
        if self.kernel is None or self._dtype != x.dtype:
            self.prepare_(x.dtype)
        assert self.kernel is not None
        return ops.matmul(x, self.packed(), self.bias, self.kernel, self.layer)

    @torch.no_grad()
    def prepare_(self, dtype: torch.dtype) -> None:
        """Arrange the rows for the best kernel on the embedding's device and activations of `dtype`."""
        [embedding] = self._source
        self._drop()
        kernel, stream = ops.choose(self.layer, embedding.weight.device, dtype), embedding.stream()
        for position, tensor in enumerate(ops.KERNELS[kernel].pack(stream, self.layer, dtype)):
            self.register_buffer(f"packed_{position}", tensor, persistent=False)
        self.kernel, self._dtype = kernel, dtype
        if _has_rows(kernel) and not ops.rounds(kernel, stream.scales, dtype):
            embedding.borrow_(self)

    def packed(self) -> list[Tensor]:
        """Return the arrangement of the kernel."""
        return [self.get_buffer(name) for name in self._buffers if name.startswith("packed_")]

    def quantized_weight(self) -> QuantizedWeight:
        """Return all rows on their grid."""
        assert self.kernel is not None, "it has been prepared"
        return ops.KERNELS[self.kernel].unpack(self.packed(), self.layer)

    def extra_repr(self) -> str:
        """Return sizes and kernel for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, tied, kernel={self.kernel}"

    def _drop(self) -> None:
        self._source[0].restore_()
        for name in [name for name in self._buffers if name.startswith("packed_")]:
            delattr(self, name)
        self.kernel = self._dtype = None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TiedHead:
        self._drop()  # made again of the embedding, wherever that is by then
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _has_rows(kernel: str) -> bool:
    """Whether the first dimension of all that a kernel arranges is that of rows."""
    outputs = ops.KERNELS[kernel].outputs
    return outputs is not None and not any(outputs)


@torch.library.custom_op("llmq::quant_rows", mutates_args=())
def quant_rows(  # noqa: PLR0913  operators take plain values only
    rows: Tensor,
    tensors: list[Tensor],
    kernel: str,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    symmetric: bool,
    in_features: int,
) -> Tensor:
    """Return rows number `rows` [...] of a weight, `dtype` [..., K].

    `tensors` are what row `kernel` of `ops.KERNELS` has arranged, by rows, or the codes, scales and perhaps zeros of
    the file where that is empty; the rest as in `ops.Layer`.
    """
    # `index_select`, since indexing takes a negative number for one from the end
    found = [tensor.index_select(0, rows.flatten()) for tensor in tensors]
    if not kernel:
        found[0] = llmq_layout.words(found[0])
    layer = ops.Layer(bits, group_size, symmetric, rows.numel(), in_features)
    weight = ops.KERNELS[kernel or "reference"].unpack(found, layer)
    return weight.dequantize().to(dtype).reshape(*rows.shape, in_features)


@quant_rows.register_fake
def _(  # noqa: PLR0913
    rows: Tensor,
    tensors: list[Tensor],
    kernel: str,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    symmetric: bool,
    in_features: int,
) -> Tensor:
    return tensors[0].new_empty(*rows.shape, in_features, dtype=dtype)


def pack_embedding_(model: PreTrainedModel, name: str, stored: Stored, dtype: torch.dtype, *, empty: bool) -> None:
    """Let the embedding `name` of `model` be packed as `stored` says, and a head that is tied to it with it.

    Its tensors are made on the meta device, for a loader to fill, or not at all if `empty`, for `fill_`.

    Raises:
        CheckpointError: the columns are out of order, or something else than a linear head is tied to it.
    """
    if llmq_layout.index in stored.layout:
        raise CheckpointError(f"{name}: an embedding with columns out of order; no tool is known to write one")
    module = model.get_submodule(name)
    assert isinstance(module, nn.Embedding)
    like = module.weight
    del module.weight
    module.__class__ = _packed_class(type(module))  # type: ignore[arg-type]  # a class has a hash
    assert isinstance(module, QuantEmbedding)
    module.stored, module._like = stored, torch.empty(0, dtype=dtype, device="cpu")
    for local, (shape, kind) in stored.layout.items():
        module.register_buffer(local, None if empty else torch.empty(shape, dtype=kind, device=like.device))
    _tie_(model, f"{name}.weight", module)


def _tie_(model: PreTrainedModel, source: str, embedding: QuantEmbedding) -> None:
    """Let what `model` ties to its parameter `source` use `embedding`."""
    targets = [target for target, tied in model.all_tied_weights_keys.items() if tied == source]
    for target in targets:
        name = target.removesuffix(".weight")
        head = model.get_submodule(name)
        if not isinstance(head, nn.Linear):
            raise CheckpointError(
                f"{name}: a packed embedding is tied to this {type(head).__name__}; llmq ties it to a head only"
            )
        parent, _, local = name.rpartition(".")
        setattr(model.get_submodule(parent), local, TiedHead(embedding, head.bias))
        del model.all_tied_weights_keys[target]
    if targets:
        # of this model alone: `tie_weights` would put the embedding's weight, which is none, into the head
        kept = {key: tied for key, tied in (model._tied_weights_keys or {}).items() if key not in targets}
        model._tied_weights_keys = kept


@cache
def _packed_class(kind: type[nn.Embedding]) -> type[QuantEmbedding]:
    """Return a class of embeddings that is both `kind` and packed: what `kind` adds comes first."""
    if kind is nn.Embedding:
        return QuantEmbedding
    return type(f"Quant{kind.__name__}", (kind, QuantEmbedding), {"__module__": __name__})
