"""How a kernel stores a weight, and whether what it is given fits: what all weight-only kernels share.

A kernel walks along K in *chunks*, as many columns as one step of its loop takes; N and K are padded to whole tiles
and chunks, because masks on weight loads would break their 128-bit vectors.

Letters: N outputs, K inputs, G groups per row, M tokens; Np and Kp are N and K padded, Gp groups cover Kp columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmq_kernels.launch import interpreted

TILE_N = 128  # rows that `pack` pads to: every BLOCK_N of the tables divides it

ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32)

# The bits of 2**23, the first float32 whose mantissa counts in ones: a code put into its last bits is added, exactly.
# Kernels take it as an argument: a constant is put into a register again for every use, a tenth of the instructions.
TWO_23_BITS = 0x4B000000


class Packed(NamedTuple):
    """The operands of a kernel; ``Packed(*tensors)`` restores what `tensors` flattened."""

    weight: Tensor  # words [Np, Kp / columns per word], Kp contiguous
    scales: Tensor  # [Gp, Np] in the dtype of the activations: one vector load per group
    zeros: Tensor | None = None  # like scales, with what the kernel adds to codes added; None: symmetric

    def tensors(self) -> list[Tensor]:
        """Return the operands as a flat list, two tensors or three."""
        return [t for t in self if t is not None]


@dataclass(frozen=True)
class Layout:
    """How one weight-only product lays out K, and its three kernels (`few`, `tiling`, `many`)."""

    name: str  # its key in the tables of `tables`
    tiled: Any  # the @triton.jit functions
    few: Any
    dequantize: Any
    bits: int
    word: torch.dtype  # of the packed weight
    columns_per_word: int
    zero_bias: dict[torch.dtype, int]  # what packed zeros have added

    def chunk(self, k: int, group_size: int) -> int:
        """Return the number of columns per step of the loop: the largest that keeps its groups simple."""
        if self.bits == 2:
            # A quarter of a chunk may be a group of its own. An eighth, 16 columns, is the least that tl.dot takes.
            return 256 if group_size == k or group_size % 64 == 0 else 128
        if self.bits == 4:
            # Half a chunk may be a group of its own. A quarter, 16 columns, is the least that tl.dot takes.
            return 128 if group_size == k or group_size % 128 == 0 else 64
        if self.columns_per_word == 2:
            return 128 if group_size == k or group_size % 64 == 0 else 64
        # 128 bytes per step spilled at BLOCK_M 128 on sm_80.
        return 64 if group_size == k or group_size % 64 == 0 else 32

    def constants(self, k: int, group_size: int) -> dict[str, Any]:
        """Return the compile-time arguments that every kernel takes."""
        chunk = self.chunk(k, group_size)
        return {"GROUP": 0 if group_size == k else group_size, "CHUNK": chunk, "EVEN_K": k % chunk == 0}


def refuses(layout: Layout, n: int, k: int, bits: int, group_size: int, dtype: torch.dtype) -> str | None:
    """Return why a kernel cannot multiply with an [n, k] weight of this kind, or None if it can."""
    if bits != layout.bits:
        return f"bits {bits}: this kernel multiplies with {layout.bits}-bit codes"
    if n < 1 or k < 1:
        return f"weight [{n}, {k}]: is empty"
    if group_size < 1 or k % group_size:
        return f"group_size {group_size}: does not divide K = {k}"
    if group_size != k and group_size % 32:
        return f"group_size {group_size}: needs a multiple of 32, or one group per row"
    if dtype not in ACTIVATIONS:
        return f"{dtype}: needs float16, bfloat16 or float32 activations"
    return None


def check_quantized(
    layout: Layout, codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, dtype: torch.dtype
) -> None:
    """Raise ValueError unless the arguments of `pack` describe a weight that its kernel supports."""
    if codes.ndim != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"codes: {codes.dtype} {list(codes.shape)}; needs uint8 [N, K]")
    n, k = codes.shape
    reason = refuses(layout, n, k, layout.bits, group_size, dtype)
    if reason is not None:
        raise ValueError(f"codes [{n}, {k}]: {reason}")
    if layout.bits < 8 and int(codes.max()) >> layout.bits:
        raise ValueError(f"codes: largest is {int(codes.max())}, too large for {layout.bits} bits")
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and tensor.shape != (n, k // group_size):
            raise ValueError(f"{name} {list(tensor.shape)}: needs [{n}, {k // group_size}]")
    if not bool(torch.isfinite(scales.to(dtype)).all()):
        raise ValueError(f"scales: not all finite in {dtype}; largest is {float(scales.abs().max())}")
    # One past the last code is let through: GPTQ's first format stores zero - 1, so its zeros are 1..2**bits.
    if zeros is not None and not bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= 2**layout.bits)).all()):
        raise ValueError(f"zeros: need whole numbers in 0..{2**layout.bits}")


def pad_codes(layout: Layout, codes: Tensor, group_size: int) -> Tensor:
    """Return `codes` uint8 [N, K] as [Np, Kp] of whole tiles and chunks, padded with zeros."""
    n, k = codes.shape
    chunk = layout.chunk(k, group_size)
    return torch.nn.functional.pad(codes, (0, -k % chunk, 0, -n % TILE_N))


def pack_groups(layout: Layout, values: Tensor, k: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Return `values` [N, G] as [Gp, Np] in `dtype`, padded with zeros; a zero scale silences padded codes."""
    n, groups = values.shape
    _, padded_groups = _padded(layout, k, group_size)
    padded = torch.nn.functional.pad(values.to(dtype), (0, padded_groups - groups, 0, -n % TILE_N))
    return padded.t().contiguous()


