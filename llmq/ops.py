"""The one operator that multiplies by a packed weight, and the table of kernels behind it.

``torch.ops.llmq.quant_matmul(x, packed, bias, kernel, …)`` runs row `kernel` of `KERNELS`. Each row stores a packed
weight in its own arrangement, made once at load and exactly reversible, so that a model holds every weight once and
can still be saved as it was read. Rows stand in order of preference; the last one runs everything, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmq.errors import KernelError
from llmq.formats import bits as bitstream
from llmq.formats.streams import Stream
from llmq.grids.uniform import UniformGrid
from llmq.types import QuantizedWeight

_SLAB = 2**22  # weights that a gradient dequantizes at a time


class Layer(NamedTuple):
    """A packed layer, as far as a kernel cares."""

    bits: int
    group_size: int  # columns per group, the number of inputs where there is one group
    symmetric: bool  # whether every zero is the middle code
    out_features: int
    in_features: int


class Kernel(NamedTuple):
    """One row of `KERNELS`; the docstring of each function's result says what it needs to."""

    refuses: Callable[[Layer, torch.device, torch.dtype], str | None]  # why it cannot run the layer, or None
    pack: Callable[[Stream, Layer, torch.dtype], list[Tensor]]  # its arrangement of the weight
    unpack: Callable[[list[Tensor], Layer], QuantizedWeight]  # and back
    matmul: Callable[[Tensor, list[Tensor], Tensor | None, Layer], Tensor]  # x [M, K] -> [M, N]
    # which dimension of each packed tensor is that of the outputs, so that layers one above the other can be packed at
    # once and divided; None: they cannot
    outputs: tuple[int, ...] | None = None
    rows: int = 1  # outputs of each of these layers have to be a multiple of this
    path: Callable[[Layer, int, torch.dtype], str] | None = None  # what it does with M tokens, if that depends on M
    as_read: bool = False  # the arrangement is the stream that `pack` is given, scales unrounded, whatever the dtype


