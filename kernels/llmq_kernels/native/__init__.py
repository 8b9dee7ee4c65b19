"""Products with packed weights on a CPU, in C that is compiled on first use for the machine at hand.

They read the stream of codes as `llmq.formats.bits` packs it, so nothing is rearranged at load. Where they cannot be
compiled (`build.unavailable` says why) other kernels serve.

With a table of levels a weight is ``level * scale``, and codes are places in the table; zeros then say which of several
tables a group takes.

Letters: N outputs, K inputs, G groups per row, M tokens, T tables, L = 2^bits levels.
"""

from __future__ import annotations

from collections.abc import Collection
from ctypes import CDLL
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmq_kernels.native import build

BITS = range(2, 9)  # of a code; a table may have two levels, and codes of one bit
_SCALES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ONES = 3  # in place of these where there are no scales
_ZEROS = {torch.uint8: 1, torch.int16: 2}
_STEP = 32  # columns that bfloat16 products take together
_GRAIN = 1 << 17  # weights that are worth a thread: waking one takes some 10 µs, and a core reads 10 weights a ns
_FEW = 4  # tokens that C multiplies codes with as they are, FEW_TOKENS there
_TILES = 12  # tokens from which on matrix units (AMX) are ahead; not measured here, from figures of another machine
_SLAB = 1 << 20  # bytes of dequantized rows that are handed to PyTorch at a time: they stay in the second-level cache


class Weight(NamedTuple):
    """A packed weight."""

    words: Tensor  # int32 [N, W]
    scales: Tensor | None  # float32, float16 or bfloat16 [N, G]; None: all are 1, with a table only
    # uint8 or int16 [N, G] that passed `check_zeros`; None: all are the middle code. With tables: which one a group
    # takes, having passed `check_tables`
    zeros: Tensor | None
    table: Tensor | None = None  # float32, float16 or bfloat16 [T, L]: one, those that zeros say, or one for each group


Parts = Weight | tuple[Tensor, Tensor | None, Tensor | None]


def refuses(bits: int, k: int, group_size: int, dtype: torch.dtype, *, table: bool = False) -> str | None:
    """Return why `matmul` cannot multiply with a weight of K = `k` inputs of this kind, or None if it can."""
    if bits not in BITS and not (table and bits == 1):
        return f"bits {bits}: multiplies with codes of 2 to 8 bits"
    if dtype not in _SCALES:
        return f"{dtype} activations: multiplies float32, bfloat16 and float16"
    if group_size % 8 and group_size < k:
        return f"group_size {group_size}: needs a multiple of 8"
    return build.unavailable(bits, table)


def pairs_refuse(bits: int, k: int, group_size: int, dtype: torch.dtype, *, table: bool = False) -> str | None:
    """Return why `matmul` would not use the processor's dot products of bfloat16, or None: then nothing is faster."""
    if dtype != torch.bfloat16:
        return f"{dtype} activations: multiplies bfloat16"
    if not _in_steps(group_size, k):
        return f"group_size {group_size}: needs a multiple of {_STEP}"
    reason = refuses(bits, k, group_size, dtype, table=table)
    if reason is None and not build.has_pairs(build.library(bits, table)):
        return "this processor has no dot products of bfloat16 (AVX512_BF16)"
    return reason


def path(
    m: int, k: int, bits: int, group_size: int, dtype: torch.dtype, *, table: bool = False, one: bool = False
) -> str:
    """Return what `matmul` does with M = `m` tokens and a weight of K = `k` inputs, in a few words.

    table: whether levels stand in tables; one: whether in one for all groups.
    """
    kernels = build.library(bits, table)
    whole = _in_steps(group_size, k, one and dtype == torch.bfloat16 and build.has_pairs(kernels))
    in_pairs = dtype == torch.bfloat16 and whole and build.has_pairs(kernels)
    if _is_slow(m, in_pairs, dtype, kernels):
        return "rows to PyTorch"
    where = "from codes" if m <= _FEW and whole and build.is_wide(kernels) else "rows in cache"
    return f"{where}, {'bfloat16 pairs' if in_pairs else 'float32'}"


def check_zeros(zeros: Tensor | None, bits: int) -> None:
    """Raise ValueError unless all `zeros` are in 0 to 2^bits; products take them for places in a table."""
    if zeros is not None and bool(((zeros < 0) | (zeros > 2**bits)).any()):
        raise ValueError(f"zeros of {int(zeros.min())} to {int(zeros.max())}: {bits} bits need 0 to {2**bits}")


def check_tables(picked: Tensor | None, table: Tensor) -> None:
    """Raise ValueError unless all tables that are `picked` are there."""
    if picked is not None and bool(((picked < 0) | (picked >= len(table))).any()):
        raise ValueError(f"tables {int(picked.min())} to {int(picked.max())} are picked: there are {len(table)}")


