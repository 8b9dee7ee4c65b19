"""GPTQ against the textbook, in float64, and against what is known about it."""

import importlib
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from column_loop import eager_block
from gptq_reference import Trace, damped, gptq_u_form
from obq_reference import down_date, obq_fixed_order, obq_greedy, optimum
from order_reference import visit
from solver_cases import assert_same, assert_same_but_for_a_tie, correlated, different_rows, losses
from torch import Tensor

from llmq.block_sweep import Block
from llmq.errors import SolverError
from llmq.grids.uniform import UniformGrid
from llmq.hessian import all_finite, factorize
from llmq.solvers.gptq import gptq
from llmq.solvers.rtn import rtn
from llmq.types import Affine, Grid, QuantizedWeight

# the package gives its name to the function, so that the module is found only by importing it
sweep_module = importlib.import_module("llmq.solvers.sweep")

every_order = pytest.mark.parametrize("order", ["natural", "act", "group", "pivot"])
both_signs = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
U = 2.0**-24


def comparable(h: Tensor, damp_percent: float, w: Tensor, trace: Trace) -> Tensor:
    """Return which rows of a float32 solver must equal the float64 `trace` in every code.

    As long as the codes agree, E = W - Q is known to both, and c_j = w_j + Σ E_i R_ij / R_jj differs only by the
    error of R, which is relatively K·u·κ(H̃) to first order (backward stable Cholesky), by that of a sum of K terms
    and by a few roundings of w_j. In steps: u·(K·(κ + 1)·moved + 4·max|w|/s). Where the trace keeps farther than that
    from every tie, induction over the columns gives equal codes.
    """
    kappa = torch.linalg.cond(damped(h, damp_percent)).item()
    largest = (
        w.double().abs()
        / trace.scales.abs().repeat_interleave(-(-w.shape[1] // trace.scales.shape[1]), 1)[:, : w.shape[1]]
    ).amax(1)
    return trace.margin > U * (w.shape[1] * (kappa + 1) * trace.moved + 4 * largest)


def assert_follows(found: QuantizedWeight, trace: Trace, rows: Tensor) -> None:
    assert rows.sum() >= 0.4 * len(rows), "too few rows are clear of ties to tell anything"
    assert torch.equal(found.codes[rows].double(), trace.codes[rows])
    assert torch.equal(found.scales[rows].double(), trace.scales[rows])
    assert torch.equal(found.zeros[rows].double(), trace.zeros[rows])


CASES = [  # N, K, group size, bits, damping
    (16, 1, 1, 4, 0.01),
    (16, 5, 5, 2, 0.01),
    (24, 24, 8, 3, 0.05),
    (24, 33, 11, 4, 0.01),
    (24, 40, 40, 4, 0.001),
    (24, 48, 16, 2, 0.01),
    (24, 48, 48, 3, 1.0),
    (24, 70, 32, 4, 0.1),
    (24, 96, 32, 3, 0.01),
]
every_case = pytest.mark.parametrize(("n", "k", "group_size", "bits", "damp"), CASES, ids=str)


@both_signs
@every_order
@every_case
def test_codes_are_those_of_the_textbook_and_of_obq(
    n: int, k: int, group_size: int, bits: int, damp: float, order: str, symmetric: bool
) -> None:
    w, h = correlated(n, k, seed=k)
    textbook = gptq_u_form(w, h, bits, symmetric, group_size, damp, order)
    obq = obq_fixed_order(w, h, bits, symmetric, group_size, damp, order)
    rows = comparable(h, damp, w, textbook)
    solution = gptq(w, h, UniformGrid(bits, symmetric), group_size, damp_percent=damp, order=order)
    assert (solution.damp_percent, solution.remedies) == (damp, ())
    assert_follows(solution.weight, textbook, rows)
    assert_follows(solution.weight, obq, rows)


@every_order
@pytest.mark.parametrize("leaf", [1, 5, 64])
@pytest.mark.parametrize(("k", "group_size"), [(160, 160), (160, 32), (100, 32), (33, 8), (31, 1)], ids=str)
def test_where_the_sweep_is_split_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, k: int, group_size: int, leaf: int, order: str
) -> None:
    w, h = correlated(12, k, seed=1)
    grid = UniformGrid(4, symmetric=False)
    usual = gptq(w, h, grid, group_size, order=order).weight
    monkeypatch.setattr(sweep_module, "_LEAF", leaf)
    assert_same_but_for_a_tie(usual, gptq(w, h, grid, group_size, order=order).weight)


def through_codes() -> type[UniformGrid]:
    """Return a uniform grid that the sweep does not know to have equal steps."""

    class Opaque:
        def __init__(self, bits: int, symmetric: bool) -> None:
            self._grid = UniformGrid(bits, symmetric)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._grid, name)

    return cast(type[UniformGrid], Opaque)


