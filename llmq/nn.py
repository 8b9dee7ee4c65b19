"""`QuantLinear`: a linear layer whose weight stays packed.

It has two states. As made, its buffers are the tensors of the checkpoint, under the checkpoint's names, so that a
loader fills them like any others, or it has none until `fill_` gives them. `prepare_` hands them to the best kernel,
which keeps the weight in an arrangement of its own; the checkpoint's tensors are gone from then on, and come back,
exactly, whenever somebody saves, loads or moves the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq import ops
from llmq.buffers import keep_dtypes_, stand_in
from llmq.formats import FORMATS, TensorLayout, streams
from llmq.fusion import Fused
from llmq.types import QuantizedWeight, QuantSpec


class QuantLinear(nn.Module):
    """``y = x Wᵀ + b`` with W packed as `spec` says.

    Args:
        in_features: K.
        out_features: N.
        spec: bits, groups and format of the weight.
        bias: whether there is one, [N] of `dtype`.
        dtype: dtype of the bias and of the activations that are expected.
        device: where the buffers are made, not initialized. None: there are none before `fill_`; until then a state
            dict has no weight of the layer.
        layout: the tensors of a foreign file, if they are not those that llmq would write.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = "meta",
        layout: TensorLayout | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        layout = layout or FORMATS[spec.format].layout(spec, out_features, in_features)
        if device is not None:
            for name, (shape, stored) in layout.items():
                self.register_buffer(name, torch.empty(shape, dtype=stored, device=device))
        self.bias = None
        if bias:
            made = torch.empty(out_features, dtype=dtype, device=device or "meta")
            self.bias = nn.Parameter(made, requires_grad=False)
        self.stored = layout
        self._like = torch.empty(0, dtype=dtype, device="cpu")  # no buffer: loaders would have work with each
        self.kernel: str | None = None  # row of ops.KERNELS that holds the weight; None: the checkpoint's tensors do
        self.prepared_for: torch.dtype | None = None  # of the activations that the kernel was chosen for
        self.fused: Fused | None = None  # those that it shares its input with, and itself
        self.place = 0  # among them

    @property
    def weight(self) -> Tensor:
        """Nothing, of the layer's dtype and on its device, for models that ask their linears for these."""
        return stand_in(self._like, self._device())

    @property
    def layer(self) -> ops.Layer:
        """The layer as kernels see it."""
        spec, n, k = self.spec, self.out_features, self.in_features
        return ops.Layer(spec.bits, spec.group_columns(k), spec.symmetric, n, k, spec.grid)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output [..., N] for `x` [..., K]."""
        if self.kernel is None or self.prepared_for != x.dtype:
            self.prepare_(x.dtype)
        if self.fused is not None and not torch.is_grad_enabled():
            return self.fused.run(self, x)
        return self.multiply(self.in_order(x))

    def multiply(self, x: Tensor) -> Tensor:
        """Return the layer's output [..., N] for `x` [..., K], whose columns are in the weight's order."""
        assert self.kernel is not None, "it has been prepared"
        return ops.matmul(x, self.packed(), self.bias, self.kernel, self.layer)

    def in_order(self, x: Tensor) -> Tensor:
        """Return `x` [..., K] with its columns in the weight's order."""
        return x if (order := self._buffers.get("order")) is None else x[..., order]

    @torch.no_grad()
    def prepare_(self, dtype: torch.dtype) -> None:
        """Arrange the weight for the best kernel on this device and activations of `dtype`."""
        layer = self.layer
        kernel = ops.choose(layer, self._device(), dtype)
        row, held = ops.KERNELS[kernel], None if self.kernel is None else ops.KERNELS[self.kernel]
        if held is None or row.pack is not held.pack or (dtype != self.prepared_for and not row.as_read):
            stream, order = self._stream()
            packed = row.pack(stream, layer, dtype)
            exact = stream.scales if ops.rounds(kernel, stream.scales, dtype) else None
            self._drop(tuple(self.stored) if self.kernel is None else self._kernel_names())
            self.hold_(kernel, dtype, packed, exact, order)
        self.kernel, self.prepared_for = kernel, dtype
        if self.fused is not None:
            self.fused.settle_()

    def hold_(
        self,
        kernel: str,
        dtype: torch.dtype,
        packed: Sequence[Tensor],
        exact_scales: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        """Take the weight in a kernel's arrangement; the layer has no other.

        Args:
            kernel: row of `ops.KERNELS`.
            dtype: of the activations that it was chosen for.
            packed: what the row's `pack` returned.
            exact_scales: scales [N, G] of a foreign file that the kernel had to round, for saving what was loaded.
            order: which input each column belongs to, int64 [K]; None: they are in order.
        """
        tensors = {"order": order, "exact_scales": exact_scales}
        tensors |= {f"packed_{position}": tensor for position, tensor in enumerate(packed)}
        for name, tensor in tensors.items():
            if tensor is not None:
                self.register_buffer(name, tensor, persistent=False)
        self.kernel, self.prepared_for = kernel, dtype

    def share_(self, packed: Sequence[Tensor], order: Tensor | None) -> None:
        """Have the arrangement in these tensors, which are equal to its own, from now on, and this order."""
        for position, tensor in enumerate(packed):
            self._buffers[f"packed_{position}"] = tensor
        if order is not None:
            self._buffers["order"] = order

    def fill_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the checkpoint's `tensors`, by their local names, as the buffers of a layer that was made `empty`."""
        for name in self.stored:
            self.register_buffer(name, tensors[name])

    @torch.no_grad()
    def restore_(self) -> None:
        """Take the weight back from the kernel: the buffers are the checkpoint's tensors again."""
        if self.kernel is None:
            return
        stored = self._stored()
        self._drop(self._kernel_names())
        self.kernel = self.prepared_for = None
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)

    def quantized_weight(self) -> QuantizedWeight:
        """Return the weight on its grid; its columns are those of `columns`."""
        if self.kernel is None:
            return FORMATS[self.spec.format].unpack(self._stored(), self.spec)
        weight = ops.KERNELS[self.kernel].unpack(self.packed(), self.layer)
        exact = self._buffers.get("exact_scales")
        return weight if exact is None else replace(weight, scales=exact.float())

    def columns(self) -> Tensor | None:
        """Return which input each column of the weight belongs to, int64 [K]; None: they are in order."""
        if self.kernel is None:
            return FORMATS[self.spec.format].columns(self._stored(), self.spec)
        return self._buffers.get("order")

    def extra_repr(self) -> str:
        """Return sizes, bits and kernel for printing."""
        spec = self.spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={spec.bits}, group_size={spec.group_size}, sym={spec.symmetric}, kernel={self.kernel}"
        )

    def _stream(self) -> tuple[streams.Stream, Tensor | None]:
        """Return the weight for a kernel, and what `columns` does."""
        if self.kernel is None:
            stream = streams.from_stored(self._stored(), self.spec, self.in_features)
            if stream is not None:
                return stream, None
        return streams.of(self.quantized_weight(), self.spec.bits, symmetric=self.spec.symmetric), self.columns()

    def _device(self) -> torch.device:
        """Return where the weight is."""
        tensor = next(iter(self._buffers.values()), None)
        return self._like.device if tensor is None else tensor.device

    def _stored(self) -> dict[str, Tensor]:
        """Return the checkpoint's tensors, whoever holds the weight now; none of them before `fill_`."""
        if self.kernel is None:
            return {name: self.get_buffer(name) for name in self.stored if name in self._buffers}
        tensors = FORMATS[self.spec.format].pack(self.quantized_weight(), self.spec, self.columns())
        return {name: tensors[name].to(dtype) for name, (_, dtype) in self.stored.items()}

    def _kernel_names(self) -> tuple[str, ...]:
        """Buffers that are there as long as a kernel holds the weight."""
        mine = ("order", "exact_scales")
        return tuple(name for name in self._buffers if name.startswith("packed_") or name in mine)

    def packed(self) -> list[Tensor]:
        """Return the kernel's arrangement of the weight; nothing where no kernel holds it."""
        return [t for name, t in self._buffers.items() if t is not None and name.startswith("packed_")]

    def _drop(self, names: tuple[str, ...]) -> None:
        if self.fused is not None:
            self.fused.release_()
        for name in names:
            delattr(self, name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantLinear:
        # a kernel's arrangement belongs to one kind of device, and no dtype of a packed weight may change:
        # .half() or .to(dtype) are about the activations and the bias
        self.restore_()
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._like = fn(self._like)
        keep_dtypes_(self, before)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
        for name, tensor in self._stored().items():
            destination[f"{prefix}{name}"] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore_()
        super()._load_from_state_dict(*args, **kwargs)
