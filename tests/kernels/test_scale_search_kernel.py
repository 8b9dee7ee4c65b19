"""The kernel that searches for scales against `naive`, in the interpreter (or on a GPU, with TRITON_INTERPRET=0)."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE
from torch import Tensor

from llmq import gpu as gpus
from llmq.errors import SolverError
from llmq.grids.uniform import UniformGrid
from llmq.scale_search import runs_on
from llmq.scale_search import search as search_on_gpu
from llmq.solvers import placing
from llmq.types import Affine, Grid
from llmq_kernels import naive, scale_search
from llmq_kernels.scale_search import Levels, Operands

U = 2.0**-24
SPANS = [1 - 0.02 * step for step in range(35)]
FEW = [1.0, 0.9, 0.7, 0.55, 0.4]  # the interpreter takes some 3 ms per span and tile
KINDS = ("asym", "full", "gptq", "restricted")


def levels(bits: int, kind: str) -> Levels:
    """Return the grid of `bits` bits as the kernel needs it; `kind` is its symmetric range, or "asym"."""
    half, top = 2 ** (bits - 1), 2**bits - 1
    steps = {"asym": top, "full": -half, "gptq": top / 2, "restricted": half - 1}[kind]
    return Levels(int(kind == "restricted"), top, kind != "asym", steps, 2.0**-17, 65280.0)


def operands(n: int, k: int, seed: int, spans: list[float], exact: bool = False) -> Operands:
    """Return weights with heavy tails, and importances over three decades, some 0.

    If `exact`, all that a sum adds up are multiples of one power of two below 2**24 times that: no order rounds.
    """
    draw = torch.Generator().manual_seed(seed)
    if exact:
        w = torch.randint(-64, 65, (n, k), generator=draw) / 2**6
        weight = torch.randint(0, 4, (k,), generator=draw).float()
    else:
        w = torch.randn(n, k, generator=draw) * torch.rand(n, k, generator=draw).pow(-0.5)
        weight = 10 ** (3 * torch.rand(k, generator=draw)) * (torch.rand(k, generator=draw) > 0.1)
    return Operands(w.to(DEVICE), weight.to(DEVICE), torch.tensor(spans, device=DEVICE))


def search(found: Operands, grid: Levels, group_size: int, norm: float = 2.0) -> tuple[Tensor, Tensor]:
    """Return scales and zeros; every one is written, since memory is NaN before."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs).fill_(-7.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale_search.torch, "empty", poisoned)
        scales, zeros = scale_search.scale_search(found, grid, group_size, norm)
    groups = -(-found.w.shape[1] // group_size)
    assert scales.shape == zeros.shape == (len(found.w), groups)
    assert (zeros >= 0).all()
    return scales, zeros


def assert_is_best(found: Operands, grid: Levels, group_size: int, norm: float = 2.0) -> None:
    """Fail unless each placement is exactly one of those tried, and its error the least up to the order of a sum.

    Levels are exact. Their difference from w, its square, and the product with the weight round once each, the first
    counting twice, and a sum of S terms S times: 2 (S + 4) u of either error. A power by way of logarithms is off by
    norm |log2 e| u' ln 2 with u' at most 2**-22 for both functions: 2e-5 for |log2 e| < 30 and powers below 4.
    """
    tried_scales, tried_zeros, errors = naive.scale_search(*found, grid, group_size, norm)
    scales, zeros = search(found, grid, group_size, norm)
    same = (tried_scales == scales) & (tried_zeros == zeros)
    assert same.any(0).all()
    mine = torch.where(same, errors, torch.inf).amin(0)
    least = errors.amin(0)
    slack = 2 * (group_size + 4) * U + (0 if norm == 2 else 2e-5)
    assert (mine <= least * (1 + 2 * slack)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_best_of_all_spans_is_found(bits: int, kind: str) -> None:
    assert_is_best(operands(5, 45, bits, FEW), levels(bits, kind), 31)


@pytest.mark.parametrize("sign", [-1.0, 1.0], ids=["negative", "positive"])
@pytest.mark.parametrize("bits", [2, 8])
def test_groups_of_one_sign_span_zero_too(bits: int, sign: float) -> None:
    # 16 columns fill a tile: no zero stands beside them
    found = operands(200, 16, bits, FEW[:2])
    found = found._replace(w=sign * (found.w.abs() + 1))
    assert_is_best(found, levels(bits, "asym"), 16)


@settings(max_examples=15)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 70),
    size=st.integers(1, 70),
    bits=st.integers(2, 8),
    kind=st.sampled_from(KINDS),
    norm=st.sampled_from([2.0, 1.0, 2.4, 3.0]),
    seed=st.integers(0, 10**6),
)
def test_any_shape_is_searched(n: int, k: int, size: int, bits: int, kind: str, norm: float, seed: int) -> None:
    # few groups: each is a launch of the interpreter
    size = max(min(size, k), -(-k // 4))
    assert_is_best(operands(n, k, seed, FEW[:3]), levels(bits, kind), size, norm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_where_sums_are_exact_the_first_of_the_best_is_taken(bits: int, kind: str) -> None:
    # spans and steps that are powers of two leave scales with few bits
    found = operands(40, 32, bits, [0.25, 1.0, 0.5], exact=True)
    grid = levels(bits, kind)
    if kind != "full":
        grid = replace(grid, steps=2.0 ** (bits - 1))
    scales, zeros = search(found, grid, 16)
    tried_scales, tried_zeros, errors = naive.scale_search(*found, grid, 16, 2.0)
    first = (errors == errors.amin(0)).int().argmax(0, keepdim=True)
    assert torch.equal(scales, tried_scales.gather(0, first)[0])
    assert torch.equal(zeros, tried_zeros.gather(0, first)[0])


def test_the_first_of_equals_is_the_first_given() -> None:
    # without weight, nothing costs anything
    found = operands(3, 20, 0, [0.7, 1.0, 0.5])._replace(weight=torch.zeros(20, device=DEVICE))
    scales, zeros = search(found, levels(4, "asym"), 20)
    tried_scales, tried_zeros, _ = naive.scale_search(*found, levels(4, "asym"), 20, 2.0)
    assert torch.equal(scales, tried_scales[0])
    assert torch.equal(zeros, tried_zeros[0])


@pytest.mark.parametrize("size", [1, 16, 17, 1024, 1025, 2100])
def test_groups_may_be_wider_than_a_tile(size: int) -> None:
    assert_is_best(operands(5, size + 3 if size < 20 else size, size, FEW[:2]), levels(4, "asym"), size)


def test_more_rows_than_a_tile() -> None:
    assert_is_best(operands(300, 20, 0, FEW[:2]), levels(3, "full"), 16)


def test_columns_beside_a_group_do_not_count() -> None:
    found = operands(4, 24, 0, FEW)
    scales, zeros = search(found, levels(4, "asym"), 10)
    for group in range(3):
        at = slice(10 * group, min(10 * group + 10, 24))
        part = Operands(found.w[:, at], found.weight[at].contiguous(), found.spans)
        alone = search(part, levels(4, "asym"), part.w.shape[1])
        assert torch.equal(alone[0][:, 0], scales[:, group])
        assert torch.equal(alone[1][:, 0], zeros[:, group])


def test_a_weight_may_be_stored_by_columns_or_be_part_of_a_larger_one() -> None:
    found = operands(6, 20, 0, FEW)
    expected = search(found, levels(3, "full"), 8)
    larger = torch.full((8, 50), float("nan"), device=DEVICE)
    larger[1:-1, 5:25] = found.w
    for w in (found.w.T.contiguous().T, larger[1:-1, 5:25]):
        scales, zeros = search(found._replace(w=w), levels(3, "full"), 8)
        assert torch.equal(scales, expected[0])
        assert torch.equal(zeros, expected[1])


@pytest.mark.parametrize("size", [16, 1030])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e7], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_stored_is_marked_and_nothing_else(kind: str, bad: float, size: int) -> None:
    found = operands(3, size, 0, [1.0, 1e-7])  # shrunk so far, 3e7 would fit
    found.w[1, -1] = bad
    found.weight[-1] = 0  # so that the narrow span is best
    grid = levels(4, kind)
    scales, _ = search(found, grid, size)
    assert (scales.abs() <= grid.max_scale).squeeze(1).tolist() == [True, False, True]
    assert scales[1].isfinite().item() == (bad == 3e7)
    if bad == 3e7:
        assert scales[1].abs() == pytest.approx(3e7 / abs(grid.steps), rel=2.0**-8)


def test_no_rows_are_no_work() -> None:
    found = operands(3, 20, 0, FEW)
    scales, zeros = scale_search.scale_search(found._replace(w=found.w[:0]), levels(4, "full"), 8, 2.0)
    assert scales.shape == zeros.shape == (0, 3)


def test_more_groups_than_a_launch_has_are_refused() -> None:
    found = Operands(
        torch.zeros(1, 65536, device=DEVICE), torch.ones(65536, device=DEVICE), torch.ones(1, device=DEVICE)
    )
    with pytest.raises(ValueError, match="group_size 1: K = 65536 has more than 65535 groups of it"):
        scale_search.scale_search(found, levels(4, "full"), 1, 2.0)


def test_zeros_and_tiny_weights_have_a_scale() -> None:
    w = torch.tensor([[0.0, -0.0], [1e-9, -2e-9], [2e-9, 1e-9], [-(2.0**-126), 0.0]], device=DEVICE)
    found = Operands(w, torch.ones(2, device=DEVICE), torch.tensor([1.0, 0.5], device=DEVICE))
    for kind in KINDS:
        scales, _ = search(found, levels(4, kind), 2)
        tried, *_ = naive.scale_search(*found, levels(4, kind), 2, 2.0)
        assert torch.equal(scales, tried[0])
        assert scales[0].item() == 1.0
        assert (scales[1:].abs() == 2.0**-17).all()


def test_scales_halfway_between_two_are_rounded_to_the_even_one() -> None:
    w = torch.tensor([[-8 * (1 + 2.0**-8)], [-8 * (1 + 3 * 2.0**-8)], [8 * (1 + 2.0**-8)]], device=DEVICE)
    found = Operands(w, torch.ones(1, device=DEVICE), torch.ones(1, device=DEVICE))
    scales, _ = search(found, levels(4, "full"), 1)
    assert scales.flatten().tolist() == [1.0, 1 + 2.0**-6, -1.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: {"w": f.w[0]}, r"w: torch.float32 \[20\]; needs float32 \[N, K\]"),
        (lambda f: {"w": f.w.half()}, r"w: torch.float16 \[3, 20\]; needs float32"),
        (lambda f: {"weight": f.weight[:19]}, r"weight: torch.float32 \[19\]; needs contiguous float32 \[20\]"),
        (lambda f: {"weight": f.weight.repeat(2)[::2]}, r"weight: .* needs contiguous float32 \[20\]"),
        (lambda f: {"spans": f.spans.double()}, r"spans: torch.float64 \[5\]; needs contiguous float32 \[5\]"),
        (lambda f: {"spans": f.spans[:0]}, r"spans: torch.float32 \[0\]; needs contiguous float32 \[1\]"),
        (lambda f: {"weight": f.weight.to("meta")}, "weight: on meta, but w is on c"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: Any, reason: str) -> None:
    found = operands(3, 20, 0, FEW)
    with pytest.raises(ValueError, match=reason):
        scale_search.scale_search(found._replace(**change(found)), levels(4, "full"), 10, 2.0)


@pytest.mark.parametrize("size", [0, 21])
def test_group_sizes_that_do_not_fit_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"group_size {size}: needs 1 to K = 20"):
        scale_search.scale_search(operands(3, 20, 0, FEW), levels(4, "full"), size, 2.0)


def test_tiles_hold_as_many_weights_whatever_their_width() -> None:
    assert [scale_search.blocks(size) for size in (1, 16, 17, 128, 1024, 5000)] == [
        (256, 16),
        (256, 16),
        (128, 32),
        (32, 128),
        (4, 1024),
        (4, 1024),
    ]


GRIDS = [
    UniformGrid(4, symmetric=False),
    UniformGrid(2, symmetric=False),
    UniformGrid(3, symmetric=True),
    UniformGrid(5, symmetric=True, sym_range="gptq"),
    UniformGrid(8, symmetric=True, sym_range="restricted"),
]


def differences(found: list[Affine], expected: list[Affine]) -> int:
    """Return how many rows of groups are placed otherwise."""
    pairs = zip(found, expected, strict=True)
    return sum(int(((a.scale != b.scale) | (a.zero != b.zero)).sum()) for a, b in pairs)


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_all_groups_at_once_are_each_as_the_grid_fits_it(grid: UniformGrid, norm: float) -> None:
    w, weight, _ = operands(33, 90, 1, [1.0])
    at = search_on_gpu(grid, w, torch.diag(weight).diagonal(), 32, norm)  # as a Hessian has it: not contiguous
    found = [Affine(*pair) for pair in zip(at.scale.split(1, dim=1), at.zero.split(1, dim=1), strict=True)]
    parts = zip(w.split(32, dim=1), weight.split(32), strict=True)
    # Of 99 rows of groups one may have two spans within rounding of each other.
    assert differences(found, [grid.fit(part, share, norm=norm) for part, share in parts]) <= 1


@pytest.mark.parametrize(("scale_search_name", "norm"), [("hessian", 2.4), ("mse", 2.0), ("mse", 3.0)])
def test_solvers_go_through_the_kernel_once_per_weight(
    monkeypatch: pytest.MonkeyPatch, scale_search_name: str, norm: float
) -> None:
    grid, calls = GRIDS[0], []
    w, weight, _ = operands(6, 50, 2, [1.0])
    place = placing.placer(grid, scale_search_name, norm)
    expected = placing.place_all(place, w, weight, 16)

    def counted(grid: UniformGrid, w: Tensor, weight: Tensor, group_size: int, norm: float) -> Affine:
        calls.append((tuple(w.shape), group_size, norm))
        return search_on_gpu(grid, w, weight, group_size, norm)

    monkeypatch.setattr(placing, "runs_on", lambda device, grid: True)
    monkeypatch.setattr(placing, "search", counted)
    found = placing.place_all(place, w, weight, 16)
    assert differences(found, expected) == 0
    assert all(a.scale.shape == b.scale.shape for a, b in zip(found, expected, strict=True))
    used = 2.0 if scale_search_name == "hessian" else norm
    assert calls == [((6, 50), 16, used)]
    assert differences([place(w[:, 16:32], weight[16:32])], expected[1:2]) == 0
    assert calls[1:] == [((6, 16), 16, used)]
    plain = placing.placer(grid, "none", norm)
    assert differences(placing.place_all(plain, w, weight, 16), [grid.fit(part) for part in w.split(16, dim=1)]) == 0
    assert len(calls) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e7], ids=str)
@pytest.mark.parametrize("grid", GRIDS[::2], ids=str)
def test_a_weight_that_has_no_scale_is_refused(grid: UniformGrid, bad: float) -> None:
    w, weight, _ = operands(3, 20, 0, [1.0])
    w[2, 13] = bad
    with pytest.raises(SolverError, match="does not fit float16"):
        search_on_gpu(grid, w, weight, 8, 2.0)


def test_the_search_is_for_uniform_grids_on_gpus_that_triton_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert runs_on(torch.device("cuda"), GRIDS[0])
    assert not runs_on(torch.device("cuda"), cast(Grid, object()))
    assert not runs_on(torch.device("cpu"), GRIDS[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not runs_on(torch.device("cuda"), GRIDS[0])
