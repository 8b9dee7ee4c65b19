"""What the Triton weight-only kernels share: packed operands, tile sizes, split K, and the launch.

Each kernel computes one tile of the *transposed* product, ``out.T[BLOCK_N, BLOCK_M] = w @ x.T``. With the
weights on the left, Triton feeds Hopper's wgmma from registers even for a batch tile of 16 (it wants 64
rows on the left), so the unpacked weights never travel back through shared memory. A kernel walks along K
in *chunks*, as many columns as one step of its loop takes; `pack` pads N and K to whole tiles, because
masks on weight loads would break their 128-bit vectors.

When there are too few tiles to fill the GPU, K is split over several programs. Their float32 partial sums are
added by a second kernel: deterministic, unlike atomics, and without a buffer to be zeroed first.

Letters: N outputs, K inputs, G groups per row, M tokens; Np and Kp are N and K padded, Gp groups cover Kp
columns.
"""

# Kernels are not Python to be type-checked; everything else here is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_N = 128  # rows that `pack` pads to: every BLOCK_N of the tables divides it

COMPUTE_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# Triton 3.9 warns when this is left open, because 3.10 changes the default.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


class Packed(NamedTuple):
    """The operands of a kernel; ``Packed(*tensors)`` restores what `tensors` flattened."""

    weight: Tensor  # words [Np, Kp / columns per word], Kp contiguous
    scales: Tensor  # [Gp, Np] in the dtype of the activations: one vector load per group
    zeros: Tensor | None = None  # like scales, with what the kernel adds to codes added; None: symmetric

    def tensors(self) -> list[Tensor]:
        """Return the operands as a flat list, two tensors or three."""
        return [t for t in self if t is not None]


@dataclass(frozen=True)
class Config:
    """Tile sizes for one range of M."""

    max_m: int  # the last M that it is for
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    post_scale: bool  # scale the float32 partial sums (else each weight, rounding it to 16 bits)


@dataclass(frozen=True)
class Layout:
    """How one kernel lays out K, and the tile sizes that it was compiled and inspected with."""

    kernel: Any  # the @triton.jit function
    bits: int
    word: torch.dtype  # of the packed weight
    columns_per_word: int
    configs: tuple[Config, ...]  # by increasing max_m; the last one takes any M

    def chunk(self, k: int, group_size: int) -> int:
        """Return the number of columns per step of the loop: the largest that keeps its groups simple."""
        if self.bits == 4:
            # Half a chunk may be a group of its own. A quarter, 16 columns, is the least that tl.dot takes.
            return 128 if group_size == k or group_size % 128 == 0 else 64
        # 128 bytes per step spilled at BLOCK_M 128 on sm_80.
        return 64 if group_size == k or group_size % 64 == 0 else 32

    def config(self, m: int, dtype: torch.dtype) -> Config:
        """Return the tile sizes for M tokens of `dtype`."""
        # Without tensor cores, float32 spills kilobytes at the larger tiles.
        configs = self.configs if dtype.itemsize == 2 else self.configs[:2]
        return next((c for c in configs if m <= c.max_m), configs[-1])

    def constants(self, config: Config, dtype: torch.dtype, k: int, group_size: int) -> dict[str, Any]:
        """Return the compile-time arguments of the kernel: for the launcher and for the SASS report."""
        chunk = self.chunk(k, group_size)
        compute = torch.float32 if interpreted(self.kernel) and dtype == torch.bfloat16 else dtype
        return {
            "GROUP": 0 if group_size == k else group_size,
            "CHUNK": chunk,
            "EVEN_K": k % chunk == 0,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "POST_SCALE": config.post_scale,
            # Triton's interpreter (3.6 to 3.9) silently computes on the bit patterns of bf16: upcast there.
            "COMPUTE": COMPUTE_DTYPES[compute],
            "ASM": compute.itemsize == 2 and not interpreted(self.kernel) and torch.version.hip is None,
        }


def interpreted(kernel: Any) -> bool:
    """Return whether `kernel` runs in Triton's interpreter (TRITON_INTERPRET was set when it was defined)."""
    return not isinstance(kernel, triton.JITFunction)


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
    if dtype not in COMPUTE_DTYPES:
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