@every_order
@both_signs
@pytest.mark.parametrize(("k", "group_size"), [(33, 8), (100, 32), (31, 1)], ids=str)
def test_steps_and_codes_say_the_same(k: int, group_size: int, symmetric: bool, order: str) -> None:
    # the sweep rounds to equal steps without making codes; any other grid it asks for codes and their values
    w, h = correlated(12, k, seed=k)
    a = gptq(w, h, UniformGrid(3, symmetric), group_size, order=order).weight
    b = gptq(w, h, through_codes()(3, symmetric), group_size, order=order).weight
    assert different_rows(a, b) == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_lowest_code_of_a_restricted_grid_is_not_used(symmetric: bool) -> None:
    w, h = correlated(24, 64, seed=1)
    found = gptq(w, h, UniformGrid(3, symmetric, "restricted"), 32).weight
    assert (int(found.codes.min()) == 1) == symmetric


@every_order
@pytest.mark.parametrize(("k", "group_size"), [(100, 32), (300, 300), (140, 7)], ids=str)
def test_a_block_kernel_is_given_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, k: int, group_size: int, order: str
) -> None:
    # on a GPU, leaves of up to 128 columns go to a kernel: here to the loop that the kernel is compared with
    w, h = correlated(12, k, seed=1)
    grid = UniformGrid(4, symmetric=False)
    usual = gptq(w, h, grid, group_size, order=order).weight
    blocks: list[int] = []

    def spy(block: Block, scales: Tensor, zeros: Tensor, grid: Grid) -> None:
        blocks.append(len(block.w))
        eager_block(block, scales, zeros, grid)

    monkeypatch.setattr(sweep_module, "runs_on", lambda device, grid: True)
    monkeypatch.setattr(sweep_module, "cuda_block", spy)
    assert_same_but_for_a_tie(usual, gptq(w, h, grid, group_size, order=order).weight)
    assert sum(blocks) == k
    assert max(blocks) <= 128


@every_order
def test_the_defaults_are_one_percent_damping_and_falling_energy(order: str) -> None:
    w, h = correlated(8, 40, seed=2)
    grid = UniformGrid(3, symmetric=True)
    usual = gptq(w, h, grid, 20)
    assert usual.damp_percent == 0.01
    same = gptq(w, h, grid, 20, damp_percent=0.01, order=order).weight
    assert torch.equal(usual.weight.codes, same.codes) == (order == "act")


@every_order
@pytest.mark.parametrize("k", [33, 96])
def test_loss_is_a_sum_over_columns(k: int, order: str) -> None:
    # L = Σ (c_j - q_j)² R_jj² = ‖E R‖² = tr(E H̃ Eᵀ), the first as 1/U_jj² in the reference
    w, h = correlated(16, k, seed=3)
    columns = visit(h, order, k)
    factor = factorize(h[columns][:, columns], 0.01)
    assert factor is not None
    found = gptq(w, h, UniformGrid(3, symmetric=True), k, order=order).weight
    e = w.double() - found.dequantize().double()
    by_trace = losses(w, damped(h, 0.01), found)
    by_factor = (e[:, columns] @ factor.r.double()).square().sum(1)
    torch.testing.assert_close(by_trace, by_factor, rtol=4 * k * U, atol=0)
    textbook = gptq_u_form(w, h, 3, True, k, 0.01, order)
    rows = comparable(h, 0.01, w, textbook)
    assert rows.any()
    # two float64 routes to the same number: an inverse and its Cholesky, conditions of 1e3
    torch.testing.assert_close(by_trace[rows], textbook.loss[rows], rtol=1e-9, atol=0)


@dataclass(frozen=True)
class Steps:
    """Whole multiples of one step, far enough that nothing is clipped; remembers what it was asked to round."""

    step: float = 1.0
    bits: int = 8
    symmetric: bool = True
    learns: bool = False
    tables: None = None
    seen: list[Tensor] = field(default_factory=list)

    def fit(self, w: Tensor, weight: Tensor | None = None) -> Affine:
        return Affine(torch.full((len(w), 1), self.step), torch.full((len(w), 1), 128.0))

    def storable(self, scale: Tensor) -> Tensor:
        return scale

    def encode(self, w: Tensor, at: Affine) -> Tensor:
        self.seen.append(w.clone())
        codes = torch.round(w / at.scale) + at.zero
        assert codes.min() >= 0
        assert codes.max() <= 255
        return codes.to(torch.uint8)

    def decode(self, codes: Tensor, at: Affine) -> Tensor:
        return (codes.float() - at.zero) * at.scale


