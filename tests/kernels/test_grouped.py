"""The grouped Triton kernel against `naive` in float64, in the interpreter (or on a GPU, with TRITON_INTERPRET=0)."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, random_weight, random_x
from tolerance import assert_close_to_float64
from torch import Tensor

from llmq_kernels import grouped, naive, routing, tables, w2a16, w4a16, w8a16
from llmq_kernels.layout import Packed

BITS = {w2a16: 2, w4a16: 4, w8a16: 8}
modules = pytest.mark.parametrize("module", [w2a16, w4a16, w8a16], ids=["w2a16", "w4a16", "w8a16"])
pytestmark = pytest.mark.usefixtures("poisoned_empty")


@dataclass(frozen=True)
class Bank:
    """Random experts, packed, and what they stand for."""

    experts: grouped.Experts
    dense: Tensor  # float64 [E, P, N, K]
    bias: Tensor  # [E * P, N]


def random_bank(
    module: ModuleType, count: int, parts: int, n: int, k: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> Bank:
    matrices = [random_weight(n, k, group_size, BITS[module], symmetric, seed) for seed in range(count * parts)]
    packed = [module.pack(w.codes, w.scales, w.stored_zeros, group_size, dtype).tensors() for w in matrices]
    operands = Packed(*(torch.stack(of) for of in zip(*packed, strict=True)))
    dense = [naive.dequantize(w.codes, w.scales, w.zeros, group_size, torch.float64) for w in matrices]
    experts = grouped.Experts(module.LAYOUT, operands, parts, n, k, group_size)
    bias = torch.stack([w.bias for w in matrices]).to(dtype)
    return Bank(experts, torch.stack(dense).view(count, parts, n, k), bias)


def check(bank: Bank, x: Tensor, picked: Tensor, *, biased: bool = True, count: int | None = None) -> Tensor:
    """Multiply, and fail unless the result is that of `naive`, with zeros where no expert is picked."""
    e, experts = bank.dense, bank.experts
    bias = bank.bias if biased else None
    y = grouped.matmul(x, experts, bias, routing.route(picked, experts.count), count=count)
    assert y.dtype == x.dtype
    truth = naive.grouped_matmul(x, e, None if bias is None else bias.view(*e.shape[:3]), picked)
    assert_close_to_float64(y, truth, experts.k)
    assert not y[picked >= experts.count].any()
    return y


shapes = st.sampled_from([(33, 128, 32), (48, 96, 32), (20, 192, 64), (130, 256, 128), (33, 80, 80), (17, 256, 256)])


@modules
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=shapes,
    count=st.integers(1, 7),
    parts=st.integers(1, 2),
    tokens=st.integers(0, 40),
    slots=st.integers(1, 3),
    kind=st.sampled_from(["any", "one", "some are none"]),
    symmetric=st.booleans(),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_rows_meet_their_experts(
    module: ModuleType,
    shape: tuple[int, int, int],
    count: int,
    parts: int,
    tokens: int,
    slots: int,
    kind: str,
    symmetric: bool,
    biased: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    n, k, group_size = shape
    bank = random_bank(module, count, parts, n, k, group_size, symmetric, dtype)
    draw = torch.Generator().manual_seed(seed)
    picked = torch.randint(0, count + (kind == "some are none"), (tokens * slots,), generator=draw)
    if kind == "one":
        picked = picked // count + seed % count
    check(bank, random_x(tokens, k, dtype), picked.to(DEVICE), biased=biased)


@modules
@pytest.mark.parametrize("rows_per_expert", [1, 20, 40, 70])
def test_every_tile_and_bfloat16(module: ModuleType, rows_per_expert: int) -> None:
    bank = random_bank(module, 3, 2, 33, 128, 64, False, torch.bfloat16)
    rows = 3 * rows_per_expert + (2 if rows_per_expert > 1 else 0)
    row = tables.for_device(module.LAYOUT.name, torch.device(DEVICE)).tile(rows_per_expert, torch.bfloat16)
    assert row.block_m == {1: 16, 20: 32, 40: 64, 70: 128}[rows_per_expert]
    picked = torch.randint(0, 3, (rows,), generator=torch.Generator().manual_seed(rows)).to(DEVICE)
    check(bank, random_x(rows, 128, torch.bfloat16), picked)


@pytest.mark.parametrize("rows", [9, 16, 17, 32])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_tiles_that_end_where_an_expert_does(rows: int, count: int) -> None:
    bank = random_bank(w8a16, count, 1, 16, 32, 32, True, torch.float32)
    x = random_x(rows, 32, torch.float32)
    for number in (0, count - 1, count):  # all rows to one expert, or to none; then shares of 16, and of any size
        check(bank, x, torch.full((rows,), number, device=DEVICE))
    check(bank, x, (torch.arange(rows, device=DEVICE) // 16).clamp(max=count))
    check(bank, x, torch.arange(rows, device=DEVICE).flip(0) ** 2 % (count + 1))


@modules
@pytest.mark.parametrize("count", [1, 2, 3])
def test_splitting_k_changes_nothing_but_rounding(module: ModuleType, count: int) -> None:
    bank = random_bank(module, 2, 2, 33, 32 * 11, 32, False, torch.float16)
    for rows in (4, 20):
        picked = torch.arange(rows, device=DEVICE) % 3
        check(bank, random_x(rows // 2, 32 * 11, torch.float16), picked, count=count)


@modules
def test_a_row_is_the_same_whoever_is_with_it(module: ModuleType) -> None:
    bank = random_bank(module, 2, 1, 33, 128, 64, False, torch.float16)
    x = random_x(24, 128, torch.float16)
    picked = torch.arange(24, device=DEVICE) % 2
    y = check(bank, x, picked)
    again = check(bank, x, picked)
    assert torch.equal(y, again)
    turned = check(bank, x.flip(0), picked.flip(0))
    assert torch.equal(turned.flip(0), y)


def test_what_lies_beyond_the_columns_is_not_read() -> None:
    bank = random_bank(w4a16, 2, 1, 33, 96, 96, False, torch.float16)
    padded = torch.full((10, 128), torch.nan, dtype=torch.float16, device=DEVICE)
    padded[:, :96] = random_x(10, 96, torch.float16)
    check(bank, padded[:, :96], torch.arange(10, device=DEVICE) % 2)


def test_activations_of_any_strides() -> None:
    bank = random_bank(w4a16, 2, 1, 33, 128, 64, False, torch.float16)
    wide = random_x(256, 256, torch.float16)
    for x in (wide[:128, :5].T, wide[:5, ::2], wide[3:8, 1:129], wide[:1, :128].expand(5, 128)):
        check(bank, x, torch.arange(10, device=DEVICE) % 2)


def test_nothing_is_sorted_where_rows_are_no_more_than_experts() -> None:
    assert routing.route(torch.zeros(8, dtype=torch.int64), 2).firsts is None
    assert routing.route(torch.zeros(60, dtype=torch.int64), 60).firsts is None
    routes = routing.route(torch.tensor([2, 0, 3, 0, 9, 2, 2, 0, 3]), 3)
    assert routes.firsts is not None
    assert routes.firsts.tolist() == [0, 3, 3, 6]
    assert routes.rows.tolist() == [1, 3, 7, 0, 5, 6, 2, 8, 4]


@modules
def test_a_bank_of_more_than_2_31_elements(module: ModuleType) -> None:
    # Matrices so far apart that the last begins beyond 2**31 elements; only pages that are written exist.
    bank = random_bank(module, 3, 1, 20, 64, 32, False, torch.float16)
    weight = bank.experts.operands.weight
    stride = 2**30 + 4096
    spread = torch.empty(2 * stride + weight[0].numel(), dtype=weight.dtype, device=DEVICE)
    far = spread.as_strided(weight.shape, (stride, *weight.stride()[1:])).copy_(weight)
    operands = bank.experts.operands._replace(weight=far)
    experts = grouped.Experts(module.LAYOUT, operands, 1, 20, 64, 32)
    for rows in (3, 12):
        picked = torch.arange(rows, device=DEVICE) % 3
        check(Bank(experts, bank.dense, bank.bias), random_x(rows, 64, torch.float16), picked)


def test_what_does_not_fit_is_named() -> None:
    bank = random_bank(w4a16, 2, 2, 33, 64, 32, False, torch.float16)
    x, e = random_x(4, 64, torch.float16), bank.experts
    weight, scales, zeros = e.operands
    assert zeros is not None
    of = grouped.Experts
    routes = routing.route(torch.zeros(4, dtype=torch.int64, device=DEVICE), 2)
    wrong = {
        "4 matrices; needs some for each expert, 3 each": (of(e.layout, e.operands, 3, 33, 64, 32), x, None),
        r"scales \[3, .*needs those of 4": (of(e.layout, Packed(weight, scales[:3], zeros), 2, 33, 64, 32), x, None),
        "zeros of strides": (of(e.layout, Packed(weight, scales, zeros[:1].expand(4, -1, -1)), 2, 33, 64, 32), x, None),
        "group_size 48": (of(e.layout, e.operands, 2, 33, 64, 48), x, None),
        r"x \[4, 32\]": (e, x[:, :32], None),
        r"x \[3, 64\]: 4 rows are not as many": (e, x[:3], None),
        "scales: torch.float16": (e, x.bfloat16(), None),
        r"bias \[2, 33\]": (e, x, bank.bias[:2]),
    }
    for message, (experts, rows, bias) in wrong.items():
        with pytest.raises(ValueError, match=message):
            grouped.matmul(rows, experts, bias, routes)
