"""Weights whose levels stand in tables, times 16-bit activations, in Triton: ``w = level * scale``.

The places of levels are the codes, and a group takes the only table, picks one of several, or has one of its own.
Codes lie as those of equally spaced levels do: of up to 4 bits as nibbles in planes of K (`w4a16`), with 16 levels to
a table, of more as bytes (`w8a16`), with 256. Levels are rounded to the dtype of the activations; scales are applied to
float32 sums or to weights, as there, and tile sizes are those of there, too.

How a level is looked up: `lut_levels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from llmq_kernels import launch, layout, many, splits, tables
from llmq_kernels.few import WARPS_PER_PROCESSOR
from llmq_kernels.layout import TILE_N, Layout
from llmq_kernels.lut_sums import dequantize_lut4_kernel, dequantize_lut8_kernel, few_lut4_kernel, few_lut8_kernel
from llmq_kernels.lut_tiles import lut4_kernel, lut8_kernel
from llmq_kernels.tables import Few, Tile
from llmq_kernels.tiling import COMPUTE_DTYPES

NIBBLES = Layout(
    name="w4a16",
    tiled=lut4_kernel,
    few=few_lut4_kernel,
    dequantize=dequantize_lut4_kernel,
    bits=4,
    word=torch.int16,
    columns_per_word=4,
    zero_bias={},
)
BYTES = Layout(
    name="w8a16",
    tiled=lut8_kernel,
    few=few_lut8_kernel,
    dequantize=dequantize_lut8_kernel,
    bits=8,
    word=torch.uint8,
    columns_per_word=1,
    zero_bias={},
)


class Packed(NamedTuple):
    """The operands of a kernel."""

    weight: Tensor  # words [Np, Kp / columns per word], Kp contiguous
    table: Tensor  # [T, 16] or [T, 256] in the dtype of the activations; of groups' own ones T is Gp * Np
    scales: Tensor | None  # [Gp, Np] in that dtype; None: all are 1
    picked: Tensor | None  # uint8 [Gp, Np]: which table a group takes; None: the only one, or its own

    @property
    def own(self) -> bool:
        """Whether each group has a table of its own."""
        return self.picked is None and len(self.table) > 1


@dataclass(frozen=True)
class Weight:
    """A packed weight [n, k]."""

    operands: Packed
    n: int
    k: int
    bits: int
    group_size: int

    @property
    def layout(self) -> Layout:
        """How its codes lie."""
        return layout_of(self.bits)

    def pointers(self) -> dict[str, Any]:
        """Return the arguments that every kernel takes for the weight."""
        words, table, scales, picked = self.operands
        padded = words.shape[0]
        return {
            "w_ptr": words,
            "t_ptr": table,
            "s_ptr": scales,
            "g_ptr": picked,
            "stride_wn": words.stride(0),
            "stride_sg": padded,
        }


def layout_of(bits: int) -> Layout:
    """Return how codes of `bits` bits lie."""
    return NIBBLES if bits <= 4 else BYTES


def refuses(n: int, k: int, bits: int, group_size: int, dtype: torch.dtype) -> str | None:
    """Return why these kernels cannot multiply with an [n, k] weight of this kind, or None if they can.

    The group size must divide k, and be a multiple of 32, or with codes of up to 4 bits of 16, unless it is k. float32
    activations are multiplied without tensor cores: right, and slow.
    """
    if not 1 <= bits <= 8:
        return f"bits {bits}: looks up codes of 1 to 8 bits"
    found = layout_of(bits)
    if found is NIBBLES and group_size % 32 == 16 and k % group_size == 0:
        group_size = k  # a quarter of a chunk, 16 columns, lies in one group
    return layout.refuses(found, n, k, found.bits, group_size, dtype)


def pack(
    codes: Tensor,
    scales: Tensor | None,
    table: Tensor,
    picked: Tensor | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Packed:
    """Return the operands of `matmul` for activations of `dtype`.

    codes uint8 [N, K] below 2^bits; scales [N, G], of either sign, or None where all are 1; table [T, 2^bits], rounded
    to `dtype`; picked [N, G] whole numbers below T, or None: then T is 1, or N * G, in the order of outputs and groups.
    ValueError says which argument does not fit.
    """
    found = layout_of(bits)
    n, k = codes.shape if codes.ndim == 2 else (0, 0)
    reason = refuses(n, k, bits, group_size, dtype)
    if reason is not None or codes.dtype != torch.uint8:
        raise ValueError(f"codes {codes.dtype} {list(codes.shape)}: {reason or 'needs uint8'}")
    if int(codes.max()) >> bits:
        raise ValueError(f"codes: largest is {int(codes.max())}, too large for {bits} bits")
    groups = (n, k // group_size)
    for name, tensor in (("scales", scales), ("picked", picked)):
        if tensor is not None and tensor.shape != groups:
            raise ValueError(f"{name} {list(tensor.shape)}: needs {list(groups)}")
    for name, tensor in (("scales", scales), ("table", table)):
        if tensor is not None and not bool(torch.isfinite(tensor.to(dtype)).all()):
            raise ValueError(f"{name}: not all finite in {dtype}; largest is {float(tensor.abs().max())}")
    if picked is not None and not bool(((picked == picked.round()) & (picked >= 0) & (picked < len(table))).all()):
        raise ValueError(f"picked: needs whole numbers in 0..{len(table) - 1}")
    count = len(table) if picked is not None else n * groups[1] if len(table) > 1 else 1
    if table.shape != (count, 2**bits) or (picked is not None and count > 256):
        raise ValueError(f"table {list(table.shape)}: needs [{min(count, 256)}, {2**bits}]")
    levels = pad(table.to(dtype), (0, 2**found.bits - 2**bits))
    if picked is None and count > 1:
        levels = _padded(levels.view(n, groups[1], -1), found, k, group_size).flatten(0, 1)
    return Packed(
        _words(found, codes, group_size),
        levels.contiguous(),
        None if scales is None else layout.pack_groups(found, scales, k, group_size, dtype),
        None if picked is None else layout.pack_groups(found, picked, k, group_size, torch.uint8),
    )


def unpack(
    packed: Packed, n: int, k: int, bits: int, group_size: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return codes uint8 [N, K], scales float32 [N, G] or None, tables float32 [T, 2^bits] and picked uint8 or None.

    The inverse of `pack` but for what it rounded.
    """
    scales, picked = (
        None if t is None else layout.unpack_groups(t, n, k, group_size) for t in (packed.scales, packed.picked)
    )
    table = packed.table[:, : 2**bits].float()
    if packed.own:
        whole = table.view(-1, packed.weight.shape[0], 2**bits)
        table = whole[: k // group_size, :n].transpose(0, 1).flatten(0, 1)
    codes = _codes(layout_of(bits), packed.weight, k, group_size)[:n, :k]
    return codes.contiguous(), scales, table.contiguous(), None if picked is None else picked.to(torch.uint8)


def _words(found: Layout, codes: Tensor, group_size: int) -> Tensor:
    """Return `codes` [N, K] as a kernel reads them; `w4a16` says what planes are."""
    padded = layout.pad_codes(found, codes, group_size)
    if found is BYTES:
        return padded.contiguous()
    rows, columns = padded.shape
    chunk = found.chunk(codes.shape[1], group_size)
    planes = padded.view(rows, columns // chunk, 4, chunk // 4).unbind(2)
    low, high = planes[0] | planes[1] << 4, planes[2] | planes[3] << 4
    return torch.stack((low, high), dim=-1).view(torch.int16).reshape(rows, columns // 4)


def _codes(found: Layout, words: Tensor, k: int, group_size: int) -> Tensor:
    """Return the codes uint8 [Np, Kp] that `_words` arranged."""
    if found is BYTES:
        return words
    low, high = words.view(torch.uint8).view(len(words), -1, found.chunk(k, group_size) // 4, 2).unbind(-1)
    return torch.stack((low & 15, low >> 4, high & 15, high >> 4), dim=2).reshape(len(words), -1)


def _padded(levels: Tensor, found: Layout, k: int, group_size: int) -> Tensor:
    """Return `levels` [N, G, L] as [Gp, Np, L], padded with zeros."""
    n, groups, _ = levels.shape
    chunk = found.chunk(k, group_size)
    wanted = 1 if group_size == k else -(-(k + -k % chunk) // group_size)
    return pad(levels, (0, 0, 0, wanted - groups, 0, -n % TILE_N)).transpose(0, 1)


def constants(weight: Weight) -> dict[str, Any]:
    """Return the compile-time arguments that every kernel takes."""
    return {"OWN": weight.operands.own, **weight.layout.constants(weight.k, weight.group_size)}


def few_constants(weight: Weight, row: Few, m: int) -> dict[str, Any]:
    """Return the compile-time arguments of the kernel for M = `m` tokens, at most four."""
    return {"M": m, "BLOCK_N": row.block_n, **constants(weight)}


def row_constants(weight: Weight) -> dict[str, Any]:
    """Return the compile-time arguments of the kernel that dequantizes rows."""
    return {"BLOCK_N": many.BLOCK_N, "CHUNKS": many.CHUNKS, **constants(weight)}


def tile_constants(weight: Weight, row: Tile, dtype: torch.dtype) -> dict[str, Any]:
    """Return the compile-time arguments of the kernel for tiles: for the launcher and for the report."""
    interpreted = launch.interpreted(weight.layout.tiled)
    compute = torch.float32 if interpreted and dtype == torch.bfloat16 else dtype
    return {
        "BLOCK_M": row.block_m,
        "BLOCK_N": row.block_n,
        "POST_SCALE": row.post_scale,
        "COMPUTE": COMPUTE_DTYPES[compute],
        "ASM": compute.itemsize == 2 and not interpreted and torch.version.hip is None,
        **constants(weight),
    }


def matmul(
    x: Tensor,
    packed: Sequence[Tensor | None],
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    *,
    splits: int | None = None,
) -> Tensor:
    """Return ``x @ w.T + bias`` as [M, N] in the dtype of x; accumulation is in float32.

    x [M, K] of any strides, in the dtype that `pack` was given; packed its result; bias [N], any real dtype, or None.
    `splits` sets over how many programs K is split, where a kernel does. ValueError says which argument does not fit.
    """
    weight = Weight(Packed(*packed), n, k, bits, group_size)  # type: ignore[arg-type]  # the last two may be None
    _check(weight, x, bias)
    if not len(x):
        return x.new_empty((0, n))
    x = x if x.stride(1) == 1 else x.contiguous()
    row = tables.for_device(weight.layout.name, x.device).pick(len(x), x.dtype)
    if row is None:
        return _by_rows(x, weight, bias)
    return few(x, weight, bias, row, splits) if isinstance(row, Few) else tiled(x, weight, bias, row, splits)


def _check(weight: Weight, x: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless a kernel may assume the shapes, dtypes and devices of all three."""
    found, n, k, group_size = weight.layout, weight.n, weight.k, weight.group_size
    reason = refuses(n, k, weight.bits, group_size, x.dtype)
    if reason is not None:
        raise ValueError(f"weight [{n}, {k}]: {reason}")
    padded_n, padded_k = n + -n % TILE_N, k + -k % found.chunk(k, group_size)
    groups = 1 if group_size == k else -(-padded_k // group_size)
    words, table, scales, picked = weight.operands
    count = groups * padded_n if weight.operands.own else len(table)
    needs = (
        ("weight", words, (padded_n, padded_k // found.columns_per_word), found.word),
        ("table", table, (count, 2**found.bits), x.dtype),
        ("scales", scales, (groups, padded_n), x.dtype),
        ("picked", picked, (groups, padded_n), torch.uint8),
    )
    for name, tensor, shape, dtype in needs:
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device != x.device:
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}; needs contiguous {dtype}"
                f" {list(shape)} on {x.device} for an [{n}, {k}] weight with group_size {group_size}"
            )
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x {list(x.shape)}: needs [M, {k}]")
    if bias is not None and (bias.shape != (n,) or not bias.is_contiguous() or bias.device != x.device):
        raise ValueError(f"bias {list(bias.shape)} on {bias.device}: needs contiguous [{n}] on {x.device}")
    if x.device.type == "cpu" and not launch.interpreted(found.tiled):
        raise ValueError("x: on cpu; Triton kernels need a GPU, or TRITON_INTERPRET=1 set before they are imported")


def few(x: Tensor, weight: Weight, bias: Tensor | None, row: Few, count: int | None = None) -> Tensor:
    """Return the product of one to four tokens, each contiguous, as sums without tensor cores; see `few`."""
    m, n = len(x), weight.n
    compiled = few_constants(weight, row, m)
    chunks, tiles = -(-weight.k // compiled["CHUNK"]), -(-n // row.block_n)
    if count is None:
        programs = WARPS_PER_PROCESSOR // row.num_warps
        count = splits.split_count(tiles, chunks, launch.processors(x.device), programs)
    return _launch(x, weight, bias, weight.layout.few, (tiles,), chunks, count, compiled, {"num_warps": row.num_warps})


def tiled(x: Tensor, weight: Weight, bias: Tensor | None, row: Tile, count: int | None = None) -> Tensor:
    """Return the product of some tokens, each contiguous, in tiles on tensor cores; see `tiling`."""
    m, n = len(x), weight.n
    compiled = tile_constants(weight, row, x.dtype)
    chunks, tiles = -(-weight.k // compiled["CHUNK"]), (-(-n // row.block_n), -(-m // row.block_m))
    if count is None:
        count = splits.split_count(tiles[0] * tiles[1], chunks, launch.processors(x.device))
    options = {"M": m, "num_warps": row.num_warps, "num_stages": row.num_stages}
    return _launch(x, weight, bias, weight.layout.tiled, tiles, chunks, count, compiled, options)


def _launch(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    kernel: Any,
    tiles: tuple[int, ...],
    chunks: int,
    count: int,
    compiled: dict[str, Any],
    options: dict[str, Any],
) -> Tensor:
    """Run `kernel` for `tiles` of the result, with K split over `count` programs."""
    per_split, count = splits.divide(chunks, count)
    out = torch.empty((len(x), weight.n), dtype=x.dtype, device=x.device)
    target = splits.target(out, count)
    grid = (*tiles, count)
    with launch.on(x.device):
        kernel[grid](
            x_ptr=x,
            b_ptr=bias if count == 1 else None,
            o_ptr=target,
            N=weight.n,
            K=weight.k,
            chunks=chunks,
            chunks_per_split=per_split,
            stride_xm=x.stride(0),
            **weight.pointers(),
            **options,
            **launch.COMPILE_OPTIONS,
            **compiled,
        )
        if count > 1:
            splits.add(target, bias, out)
    return out


def dequantize(weight: Weight, first: int, rows: int) -> Tensor:
    """Return rows `first` to `first + rows` of the weight, [rows, K] in the dtype of its tables, rounded once."""
    table = weight.operands.table
    out = torch.empty((rows, weight.k), dtype=table.dtype, device=table.device)
    compiled = row_constants(weight)
    chunks = -(-weight.k // compiled["CHUNK"])
    with launch.on(table.device):
        weight.layout.dequantize[(-(-rows // many.BLOCK_N), -(-chunks // many.CHUNKS))](
            o_ptr=out,
            N=rows,
            K=weight.k,
            first=first,
            chunks=chunks,
            num_warps=many.NUM_WARPS,
            **weight.pointers(),
            **launch.COMPILE_OPTIONS,
            **compiled,
        )
    return out


def _by_rows(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return the product of many tokens: dequantized, some rows at a time, and multiplied by PyTorch; see `many`."""
    n = weight.n
    bias = None if bias is None else bias.to(x.dtype)
    step = max(TILE_N, many.SLAB // weight.k // TILE_N * TILE_N)
    if n <= step:
        return linear(x, dequantize(weight, 0, n), bias)
    out = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
    for first in range(0, n, step):
        end = min(n, first + step)
        part = None if bias is None else bias[first:end]
        out[:, first:end] = linear(x, dequantize(weight, first, end - first), part)
    return out
