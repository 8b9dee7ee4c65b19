"""Weights on a codebook of vectors, times 16-bit activations, in Triton: ``w[n, p·d + i] = book[code, i] * scale``.

**Codes** lie as bytes, in the order of the columns they stand for. Codes of 2 or 4 bits are taken together, four or two
to a byte, and the byte names one of 256 longer vectors, which all combinations make: so nothing is wasted, and kernels
know codebooks of 2, 4 and 8 columns. Codes of 6 bits take 8.

**Scales** are kept as they were read, and applied to sums in float32; only the larger tiles scale weights by groups, in
16 bits. How entries lie and are looked up: `vector_entries`.

Letters: N outputs, K inputs, P codes per row, d columns per code, b bits of a code, G groups per row, M tokens; Np and
Kp are N and K padded to whole tiles and chunks; D columns to a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from llmq_kernels import launch, many, splits, tables
from llmq_kernels.few import WARPS_PER_PROCESSOR
from llmq_kernels.layout import TILE_N, TWO_23_BITS
from llmq_kernels.tables import Few, Tile
from llmq_kernels.tiling import COMPUTE_DTYPES
from llmq_kernels.vector_sums import dequantize_vectors_kernel, few_vectors_kernel
from llmq_kernels.vector_tiles import vectors_kernel

NAME = "vectors"  # its key in the tables of `tables`
_KINDS = {2: (2, 4, 6, 8), 4: (4, 8), 8: (8,)}  # columns per code to bits of a code
_ACTIVATIONS = (torch.float16, torch.bfloat16)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


class Kind(NamedTuple):
    """What a weight is, but for its numbers."""

    n: int
    k: int
    columns: int  # d
    code_bits: int  # b
    group_size: int  # at least K: one group per row

    @property
    def together(self) -> int:
        """Codes in a byte."""
        return 1 if self.code_bits == 6 else 8 // self.code_bits

    @property
    def width(self) -> int:
        """Columns of a byte, D."""
        return self.columns * self.together

    @property
    def chunk(self) -> int:
        """Columns per step of the loop, which lie in one group."""
        one = self.group_size >= self.k
        return next((size for size in (128, 64) if one or self.group_size % size == 0), 32)

    @property
    def bytes(self) -> int:
        """Bytes of a row, padded."""
        return -(-self.k // self.chunk) * self.chunk // self.width

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.k // self.group_size)

    @property
    def padded_n(self) -> int:
        """Outputs, padded."""
        return self.n + -self.n % TILE_N


class Packed(NamedTuple):
    """The operands of a kernel."""

    weight: Tensor  # bytes of codes, uint8 [Np, Kp / D]
    book: Tensor  # int32 [1, or 2 if D is 8, entries], as `vector_entries` says
    scales: Tensor  # [G, Np], as they were read


def refuses(kind: Kind, dtype: torch.dtype) -> str | None:
    """Return why these kernels cannot multiply with a weight of this kind, or None if they can.

    Groups are of a multiple of 32 columns, or one per row.
    """
    if kind.code_bits not in _KINDS.get(kind.columns, ()):
        return f"codes of {kind.code_bits} bits for {kind.columns} columns: there is no kernel for them"
    if kind.n < 1 or kind.k < 1:
        return f"weight [{kind.n}, {kind.k}]: is empty"
    if kind.group_size < kind.k and (kind.group_size < 1 or kind.group_size % 32):
        return f"group_size {kind.group_size}: needs a multiple of 32, or one group per row"
    if dtype not in _ACTIVATIONS:
        return f"{dtype} activations: multiplies float16 and bfloat16"
    return None


def pack(codes: Tensor, book: Tensor, scales: Tensor, kind: Kind) -> Packed:
    """Return the operands of `matmul`.

    codes uint8 [N, P] below 2^b; book int8 [2^b, d]; scales float16, bfloat16 or float32 [N, G], of either sign; the
    last group may be short. ValueError says which argument does not fit.
    """
    reason = refuses(kind, torch.float16)
    if reason is not None:
        raise ValueError(reason)
    count = -(-kind.k // kind.columns)
    needs = (
        ("codes", codes, (kind.n, count), (torch.uint8,)),
        ("book", book, (2**kind.code_bits, kind.columns), (torch.int8,)),
        ("scales", scales, (kind.n, kind.groups), _SCALES),
    )
    for name, tensor, shape, dtypes in needs:
        if tensor.shape != shape or tensor.dtype not in dtypes:
            wanted = " or ".join(map(str, dtypes))
            raise ValueError(f"{name} {tensor.dtype} {list(tensor.shape)}: needs {wanted} {list(shape)}")
    if kind.code_bits < 8 and int(codes.max()) >> kind.code_bits:
        raise ValueError(f"codes: largest is {int(codes.max())}, too large for {kind.code_bits} bits")
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("scales: not all finite")
    rows = kind.padded_n - kind.n
    apart = pad(codes, (0, kind.bytes * kind.together - count, 0, rows)).view(kind.padded_n, -1, kind.together)
    return Packed(
        (apart << _shifts(kind, codes.device)).sum(2, dtype=torch.uint8),
        _words(_longer(book, kind)),
        pad(scales, (0, 0, 0, rows)).T.contiguous(),
    )


def _shifts(kind: Kind, device: torch.device) -> Tensor:
    """Return where the codes of a byte begin, uint8."""
    return torch.arange(0, kind.together * kind.code_bits, kind.code_bits, dtype=torch.uint8, device=device)


def _longer(book: Tensor, kind: Kind) -> Tensor:
    """Return the vectors of all combinations of codes that share a byte, int8 [entries, D]; the lowest comes first."""
    places = torch.arange(2 ** (kind.code_bits * kind.together), device=book.device)
    return torch.cat([book[places >> kind.code_bits * i & 2**kind.code_bits - 1] for i in range(kind.together)], dim=1)


def _words(book: Tensor) -> Tensor:
    """Return a codebook int8 [entries, D] as int32 [words, entries]; see `vector_entries`."""
    numbers = (book.int() + 128).T.contiguous()
    if len(numbers) == 2:
        return (numbers[0] | numbers[1] << 16)[None]
    first, second, third, fourth = numbers.view(-1, 4, len(book)).unbind(1)
    return first | third << 8 | second << 16 | fourth << 24


def unpack(packed: Packed, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 [N, P], the codebook int8 [2^b, d] and scales [N, G]: the inverse of `pack`."""
    apart = packed.weight[: kind.n, :, None] >> _shifts(kind, packed.weight.device) & 2**kind.code_bits - 1
    codes = apart.flatten(1)[:, : -(-kind.k // kind.columns)].contiguous()
    # the other codes of these bytes are zeros, and come after
    book = packed.book[:, : 2**kind.code_bits]
    shown = (0, 16) if kind.width == 2 else (0, 16, 8, 24)
    numbers = torch.stack([(word >> shift & 255) - 128 for word in book for shift in shown], dim=1)
    return codes, numbers[:, : kind.columns].to(torch.int8), packed.scales[:, : kind.n].T.contiguous()


class Weight(NamedTuple):
    """A packed weight."""

    operands: Packed
    kind: Kind

    def pointers(self) -> dict[str, Any]:
        """Return the arguments that every kernel takes for the weight."""
        codes, book, scales = self.operands
        return {
            "w_ptr": codes,
            "t_ptr": book,
            "s_ptr": scales,
            "stride_wn": codes.stride(0),
            "stride_sg": scales.stride(0),
        }

    def constants(self, most_codes: int = 64) -> dict[str, Any]:
        """Return the compile-time arguments that every kernel takes, for chunks of up to `most_codes` codes."""
        kind = self.kind
        codes = min(most_codes, kind.chunk // kind.width)
        return {
            "D": kind.width,
            "ENTRIES": self.operands.book.shape[1],
            "CODES": codes,
            "GROUP": 0 if kind.groups == 1 else kind.group_size,
            "EVEN_K": kind.k % (codes * kind.width) == 0,
        }


class Launch(NamedTuple):
    """How a kernel is launched."""

    kernel: Any  # the @triton.jit function
    tiles: tuple[int, ...]  # of the result, in programs
    splits: int  # of K
    arguments: dict[str, Any]  # those that the weight and the result do not give
    compiled: dict[str, Any]  # at compile time


def few_constants(weight: Weight, row: Few, m: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the compile-time arguments of the kernel for M = `m` tokens, at most four."""
    # 64 codes of two columns spilled
    return {"M": m, "BLOCK_N": row.block_n, "X": COMPUTE_DTYPES[dtype], **weight.constants(32)}


def row_constants(weight: Weight) -> dict[str, Any]:
    """Return the compile-time arguments of the kernel that dequantizes rows."""
    return {"BLOCK_N": many.BLOCK_N, "CHUNKS": many.CHUNKS, **weight.constants()}


def tile_constants(weight: Weight, row: Tile, dtype: torch.dtype) -> dict[str, Any]:
    """Return the compile-time arguments of the kernel for tiles: for the launcher and for the report."""
    interpreted = launch.interpreted(vectors_kernel)
    return {
        "BLOCK_M": row.block_m,
        "BLOCK_N": row.block_n,
        "POST_SCALE": row.post_scale,
        # bfloat16 is wrong in the interpreter: see `tiling`
        "COMPUTE": COMPUTE_DTYPES[torch.float32 if interpreted and dtype == torch.bfloat16 else dtype],
        "ASM": not interpreted and torch.version.hip is None,
        **weight.constants(),
    }


def matmul(
    x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, kind: Kind, *, splits: int | None = None
) -> Tensor:
    """Return ``x @ w.T + bias`` as [M, N] in the dtype of x; accumulation is in float32.

    x float16 or bfloat16 [M, K] of any strides; packed the result of `pack`; bias [N], any real dtype, or None.
    `splits` sets over how many programs K is split, where a kernel does. ValueError says which argument does not fit.
    """
    weight = Weight(Packed(*packed), kind)
    _check(weight, x, bias)
    if not len(x):
        return x.new_empty((0, kind.n))
    x = x if x.stride(1) == 1 else x.contiguous()
    row = tables.for_device(NAME, x.device).pick(len(x), x.dtype)
    if row is None:
        return by_rows(x, weight, bias)
    return few(x, weight, bias, row, splits) if isinstance(row, Few) else tiled(x, weight, bias, row, splits)


def _check(weight: Weight, x: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless a kernel may assume the shapes, dtypes and devices of all three."""
    (codes, book, scales), kind = weight
    reason = refuses(kind, x.dtype)
    if reason is not None:
        raise ValueError(reason)
    words = max(1, kind.width // 4), 2 ** (kind.code_bits * kind.together)
    needs = (
        ("codes", codes, (kind.padded_n, kind.bytes), (torch.uint8,)),
        ("book", book, words, (torch.int32,)),
        ("scales", scales, (kind.groups, kind.padded_n), _SCALES),
    )
    for name, tensor, shape, dtypes in needs:
        fits = tensor.shape == shape and tensor.dtype in dtypes and tensor.is_contiguous()
        if not fits or tensor.device != x.device:
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}; needs contiguous"
                f" {' or '.join(map(str, dtypes))} {list(shape)} on {x.device} for {kind}"
            )
    if x.ndim != 2 or x.shape[1] != kind.k:
        raise ValueError(f"x {list(x.shape)}: needs [M, {kind.k}]")
    if bias is not None and (bias.shape != (kind.n,) or not bias.is_contiguous() or bias.device != x.device):
        raise ValueError(f"bias {list(bias.shape)} on {bias.device}: needs contiguous [{kind.n}] on {x.device}")
    if x.device.type == "cpu" and not launch.interpreted(vectors_kernel):
        raise ValueError("x: on cpu; Triton kernels need a GPU, or TRITON_INTERPRET=1 set before they are imported")


def few(x: Tensor, weight: Weight, bias: Tensor | None, row: Few, count: int | None = None) -> Tensor:
    """Return the product of one to four tokens, each contiguous, as sums without tensor cores; see `vector_sums`."""
    compiled = few_constants(weight, row, len(x), x.dtype)
    tiles = -(-weight.kind.n // row.block_n)
    if count is None:
        chunks = -(-weight.kind.k // (compiled["CODES"] * compiled["D"]))
        programs = WARPS_PER_PROCESSOR // row.num_warps
        count = splits.split_count(tiles, chunks, launch.processors(x.device), programs)
    options = {"two_23_bits": TWO_23_BITS, "num_warps": row.num_warps}
    words = _in_words(x, weight.kind.width)
    return _run(words, weight, bias, Launch(few_vectors_kernel, (tiles,), count, options, compiled), x.dtype)


def _in_words(x: Tensor, width: int) -> Tensor:
    """Return x as numbers that hold two activations each, or four where a byte has more than two columns.

    A copy, with zeros up to whole bytes, where the words of a row would not lie at multiples of their size.
    """
    word = torch.int32 if width == 2 else torch.int64
    held, (m, k) = word.itemsize // x.itemsize, x.shape
    if k % width or x.stride(0) % held or x.storage_offset() % held or x.data_ptr() % word.itemsize:
        whole = x.new_zeros(m, k + -k % width)
        whole[:, :k] = x
        x = whole
    return x.view(word)


def tiled(x: Tensor, weight: Weight, bias: Tensor | None, row: Tile, count: int | None = None) -> Tensor:
    """Return the product of some tokens, each contiguous, in tiles on tensor cores; see `vector_tiles`."""
    m = len(x)
    compiled = tile_constants(weight, row, x.dtype)
    tiles = -(-weight.kind.n // row.block_n), -(-m // row.block_m)
    if count is None:
        chunks = -(-weight.kind.k // weight.kind.chunk)
        count = splits.split_count(tiles[0] * tiles[1], chunks, launch.processors(x.device))
    options = {"M": m, "num_warps": row.num_warps, "num_stages": row.num_stages}
    return _run(x, weight, bias, Launch(vectors_kernel, tiles, count, options, compiled), x.dtype)


def _run(x: Tensor, weight: Weight, bias: Tensor | None, how: Launch, dtype: torch.dtype) -> Tensor:
    """Return the product in `dtype`, K split over several programs if that was asked for."""
    chunks = -(-weight.kind.k // (how.compiled["CODES"] * how.compiled["D"]))
    per_split, count = splits.divide(chunks, how.splits)
    out = torch.empty((len(x), weight.kind.n), dtype=dtype, device=x.device)
    target = splits.target(out, count)
    grid = (*how.tiles, count)
    with launch.on(x.device):
        how.kernel[grid](
            x_ptr=x,
            b_ptr=bias if count == 1 else None,
            o_ptr=target,
            N=weight.kind.n,
            K=weight.kind.k,
            chunks=chunks,
            chunks_per_split=per_split,
            stride_xm=x.stride(0),
            **weight.pointers(),
            **how.arguments,
            **launch.COMPILE_OPTIONS,
            **how.compiled,
        )
        if count > 1:
            splits.add(target, bias, out)
    return out


def dequantize(weight: Weight, first: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Return rows `first` to `first + rows` of the weight, [rows, K] in `dtype`, rounded once."""
    scales, kind = weight.operands.scales, weight.kind
    out = torch.empty((rows, kind.k), dtype=dtype, device=scales.device)
    chunks = -(-kind.k // kind.chunk)
    with launch.on(scales.device):
        dequantize_vectors_kernel[(-(-rows // many.BLOCK_N), -(-chunks // many.CHUNKS))](
            o_ptr=out,
            N=rows,
            K=kind.k,
            first=first,
            chunks=chunks,
            two_23_bits=TWO_23_BITS,
            num_warps=many.NUM_WARPS,
            **weight.pointers(),
            **launch.COMPILE_OPTIONS,
            **row_constants(weight),
        )
    return out


def by_rows(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return the product of many tokens: dequantized, some rows at a time, and multiplied by PyTorch; see `many`."""
    n = weight.kind.n
    bias = None if bias is None else bias.to(x.dtype)
    step = max(TILE_N, many.SLAB // weight.kind.k // TILE_N * TILE_N)
    if n <= step:
        return linear(x, dequantize(weight, 0, n, x.dtype), bias)
    out = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
    for first in range(0, n, step):
        end = min(n, first + step)
        part = None if bias is None else bias[first:end]
        out[:, first:end] = linear(x, dequantize(weight, first, end - first, x.dtype), part)
    return out