def choose(layer: Layer, device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the first kernel that runs `layer` on `device` with activations of `dtype`.

    Raises:
        KernelError: none does; says why each refused.
    """
    reasons = []
    for name, kernel in KERNELS.items():
        reason = kernel.refuses(layer, device, dtype)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise KernelError(f"no kernel runs {layer} on {device} in {dtype} ({'; '.join(reasons)})")


def rounds(kernel: str, scales: Tensor, dtype: torch.dtype) -> bool:
    """Return whether row `kernel` had to round `scales` for activations of `dtype`."""
    return not KERNELS[kernel].as_read and not torch.equal(scales, scales.to(dtype).to(scales.dtype))


def matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, kernel: str, layer: Layer) -> Tensor:
    """Return what `quant_matmul` does, without going through it where nothing but the result is wanted.

    On a CPU the operator itself takes 20 µs, as long as a small layer.
    """
    k, n = layer.in_features, layer.out_features
    if _is_watched(x, bias):
        found: Tensor = quant_matmul(x, packed, bias, kernel, layer.bits, layer.group_size, layer.symmetric, n)
        return found
    return KERNELS[kernel].matmul(x.reshape(-1, k), packed, bias, layer).reshape(*x.shape[:-1], n)


def _is_watched(x: Tensor, bias: Tensor | None) -> bool:
    """Return whether more than the result may be wanted of a product with `x`: a gradient, a graph, another device."""
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return True
    return (
        type(x) is not Tensor
        or x.device.type != "cpu"
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@torch.library.custom_op("llmq::quant_matmul", mutates_args=())
def quant_matmul(  # noqa: PLR0913  operators take plain values only
    x: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    kernel: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    out_features: int,
) -> Tensor:
    """Return ``x @ Wᵀ + bias`` [..., N] for the weight that `packed` holds in the arrangement of row `kernel`.

    `x` [..., K] of a float dtype; `bias` [N] or None; the rest as in `Layer`.
    """
    layer = Layer(bits, group_size, symmetric, out_features, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    return KERNELS[kernel].matmul(rows, packed, bias, layer).reshape(*x.shape[:-1], out_features)


@quant_matmul.register_fake
def _(  # noqa: PLR0913
    x: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    kernel: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    out_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("llmq::quant_matmul_input_grad", mutates_args=())
def quant_matmul_input_grad(
    grad: Tensor,
    packed: list[Tensor],
    kernel: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    in_features: int,
) -> Tensor:
    """Return ``grad @ W`` [..., K], of the dtype of `grad` [..., N]; the rest as in `quant_matmul`.

    Besides the codes, a byte each, W is there some columns at a time.
    """
    layer = Layer(bits, group_size, symmetric, grad.shape[-1], in_features)
    weight = KERNELS[kernel].unpack(packed, layer)
    rows = grad.reshape(-1, grad.shape[-1])
    found = rows.new_empty(len(rows), in_features)
    for start, columns in _slabs(weight):
        found[:, start : start + columns.shape[1]] = rows @ columns.to(rows.dtype)
    return found.reshape(*grad.shape[:-1], in_features)


@quant_matmul_input_grad.register_fake
def _(
    grad: Tensor,
    packed: list[Tensor],
    kernel: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    in_features: int,
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, kernel, bits, group_size, symmetric, _ = inputs
    ctx.save_for_backward(*packed)
    ctx.plain = (kernel, bits, group_size, symmetric, x.shape[-1])
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x_dtype, bias_dtype = ctx.dtypes
    grad_x = grad_bias = None
    packed = list(ctx.saved_tensors)
    if ctx.needs_input_grad[0]:
        grad_x = quant_matmul_input_grad(grad.contiguous(), packed, *ctx.plain).to(x_dtype)
    if bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.flatten(0, -2).sum(0).to(bias_dtype)
    return (grad_x, [None] * len(packed), grad_bias, None, None, None, None, None)


quant_matmul.register_autograd(_backward, setup_context=_setup)


def _slabs(weight: QuantizedWeight) -> Iterator[tuple[int, Tensor]]:
    """Yield a weight [N, K] some columns at a time, float32 [N, S], each time with the number of the first."""
    n, k = weight.codes.shape
    size = weight.group_size
    step = max(1, _SLAB // n)
    if step >= size:
        step -= step % size
    else:  # within a group
        step = next(width for width in range(step, 0, -1) if size % width == 0)
    for start in range(0, k, step):
        stop = min(start + step, k)
        groups = slice(start // size, -(-stop // size))
        codes, scales, zeros = weight.codes[:, start:stop], weight.scales[:, groups], weight.zeros[:, groups]
        yield start, replace(weight, codes=codes, scales=scales, zeros=zeros).dequantize()


def _reference_matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    weight = _reference_unpack(packed, layer).dequantize().to(x.dtype)
    return linear(x, weight, None if bias is None else bias.to(x.dtype))


def _reference_pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    """Return codes as a stream along the inputs, the scales and, where they are not all the middle code, the zeros."""
    return [tensor for tensor in stream if tensor is not None]


def _reference_unpack(packed: list[Tensor], layer: Layer) -> QuantizedWeight:
    codes = bitstream.unpack(packed[0], layer.bits, layer.in_features)
    return _weight(codes, packed[1], None if layer.symmetric else packed[2], layer)


def _weight(codes: Tensor, scales: Tensor, zeros: Tensor | None, layer: Layer) -> QuantizedWeight:
    """Return a weight from what a kernel package unpacked; no zeros means that all are the middle code."""
    if zeros is None:
        zeros = torch.full_like(scales, 2 ** (layer.bits - 1))
    grid = UniformGrid(layer.bits, layer.symmetric)
    return QuantizedWeight(codes, scales.float(), zeros.float(), grid, layer.group_size)


def _codes(stream: Stream, layer: Layer) -> Tensor:
    """Return the codes of a stream, uint8 [N, K]."""
    return bitstream.unpack(stream.words, layer.bits, layer.in_features)


def _native_refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    from llmq_kernels import native

    if device.type != "cpu":
        return f"runs on a CPU, not on {device.type}"
    return native.pairs_refuse(layer.bits, layer.in_features, layer.group_size, dtype)


def _native_float_refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    from llmq_kernels import native

    if device.type != "cpu":
        return f"runs on a CPU, not on {device.type}"
    return native.refuses(layer.bits, layer.in_features, layer.group_size, dtype)


def _native_pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    from llmq_kernels import native

    native.check_zeros(stream.zeros, layer.bits)
    return [tensor.contiguous() for tensor in _reference_pack(stream, layer, dtype)]


def _native_matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    from llmq_kernels import native

    weight = (packed[0], packed[1], None if layer.symmetric else packed[2])
    return native.matmul(x, weight, bias, layer.bits, layer.group_size)


def _cpu_int4_refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    from llmq_kernels import cpu

    if device.type != "cpu":
        return f"runs on a CPU, not on {device.type}"
    return cpu.int4_refuses(layer.out_features, layer.in_features, layer.bits, layer.group_size, dtype)


def _cpu_int4_pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    from llmq_kernels import cpu

    return list(cpu.pack_int4_stream(stream.words, stream.scales, stream.zeros, layer.group_size))


def _cpu_int4_unpack(packed: list[Tensor], layer: Layer) -> QuantizedWeight:
    from llmq_kernels import cpu

    n, k = layer.out_features, layer.in_features
    return _weight(*cpu.unpack_int4(packed[0], packed[1], n, k, layer.group_size), layer)


def _cpu_int4_matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    from llmq_kernels import cpu

    n, k = layer.out_features, layer.in_features
    return cpu.int4_matmul(x, packed[0], packed[1], bias, n, k, layer.group_size)


def _cpu_int8_refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    from llmq_kernels import cpu

    if device.type != "cpu":
        return f"runs on a CPU, not on {device.type}"
    if not layer.symmetric:
        return "needs a symmetric grid"
    return cpu.int8_refuses(layer.out_features, layer.in_features, layer.bits, layer.group_size, dtype)


def _cpu_int8_pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    from llmq_kernels import cpu

    return list(cpu.pack_int8(_codes(stream, layer), stream.scales, None))


def _cpu_int8_unpack(packed: list[Tensor], layer: Layer) -> QuantizedWeight:
    from llmq_kernels import cpu

    return _weight(*cpu.unpack_int8(packed[0], packed[1]), layer)


def _cpu_int8_matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
    from llmq_kernels import cpu

    return cpu.int8_matmul(x, packed[0], packed[1], bias, layer.out_features, layer.in_features)


def _triton(module: str) -> Kernel:
    """Return the row of a Triton dequant-GEMM, `llmq_kernels.<module>`; Triton is imported when a GPU asks for it."""

    def refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"runs on an NVIDIA GPU, not on {device.type}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0 or newer"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"{dtype} activations: tensor cores multiply float16 and bfloat16"
        n, k, bits = layer.out_features, layer.in_features, layer.bits
        return _reason(import_module(module).refuses(n, k, bits, layer.group_size, dtype))

    def pack(stream: Stream, layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        codes, scales = _codes(stream, layer), stream.scales.float()
        zeros = None if stream.zeros is None else stream.zeros.float()
        packed = import_module(module).pack(codes, scales, zeros, layer.group_size, dtype)
        return list(packed.tensors())

    def unpack(packed: list[Tensor], layer: Layer) -> QuantizedWeight:
        n, k = layer.out_features, layer.in_features
        codes, scales, zeros = import_module(module).unpack(packed, n, k, layer.group_size)
        return _weight(codes, scales, zeros, layer)

    def matmul(x: Tensor, packed: list[Tensor], bias: Tensor | None, layer: Layer) -> Tensor:
        n, k = layer.out_features, layer.in_features
        y: Tensor = import_module(module).matmul(x, packed, bias, n, k, layer.group_size)
        return y

    return Kernel(refuses, pack, unpack, matmul)


def _reason(found: object) -> str | None:
    return None if found is None else str(found)


def _always(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _native_path(layer: Layer, tokens: int, dtype: torch.dtype) -> str:
    from llmq_kernels import native

    return native.path(tokens, layer.in_features, layer.bits, layer.group_size, dtype)


_NATIVE = (_native_pack, _reference_unpack, _native_matmul, (0, 0, 0), 1, _native_path, True)

KERNELS: dict[str, Kernel] = {
    "cpu_native": Kernel(_native_refuses, *_NATIVE),
    "cpu_int4pack": Kernel(_cpu_int4_refuses, _cpu_int4_pack, _cpu_int4_unpack, _cpu_int4_matmul, (0, 1), 64),
    "cpu_int8pack": Kernel(_cpu_int8_refuses, _cpu_int8_pack, _cpu_int8_unpack, _cpu_int8_matmul, (0, 0)),
    "cpu_native_float": Kernel(_native_float_refuses, *_NATIVE),
    "triton_w4a16": _triton("llmq_kernels.w4a16"),
    "triton_w8a16": _triton("llmq_kernels.w8a16"),
    "triton_w3a16": _triton("llmq_kernels.w3a16"),
    "triton_w2a16": _triton("llmq_kernels.w2a16"),
    "reference": Kernel(_always, _reference_pack, _reference_unpack, _reference_matmul, (0, 0, 0), as_read=True),
}