def matmul(x: Tensor, weight: Parts, bias: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Return ``x @ w.T + bias`` [M, N] in the dtype of `x`, summed in float32.

    Args:
        x: [M, K] float32, bfloat16 or float16, of any strides.
        weight: what `Weight` holds. A last group may be short.
        bias: [N] or None.
        bits: of a code.
        group_size: columns per group, a multiple of 8 or at least K.

    Of up to 4 tokens in bfloat16 the scales are applied to float32 sums of exact products, for which levels of tables
    are rounded to bfloat16; else weights are rounded to bfloat16, as in a dense layer. float16 is computed in float32.

    Raises:
        ValueError: a tensor does not fit.
        build.BuildError: there are no native kernels.
    """
    m, k = x.shape
    packed, kernels = _packed(weight, bits, k, group_size)
    n = packed.n
    if bias is not None:
        if bias.shape != (n,):
            raise ValueError(f"bias {list(bias.shape)}: needs [{n}]")
        bias = bias.detach().float().contiguous()
    one = packed.table is not None and not packed.own and not packed.zero_type
    in_pairs = x.dtype == torch.bfloat16 and _in_steps(group_size, k, one) and build.has_pairs(kernels)
    if _is_slow(m, in_pairs, x.dtype, kernels):
        return by_slabs(x, weight, bias, bits, group_size)
    dtype = torch.bfloat16 if in_pairs else torch.float32
    rows = x if x.dtype == dtype else x.to(dtype)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = torch.empty(m, n, dtype=dtype)
    if m:
        product = kernels.llmq_pairs if in_pairs else kernels.llmq_float
        pointers = rows.data_ptr(), rows.stride(0), None if bias is None else bias.data_ptr(), y.data_ptr()
        _check(product(packed, *pointers, m, build.parallel(), _threads(n * k * (4 + m))))
    return y if y.dtype == x.dtype else y.to(x.dtype)


def by_slabs(x: Tensor, weight: Parts, bias: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Return what `matmul` does by products of PyTorch's with some dequantized rows at a time, about 1 MiB of them.

    Worth it where PyTorch has matrix units to multiply with that these kernels have not.
    """
    n, k = weight[0].shape[0], x.shape[-1]
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    count = min(n, max(1, _SLAB // (k * dtype.itemsize)))
    rows, slab, y = x.to(dtype), torch.empty(count, k, dtype=dtype), torch.empty(len(x), n, dtype=dtype)
    for first in range(0, n, count):
        end = min(n, first + count)
        found = dequantize(weight, k, bits, group_size, (first, end), slab)
        y[:, first:end] = linear(rows, found, None if bias is None else bias[first:end].to(dtype))
    return y.to(x.dtype)


def dequantize(weight: Parts, k: int, bits: int, group_size: int, rows: tuple[int, int], out: Tensor) -> Tensor:
    """Return rows `rows[0]` to `rows[1]` of a weight as numbers [R, K], in the memory of `out`.

    out: at least R rows of K columns, float32 or bfloat16, contiguous; the rest as for `matmul`.

    Raises:
        ValueError: a tensor does not fit.
        build.BuildError: there are no native kernels.
    """
    packed, kernels = _packed(weight, bits, k, group_size)
    first, end = rows
    found = out[: end - first]
    fits = found.shape == (end - first, k) and out.is_contiguous() and out.dtype in (torch.float32, torch.bfloat16)
    if not (0 <= first <= end <= packed.n and fits):
        raise ValueError(f"rows {first} to {end} of {packed.n} in {out.dtype} {list(out.shape)}: needs [R, {k}]")
    as_float, threads = int(out.dtype == torch.float32), _threads(4 * packed.k * (end - first))
    _check(kernels.llmq_dequantize(packed, first, end, out.data_ptr(), as_float, build.parallel(), threads))
    return found


def _packed(weight: Parts, bits: int, k: int, group_size: int) -> tuple[build.Weight, CDLL]:
    """Return what C takes of a weight, whose tensors have to outlive it, and the kernels for it.

    Raises:
        ValueError: they do not fit each other.
    """
    words, scales, zeros, table = Weight(*weight)
    n, width, groups = words.shape[0], -(-k * bits // 32), -(-k // group_size)
    known = bits in BITS or (bits == 1 and table is not None)
    if not known or (group_size % 8 and groups > 1) or k < 1:
        raise ValueError(f"{bits} bits in groups of {group_size}: needs 2 to 8, and a multiple of 8")
    _check_tensor("words", words, (n, width), (torch.int32,))
    if scales is not None:
        _check_tensor("scales", scales, (n, groups), _SCALES)
    elif table is None:
        raise ValueError("scales: there are none, and no table of levels")
    if zeros is not None:
        _check_tensor("zeros", zeros, (n, groups), _ZEROS)
    own = False
    if table is not None:
        own = zeros is None and len(table) > 1
        _check_tensor("table", table, (n * groups if own else len(table), 2**bits), _SCALES)
    packed = build.Weight(
        words.data_ptr(),
        4 * width,
        None if scales is None else scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        _ONES if scales is None else _SCALES[scales.dtype],
        0 if zeros is None else _ZEROS[zeros.dtype],
        n,
        k,
        min(group_size, k),
        None if table is None else table.data_ptr(),
        0 if table is None else _SCALES[table.dtype],
        own,
    )
    return packed, build.library(bits, table is not None)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, int], dtypes: Collection[torch.dtype]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} {tensor.dtype} {list(tensor.shape)} on {tensor.device}: needs {list(shape)} of "
            f"{' or '.join(map(str, dtypes))}, contiguous, on cpu"
        )


def _in_steps(group_size: int, k: int, one: bool = False) -> bool:
    """Return whether groups are such that bfloat16 can be multiplied in pairs; one: all have the same table."""
    return group_size % _STEP == 0 or group_size >= k or (one and 2 * group_size == _STEP)


def _is_slow(m: int, in_pairs: bool, dtype: torch.dtype, kernels: CDLL) -> bool:
    """Return whether PyTorch multiplies `m` tokens faster on this processor than these kernels do."""
    if m <= _TILES:
        return False
    if dtype == torch.bfloat16:
        return not in_pairs or torch.cpu._is_amx_tile_supported()
    return not build.is_wide(kernels)


def _threads(quarters: int) -> int:
    """Return how many threads are worth it to do something to a quarter as many weights."""
    return max(1, min(torch.get_num_threads(), quarters // (4 * _GRAIN)))


def _check(outcome: int) -> None:
    if outcome:
        raise MemoryError("no memory for a second copy of the activations")
