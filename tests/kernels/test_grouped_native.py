"""Experts in one call of the native kernels: bit for bit what they are one by one, and close to float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import Packed, assert_product, needs_compiler, random_packed
from torch import Tensor

from llmq_kernels import naive, native
from llmq_kernels.native import build, grouped

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
pytestmark = [pytest.mark.usefixtures("poisoned_empty"), needs_compiler]


def bank(count: int, shape: tuple[int, int], bits: int, group_size: int, symmetric: bool, seed: int) -> list[Packed]:
    """Return matrices that differ in all but the dtype of their scales."""
    return [random_packed(*shape, bits, group_size, symmetric, seed + 3 * i) for i in range(count)]


def stacked(matrices: list[Packed]) -> tuple[Tensor, Tensor, Tensor | None]:
    words, scales, zeros = zip(*(m.tensors for m in matrices), strict=True)
    return torch.stack(words), torch.stack(scales), None if zeros[0] is None else torch.stack(zeros)


def check(matrices: list[Packed], parts: int, x: Tensor, picked: Tensor, bias: Tensor | None) -> None:
    """Multiply, and fail unless rows are bit for bit those of `native.matmul`, and those of float64."""
    bits, group_size = matrices[0].bits, matrices[0].group_size
    y = grouped.matmul(x, stacked(matrices), bias, picked, bits, group_size, parts=parts)
    n, experts, slots = matrices[0].dense.shape[0], len(matrices) // parts, len(picked) // max(1, len(x))
    assert y.shape == (len(picked), parts * n)
    assert y.dtype == x.dtype
    for expert in range(experts):
        rows = (picked == expert).nonzero().flatten()
        mine = x[rows // max(1, slots)]
        for part in range(parts):
            number = expert * parts + part
            added = None if bias is None else bias[number]
            alone = native.matmul(mine, matrices[number].tensors, added, bits, group_size)
            assert torch.equal(y[rows, part * n : (part + 1) * n], alone)
            assert_product(alone, mine, matrices[number], added, rounded=x.dtype == torch.bfloat16 and len(rows) > 4)
    assert not y[(picked < 0) | (picked >= experts)].any()


@pytest.mark.parametrize("bits", native.BITS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 37), st.integers(1, 200)),
    group_size=st.sampled_from([8, 32, 64, 96, 128, -1]),
    symmetric=st.booleans(),
    experts=st.integers(1, 6),
    parts=st.integers(1, 2),
    tokens=st.integers(0, 20),
    slots=st.integers(1, 3),
    kind=st.sampled_from(["any", "one", "some are none"]),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rows_are_those_of_one_by_one(
    bits: int,
    shape: tuple[int, int],
    group_size: int,
    symmetric: bool,
    experts: int,
    parts: int,
    tokens: int,
    slots: int,
    kind: str,
    dtype: torch.dtype,
    with_bias: bool,
    seed: int,
) -> None:
    n, k = shape
    matrices = bank(experts * parts, shape, bits, k if group_size < 0 else group_size, symmetric, seed)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=draw).to(dtype)
    picked = torch.randint(0, experts, (tokens * slots,), generator=draw)
    if kind == "one":
        picked[:] = seed % experts
    if kind == "some are none":
        picked = picked * 2 - 1
    bias = torch.randn(experts * parts, n, generator=draw).to(dtype) if with_bias else None
    check(matrices, parts, x, picked, bias)


def test_float64_of_a_whole_bank() -> None:
    matrices = bank(6, (20, 96), 4, 32, False, 0)
    x, bias = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)), torch.ones(6, 20)
    picked = torch.tensor([0, 1, 2, 0, 9, 2, 2, -1, 1, 1, 0, 2, 2, 2])
    y = grouped.matmul(x, stacked(matrices), bias, picked, 4, 32, parts=2)
    dense = torch.stack([m.dense for m in matrices]).view(3, 2, 20, 96)
    truth = naive.grouped_matmul(x, dense, bias.view(3, 2, 20), picked.where(picked >= 0, 3))
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_an_experts_tokens_are_taken_some_at_a_time(dtype: torch.dtype) -> None:
    matrices = bank(2, (5, 4500), 4, 4500, True, 0)  # activations of 126 tokens are more than 1 MiB
    x = torch.randn(140, 4500, generator=torch.Generator().manual_seed(0)).to(dtype)
    check(matrices, 1, x, torch.cat([torch.zeros(133, dtype=torch.int64), torch.ones(7, dtype=torch.int64)]), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_pytorch_is_faster_from_some_tokens_on(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(native, "_is_slow", lambda m, *_: asked.append(m) is None and m > 3)
    matrices = bank(4, (9, 64), 4, 32, False, 0)
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    slabs = []
    monkeypatch.setattr(native, "by_slabs", lambda *a, real=native.by_slabs: slabs.append(len(a[0])) or real(*a))
    bits, picked = 4, torch.tensor([0] * 9 + [1] * 2 + [5])
    y = grouped.matmul(x, stacked(matrices), torch.ones(4, 9), picked, bits, 32, parts=2)
    assert asked[0] == 12
    assert slabs == [9, 9]
    for part in (0, 1):
        assert_product(y[:9, 9 * part : 9 * part + 9], x[:9], matrices[part], torch.ones(9), rounded=True)
        assert_product(y[9:11, 9 * part : 9 * part + 9], x[9:11], matrices[2 + part], torch.ones(9), rounded=True)
    assert not y[11].any()


@pytest.mark.parametrize("path", [("-O1", "-mno-avx512bf16"), ("-O1", "-mno-avx512f")], ids=["no pairs", "narrow"])
def test_lesser_processors(path: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        kernels = build.load(3, path)
    except build.BuildError as error:
        pytest.skip(f"this compiler has no such path: {error}")
    monkeypatch.setattr(build, "library", lambda *_: kernels)
    for seed in range(8):
        matrices = bank(6, (1 + seed * 5 % 21, 1 + seed * 67 % 190), 3, [8, 32, 64][seed % 3], seed % 2 == 0, seed)
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(8, matrices[0].dense.shape[1], generator=draw).to(DTYPES[seed % 3])
        bits = matrices[0].bits
        picked = torch.randint(0, 4, (16,), generator=draw)
        y = grouped.matmul(x, stacked(matrices), None, picked, bits, matrices[0].group_size, parts=2)
        for row, expert in enumerate(picked.tolist()):
            n = matrices[0].dense.shape[0]
            for part in range(2):
                found = y[row : row + 1, part * n : (part + 1) * n]
                if expert < 3:
                    assert_product(found, x[row // 2][None], matrices[2 * expert + part], None, rounded=True)
                else:
                    assert not found.any()


def test_several_threads_and_strides() -> None:
    before = torch.get_num_threads()
    matrices = bank(8, (600, 512), 4, 128, False, 0)
    wide = torch.randn(20, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    picked = torch.arange(40) % 4
    try:
        torch.set_num_threads(1)
        alone = grouped.matmul(wide[:, ::2], stacked(matrices), None, picked, 4, 128, parts=2)
        torch.set_num_threads(3)
        for x in (wide[:, ::2], wide[:, ::2].contiguous()):
            assert torch.equal(grouped.matmul(x, stacked(matrices), None, picked, 4, 128, parts=2), alone)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_named() -> None:
    weight, x, picked = (
        stacked(bank(4, (9, 64), 4, 32, False, 0)),
        torch.randn(2, 64),
        torch.zeros(4, dtype=torch.int64),
    )
    for message, options in {
        "4 matrices and 4 rows": (x, weight, None, picked, 3),
        "4 rows of 3 tokens": (torch.randn(3, 64), weight, None, picked, 2),
        r"bias \[2, 9\]": (x, weight, torch.ones(2, 9), picked, 2),
        "picked torch.int32": (x, weight, None, picked.int(), 2),
        "scales": (x, (weight[0], weight[1][:, :, :1], weight[2]), None, picked, 2),
    }.items():
        with pytest.raises(ValueError, match=message):
            grouped.matmul(*options[:4], 4, 32, parts=options[4])