def split_count(tiles: int, chunks: int, processors: int) -> int:
    """Return over how many programs to split the `chunks` of K, for `tiles` output tiles on `processors` SMs.

    Two programs per SM hide each other's latency. Each keeps at least four chunks, or the pipeline never
    fills; above 8 splits the partial sums (8 bytes per output and split) cost as much as they gain.
    """
    wanted = -(-2 * processors // tiles)
    return max(1, min(wanted, chunks // 4, 8))


def matmul(
    layout: Layout,
    x: Tensor,
    packed: Sequence[Tensor | None],
    bias: Tensor | None,
    n: int,
    k: int,
    group_size: int,
    *,
    splits: int | None = None,
) -> Tensor:
    """Return ``x @ w.T + bias`` as [M, N] in the dtype of x; accumulation is in float32.

    x [M, K] of any strides, in the dtype that `packed` was packed for; packed as its `pack` returned it, or
    the flat list of its tensors; bias [N], any real dtype, or None. `splits` sets over how many programs K
    is split; by default enough to fill the GPU. ValueError says which argument does not fit.
    """
    weight, scales, zeros = _check(layout, x, packed, bias, n, k, group_size)
    m = x.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()

    config = layout.config(m, x.dtype)
    constants = layout.constants(config, x.dtype, k, group_size)
    chunks = -(-k // constants["CHUNK"])
    tiles_n, tiles_m = -(-n // config.block_n), -(-m // config.block_m)
    if splits is None:
        splits = split_count(tiles_n * tiles_m, chunks, _processors(x.device))
    chunks_per_split = -(-chunks // splits)
    splits = -(-chunks // chunks_per_split)  # no split without chunks
    whole = splits == 1
    target = out if whole else torch.empty((splits, m, n), dtype=torch.float32, device=x.device)

    # Triton launches on the current device, not on that of its arguments.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        layout.kernel[(tiles_n, tiles_m, splits)](
            x_ptr=x,
            w_ptr=weight,
            s_ptr=scales,
            z_ptr=zeros,
            b_ptr=bias if whole else None,
            o_ptr=target,
            M=m,
            N=n,
            K=k,
            chunks=chunks,
            chunks_per_split=chunks_per_split,
            stride_xm=x.stride(0),
            stride_wn=weight.stride(0),
            stride_sg=scales.stride(0),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **COMPILE_OPTIONS,
            **constants,
        )
        if not whole:
            block = 1024
            add_splits_kernel[(-(-m * n // block),)](
                p_ptr=target, b_ptr=bias, o_ptr=out, total=m * n, N=n, SPLITS=splits, BLOCK=block, **COMPILE_OPTIONS
            )
    return out


@triton.jit
def add_splits_kernel(p_ptr, b_ptr, o_ptr, total, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the partial sums p [SPLITS, M, N] float32 and the bias b [N]; store o [M, N]; total = M * N."""
    o_i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_i < total
    b_acc = tl.zeros((BLOCK,), tl.float32)
    p_p = p_ptr + o_i
    for _ in tl.static_range(SPLITS):
        b_acc += tl.load(p_p, mask=mask, other=0.0)
        p_p += total
    if b_ptr is not None:
        b_acc += tl.load(b_ptr + o_i % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(o_ptr + o_i, b_acc.to(o_ptr.dtype.element_ty), mask=mask)


def _padded(layout: Layout, k: int, group_size: int) -> tuple[int, int]:
    """Return Kp, and the number of groups Gp that cover it."""
    chunk = layout.chunk(k, group_size)
    padded_k = k + -k % chunk
    return padded_k, 1 if group_size == k else -(-padded_k // group_size)


def _check(
    layout: Layout,
    x: Tensor,
    packed: Sequence[Tensor | None],
    bias: Tensor | None,
    n: int,
    k: int,
    group_size: int,
) -> Packed:
    """Return the operands by name; raise ValueError unless the kernel may assume their shapes and dtypes."""
    operands = Packed(*packed)  # type: ignore[arg-type]  # only the zeros may be None, checked below
    reason = refuses(layout, n, k, layout.bits, group_size, x.dtype)
    if reason is not None:
        raise ValueError(f"weight [{n}, {k}]: {reason}")
    padded_k, groups = _padded(layout, k, group_size)
    padded_n = n + -n % TILE_N
    needs = (
        ("weight", operands.weight, (padded_n, padded_k // layout.columns_per_word), layout.word),
        ("scales", operands.scales, (groups, padded_n), x.dtype),
        ("zeros", operands.zeros, (groups, padded_n), x.dtype),
    )
    for name, tensor, shape, dtype in needs:
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: {tensor.dtype} {list(tensor.shape)}; needs contiguous {dtype} {list(shape)}"
                f" for an [{n}, {k}] weight with group_size {group_size} and {x.dtype} activations"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, but x is on {x.device}")
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x {list(x.shape)}: needs [M, {k}]")
    if bias is not None and (bias.shape != (n,) or not bias.is_contiguous() or bias.device != x.device):
        raise ValueError(f"bias {list(bias.shape)} on {bias.device}: needs contiguous [{n}] on {x.device}")
    if x.device.type == "cpu" and not interpreted(layout.kernel):
        raise ValueError("x: on cpu; Triton kernels need a GPU, or TRITON_INTERPRET=1 set before they are imported")
    return operands


@lru_cache
def _processors(device: torch.device) -> int:
    """Return the number of SMs of `device`; 1 in the interpreter, where splitting gains nothing."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
