"""Random packed weights for the native kernels, and how close their products have to be."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from llmq.formats import bits as bitstream
from llmq_kernels import naive
from llmq_kernels.native import build


def _lacking() -> str | None:
    """Return why nothing can be compiled here. That the source does not compile is no reason to skip a test."""
    try:
        build._compiler()
        build._processor_flag()
    except build.BuildError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(_lacking() is not None, reason=f"no native kernels: {_lacking()}")
# Of scripts that show where a kernel reads or writes: `at_the_end` copies a tensor to where memory ends, and what goes
# beyond kills the process.
AT_THE_END = """
import ctypes, mmap, torch
page, kept = mmap.PAGESIZE, []

def at_the_end(tensor):
    room = mmap.mmap(-1, 64 * page)
    kept.append(room)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + 63 * page), page, 0) == 0
    start = 63 * page - tensor.nbytes
    found = torch.frombuffer(room, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return found.copy_(tensor)
"""
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Packed:
    """A weight [N, K] as the native kernels take it, and what it stands for."""

    tensors: tuple[Tensor, Tensor, Tensor | None]  # words, scales, zeros
    dense: Tensor  # float64 [N, K]
    bits: int
    group_size: int


def random_packed(n: int, k: int, bits: int, group_size: int, symmetric: bool, seed: int = 0) -> Packed:
    """Return a weight of all codes, zeros from 0 to one past the last code, and scales of both signs."""
    draw = torch.Generator().manual_seed(seed)
    groups = (n, -(-k // group_size))
    codes = torch.randint(0, 2**bits, (n, k), generator=draw).to(torch.uint8)
    scales = (torch.rand(groups, generator=draw) + 0.5) * torch.where(torch.rand(groups, generator=draw) < 0.5, -1, 1)
    scales = (scales / 64).bfloat16().to(SCALE_DTYPES[seed % 3])
    zeros = torch.randint(0, 2**bits + 1, groups, generator=draw)
    if symmetric:
        zeros = torch.full(groups, 2 ** (bits - 1))
    dense = naive.dequantize(codes, scales, zeros, group_size, torch.float64)
    stored = None if symmetric else zeros.to(torch.uint8 if bits < 8 else torch.int16)
    return Packed((bitstream.pack(codes, bits), scales, stored), dense, bits, group_size)


def assert_product(y: Tensor, x: Tensor, weight: Packed, bias: Tensor | None, *, rounded: bool) -> None:
    """Fail unless each y is as close to ``x wᵀ + bias`` as sums in float32 have to be.

    A sum of 8 lanes or more of K products is off by at most ``(K / 8 + 12) u`` of the sum of their magnitudes, u being
    2^-24: every product passes K / 8 additions, 3 of lanes, 4 of a tile's reduction, and up to 5 roundings of the
    weight, scale and bias. Weights that are `rounded` to bfloat16 add 2^-8 of it, and the result's rounding its share.
    """
    assert y.shape == (len(x), weight.dense.shape[0])
    assert y.dtype == x.dtype
    exact, size = x.double() @ weight.dense.T, x.double().abs() @ weight.dense.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    of_sum = (x.shape[1] / 8 + 12) * 2**-24 + (2**-8 if rounded else 0)
    result = torch.finfo(y.dtype)
    allowed = of_sum * size + (exact.abs() + of_sum * size) * result.eps / 2 + result.tiny * result.eps
    off = (y.double() - exact).abs()
    # written so that NaN fails
    assert bool((off <= allowed).all()), f"off by up to {(off / allowed).max().item():.2f} of what is allowed"