TWO_BY_TWO = torch.tensor([[2.0, 1.0], [1.0, 2.0]])


def test_published_two_by_two() -> None:
    # For w = (.4, 1.3): RTN (0, 1) .74, GPTQ (0, 2) .74, optimum (1, 1) .54. Without damping the second
    # target is 1.5, a tie; with it 1.3 + .4 / 2.002, so the solver gets 1.31 for the same answer.
    row = torch.tensor([0.4, 1.3], dtype=torch.float64)
    best, loss = optimum(row, TWO_BY_TWO, torch.arange(-1.0, 4.0, dtype=torch.float64))
    assert best.tolist() == [1.0, 1.0]
    assert loss == pytest.approx(0.54)
    w = torch.tensor([[0.4, 1.31]])
    found = gptq(w, TWO_BY_TWO, Steps(), 2, damp_percent=0.001, order="natural").weight.dequantize()
    assert found.tolist() == [[0.0, 2.0]]
    assert rtn(w, None, Steps(), 2).weight.dequantize().tolist() == [[0.0, 1.0]]


def test_obq_steps_of_the_two_by_two() -> None:
    # By hand: rounding 0 first leaves (0, 1.5), rounding 1 first (.55, 1)
    inverse = torch.linalg.inv(TWO_BY_TWO.double())
    row = torch.tensor([0.4, 1.3], dtype=torch.float64)
    for q, rounded, expected in ((0, 0.0, [0.0, 1.5]), (1, 1.0, [0.55, 1.0])):
        assert (row - (row[q] - rounded) / inverse[q, q] * inverse[q]).tolist() == pytest.approx(expected)
    assert down_date(inverse, 0)[1, 1].item() == pytest.approx(1 / 2)  # the inverse of what is left of H


@every_order
def test_no_solver_beats_brute_force(order: str) -> None:
    equal = 0
    for seed in range(12):
        w, h = correlated(1, 5, seed)
        solution = gptq(w, h, UniformGrid(2, symmetric=False), 5, damp_percent=0.001, order=order)
        at = Affine(solution.weight.scales, solution.weight.zeros)
        levels = solution.weight.grid.decode(torch.arange(4, dtype=torch.uint8)[None], at)[0].double()
        _, best = optimum(w[0], h, levels)
        greedy = obq_greedy(w[0], h, levels)
        e = w[0].double() - greedy
        # float64 sums of 25 terms
        assert best <= losses(w, h, solution.weight).item() * (1 + 1e-12)
        assert best <= (e @ h.double() @ e).item() * (1 + 1e-12)
        equal += losses(w, h, solution.weight).item() <= best * (1 + 1e-12)
    assert equal  # the optimum is found in about a third of such problems


@every_order
@pytest.mark.parametrize("seed", range(5))
def test_loss_of_a_row_is_below_the_bound_of_the_nearest_plane(seed: int, order: str) -> None:
    # Each (c_j - q_j)² is at most s²/4 where nothing is clipped, hence L <= s²/4 · Σ R_jj².
    w, h = correlated(16, 64, seed)
    columns = visit(h, order, 64)
    factor = factorize(h[columns][:, columns], 0.01)
    assert factor is not None
    found = gptq(w, h, Steps(0.125), 64, order=order).weight
    bound = 0.25 * 0.125**2 * factor.r.double().diagonal().square().sum()
    loss = losses(w, damped(h, 0.01), found)
    assert (loss <= bound).all()
    # errors uniform between the ties cost a third of the bound on average
    assert loss.mean() / bound == pytest.approx(1 / 3, rel=0.2)


def test_columns_are_visited_by_falling_energy() -> None:
    energy = torch.tensor([3.0, 9.0, 1.0, 9.0, 0.5, 4.0])
    w = torch.tensor([[10.0, 11.0, 12.0, 13.0, 14.0, 15.0]])
    for order, expected in (
        ("act", [11, 13, 15, 10, 12, 14]),
        ("natural", [10, 11, 12, 13, 14, 15]),
        ("group", [11, 10, 13, 12, 15, 14]),
        ("pivot", [13, 11, 15, 10, 12, 14]),
    ):
        grid = Steps()
        gptq(w, torch.diag(energy), grid, 2, order=order)
        assert [target.item() for target in grid.seen] == expected