def unpack_groups(values: Tensor, n: int, k: int, group_size: int) -> Tensor:
    """Return [Gp, Np] `values` as float32 [N, G]: the inverse of `pack_groups` but for its rounding."""
    return values[: k // group_size, :n].t().to(torch.float32).contiguous()


def _padded(layout: Layout, k: int, group_size: int) -> tuple[int, int]:
    """Return Kp, and the number of groups Gp that cover it."""
    chunk = layout.chunk(k, group_size)
    padded_k = k + -k % chunk
    return padded_k, 1 if group_size == k else -(-padded_k // group_size)


@dataclass(frozen=True)
class Weight:
    """A packed weight [n, k] that has been checked against its layout."""

    layout: Layout
    operands: Packed
    n: int
    k: int
    group_size: int


def check_operands(weight: Weight, x: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless a kernel may assume the shapes, dtypes and devices of all three."""
    layout, operands, n, k = weight.layout, weight.operands, weight.n, weight.k
    reason = refuses(layout, n, k, layout.bits, weight.group_size, x.dtype)
    if reason is not None:
        raise ValueError(f"weight [{n}, {k}]: {reason}")
    padded_k, groups = _padded(layout, k, weight.group_size)
    padded_n = n + -n % TILE_N
    needs = (
        ("weight", operands.weight, (padded_n, padded_k // layout.columns_per_word), layout.word),
        ("scales", operands.scales, (groups, padded_n), x.dtype),
        ("zeros", operands.zeros, (groups, padded_n), x.dtype),
    )
    for name, tensor, shape, dtype in needs:
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)}; needs {dtype} {list(shape)}, rows contiguous,"
                f" for an [{n}, {k}] weight with group_size {weight.group_size} and {x.dtype} activations"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, but x is on {x.device}")
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x {list(x.shape)}: needs [M, {k}]")
    if bias is not None and (bias.shape != (n,) or not bias.is_contiguous() or bias.device != x.device):
        raise ValueError(f"bias {list(bias.shape)} on {bias.device}: needs contiguous [{n}] on {x.device}")
    if x.device.type == "cpu" and not interpreted(layout.tiled):
        raise ValueError("x: on cpu; Triton kernels need a GPU, or TRITON_INTERPRET=1 set before they are imported")
