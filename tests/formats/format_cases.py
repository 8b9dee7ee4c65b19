"""Random packed layers for the tests of formats."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from llmq.formats import FORMATS
from llmq.grids.uniform import UniformGrid
from llmq.types import QuantizedWeight, QuantSpec

VERSION_1 = ("gptq", "auto-round")  # they store zero - 1
AS_GPTQ = (*VERSION_1, "gptq_v2", "auto-round-v2")
BITS = {**dict.fromkeys(AS_GPTQ, (2, 3, 4, 8)), "awq": (4,)}  # others: 2 to 8


def bits_of(name: str) -> tuple[int, ...]:
    """Return the widths that format `name` holds."""
    return BITS.get(name, tuple(range(2, 9)))


def random_weight(
    spec: QuantSpec, n: int, k: int, seed: int = 0, *, lowest_zero: int | None = None, exact: bool = True
) -> QuantizedWeight:
    """Return a weight that uses every code and, unless symmetric, every zero from `lowest_zero` up.

    By default that is the lowest the format can store: 1 in version 1 of gptq, else 0. Scales are `exact` in all
    dtypes of files, or of bfloat16's range.
    """
    draw = torch.Generator().manual_seed(seed)
    shape = (n, spec.groups(k))
    if lowest_zero is None:
        lowest_zero = 1 if spec.format in VERSION_1 else 0
    codes = torch.randint(0, 2**spec.bits, (n, k), generator=draw).to(torch.uint8)
    low, high = (-16, 15) if exact else (-100, 100)
    scales = (torch.rand(shape, generator=draw) + 0.5) * 2.0 ** torch.randint(low, high, shape, generator=draw)
    scales = (scales * torch.where(torch.rand(shape, generator=draw) < 0.5, -1, 1)).bfloat16().float()
    zeros = torch.randint(lowest_zero, 2**spec.bits, shape, generator=draw).float()
    if spec.symmetric:
        zeros = torch.full(shape, 2.0 ** (spec.bits - 1))
    return QuantizedWeight(codes, scales, zeros, UniformGrid(spec.bits, spec.symmetric), spec.group_columns(k))


def assert_same(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    """Assert that two weights are the same in everything."""
    assert torch.equal(found.codes, expected.codes)
    assert found.codes.dtype == torch.uint8
    assert found.scales.dtype == found.zeros.dtype == torch.float32
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.zeros, expected.zeros)
    assert (found.grid.bits, found.grid.symmetric) == (expected.grid.bits, expected.grid.symmetric)
    assert found.group_size == expected.group_size
    assert torch.equal(found.dequantize(), expected.dequantize())


@st.composite
def layers(draw: st.DrawFn, name: str) -> tuple[QuantSpec, int, int, int]:
    """Return (spec, N, K, seed) of a layer that format `name` takes."""
    group_size = draw(st.sampled_from([32, 64, 128, 16, 48, 1, -1]))
    k = {16: 32, 48: 96, 1: 32, -1: 32}.get(group_size, group_size) * draw(st.integers(1, 3))
    n = 32 * draw(st.integers(1, 3))
    if name not in AS_GPTQ:
        n = draw(st.sampled_from([8, 24, 40])) if name == "awq" else draw(st.integers(1, 40))
        odd = [(7, 21), (-1, 33), (-1, 5), (5, 20), *([(7, 19), (16, 33), (20, 23)] if name == "llmq" else [])]
        group_size, k = draw(st.sampled_from([(group_size, k), *odd]))
    if name.endswith("padded"):
        # of as many words as a stream has, these would be read as one
        k = k + 32 - k % 32 if group_size == -1 else group_size * 32
    spec = QuantSpec(draw(st.sampled_from(bits_of(name))), group_size, draw(st.booleans()), name)
    assert FORMATS[name].refuses(spec, n, k) is None
    return spec, n, k, draw(st.integers(0, 999))