@pytest.mark.parametrize("order", ["act", "pivot"])
def test_in_mixed_order_groups_are_contiguous_and_placed_by_the_original_weights(order: str) -> None:
    w, h = correlated(8, 96, seed=4)
    grid = UniformGrid(4, symmetric=False)
    found = gptq(w, h, grid, 32, order=order).weight
    expected = rtn(w, None, grid, 32).weight
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.zeros, expected.zeros)
    # in the original order: far from its own column, a code stands for anything
    steps = (w - found.dequantize()).abs() / found.scales.repeat_interleave(32, dim=1)
    assert steps.median() < 1


def test_in_natural_order_groups_are_placed_by_corrected_weights() -> None:
    w, h = correlated(8, 96, seed=4)
    found = gptq(w, h, UniformGrid(4, symmetric=True), 32, order="natural").weight
    stale = rtn(w, None, UniformGrid(4, symmetric=True), 32).weight
    assert torch.equal(found.scales[:, 0], stale.scales[:, 0])
    assert (found.scales[:, 1:] != stale.scales[:, 1:]).float().mean() > 0.5


@every_order
def test_strong_damping_gives_rtn(order: str) -> None:
    # λ → ∞; damping by the whole mean diagonal at most, so the diagonal itself is made large
    w, h = correlated(8, 64, seed=5)
    grid = UniformGrid(4, symmetric=True)
    diagonal = h + 1e7 * torch.eye(64)
    assert_same(gptq(w, diagonal, grid, 32, order=order).weight, rtn(w, None, grid, 32).weight)


@every_order
def test_one_token_is_enough_to_solve(order: str) -> None:
    w, h = correlated(8, 64, seed=6, tokens=1)
    solution = gptq(w, h, UniformGrid(4, symmetric=True), 32, order=order)
    assert "round to nearest" not in solution.remedies
    assert losses(w, h, solution.weight).sum() < losses(w, h, rtn(w, None, solution.weight.grid, 32).weight).sum()


@every_order
def test_a_hessian_beyond_remedy_is_reported_and_descended_on(order: str) -> None:
    w, _ = correlated(8, 64, seed=7)
    h = torch.full((64, 64), 10.0).fill_diagonal_(1.0)
    solution = gptq(w, h, UniformGrid(4, symmetric=True), 32, order=order)
    assert solution.remedies == ("coordinate descent, no factorization",)
    assert solution.damp_percent == 0.0
    nearest = rtn(w, None, UniformGrid(4, symmetric=True), 32).weight
    assert torch.equal(solution.weight.scales, nearest.scales)
    assert (losses(w, h, solution.weight) <= losses(w, h, nearest)).all()


def test_remedies_of_the_factorization_are_passed_on() -> None:
    # rank one and exact: float32 sees a pivot of 0 at damping 1e-8, float64 does not
    x = torch.arange(1.0, 33.0)
    w, _ = correlated(4, 32, seed=8)
    solution = gptq(w, torch.outer(x, x), UniformGrid(4, symmetric=True), 32, damp_percent=1e-8)
    assert solution.damp_percent == 1e-8
    assert len(solution.remedies) == 1
    assert "float64" in solution.remedies[0]


@every_order
def test_the_damping_that_was_needed_is_reported(order: str) -> None:
    # ones on the diagonal and one eigenvalue of -0.05: 0.001 and 0.01 fail, 0.1 holds
    h = torch.full((32, 32), -1.05 / 31).fill_diagonal_(1.0)
    w, _ = correlated(4, 32, seed=8)
    solution = gptq(w, h, UniformGrid(4, symmetric=True), 32, damp_percent=0.001, order=order)
    assert solution.damp_percent == pytest.approx(0.1)
    assert len(solution.remedies) == 3


@every_order
def test_a_hessian_with_nan_is_an_error(order: str) -> None:
    w, h = correlated(4, 32, seed=9)
    h[3, 4] = float("nan")
    with pytest.raises(SolverError, match="Hessian"):
        gptq(w, h, UniformGrid(4, symmetric=True), 32, order=order)


def test_a_large_hessian_is_not_taken_for_infinite() -> None:
    large = torch.full((64, 64), 1e36)
    assert not large.sum().isfinite()
    assert all_finite(large)
    assert not all_finite(torch.tensor([1.0, float("nan")]))
    assert not all_finite(torch.tensor([float("inf"), -float("inf")]))


@every_order
def test_weights_with_nan_are_an_error(order: str) -> None:
    w, h = correlated(4, 32, seed=9)
    w[3, 4] = float("nan")
    with pytest.raises(SolverError):
        gptq(w, h, UniformGrid(4, symmetric=True), 32, order=order)
