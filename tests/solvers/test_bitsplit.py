"""Bit-split: the rule of a digit, the whole solver against its formulas, what it reaches and what it refuses."""

import pytest
import torch
from bitsplit_reference import best_of_three, coordinate, least_loss, solve_row
from solver_cases import correlated, losses
from torch import Tensor

from llmq.descent import begin, complete
from llmq.errors import SolverError
from llmq.grids import make_grid
from llmq.grids.uniform import UniformGrid
from llmq.solvers.admm import admm
from llmq.solvers.bitsplit import bitsplit, digit, digit_step, metric, scale_step, split
from llmq.types import QuantizedWeight

every_bits = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])


def problem(k: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a row [k] and the Hessian [k, k] of correlated inputs, float64."""
    x = torch.randn(2 * k, k, generator=draw, dtype=torch.float64) @ torch.randn(
        k, k, generator=draw, dtype=torch.float64
    )
    return torch.randn(k, generator=draw, dtype=torch.float64), x.T @ x


def test_the_rule_of_a_digit_is_brute_force_on_300_problems() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        k = int(torch.randint(1, 8, (), generator=draw))
        y, h = problem(k, draw)
        part = float(torch.rand((), generator=draw)) + 0.1
        q = torch.randint(-1, 2, (k,), generator=draw).double()
        a, s = part**2 * h, 2 * part * h @ y
        for j in range(k):
            best = best_of_three(a, s, q, j)
            assert coordinate(a, s, q, j) == best
            # and in the form of the solver: from the gradient of what there is
            assert digit(q[j] + ((y - part * q) @ h)[j] / (part * h[j, j])) == best


def start_of(bits: int, w: Tensor, h: Tensor, group_size: int) -> QuantizedWeight:
    return admm(w, h, UniformGrid(bits, True, "restricted"), group_size).weight


@every_bits
@pytest.mark.parametrize(("k", "group_size"), [(1, 1), (20, 8), (37, 37)], ids=str)
def test_equals_its_formulas(bits: int, k: int, group_size: int) -> None:
    # in float32 some 600 decisions of a row are off by 1e-6 of what decides them: none of these few rows is that near
    w, h = correlated(3, k, seed=bits)
    start = start_of(bits, w, h, group_size)
    found = bitsplit(w, h, UniformGrid(bits, True), group_size, damp_percent=0.02).weight
    damped = h.double() + 0.02 * h.double().diagonal().mean() * torch.eye(k, dtype=torch.float64)
    zero = 2 ** (bits - 1)
    for i in range(len(w)):
        codes, scales = solve_row(
            w[i].double(), damped, start.codes[i].double() - zero, start.scales[i].double(), group_size, bits
        )
        assert torch.equal(found.codes[i].double() - zero, codes)
        assert torch.equal(found.scales[i].double(), scales)


@every_bits
def test_every_step_loses_nothing(bits: int) -> None:
    w, h = correlated(6, 70, seed=1)
    h = metric(h, 0.01)
    start = start_of(bits, w, h, 32)
    state, digits = begin(start, w, h), split(start)
    before, powers = losses(w, h, start), 2.0 ** torch.arange(bits - 1)
    first = before
    for _ in range(3):
        for m in [None, *reversed(range(bits - 1))]:
            state = complete(state)
            state = scale_step(state) if m is None else digit_step(state, digits[m], m)
            now = state.weight()
            # float32 gradients are off by 1e-6 of the loss
            assert (losses(w, h, now) <= before * (1 + 1e-5)).all()
            before = losses(w, h, now)
            stitched = torch.einsum("m,mkn->nk", powers, digits) + 2 ** (bits - 1)
            assert torch.equal(now.codes.float(), stitched)
    assert set(digits.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert before.sum() < 0.99 * first.sum()


@every_bits
def test_digits_are_stitched_to_the_codes(bits: int) -> None:
    codes = torch.arange(1, 2**bits, dtype=torch.uint8)[None]
    ones = torch.ones(1, 1)
    digits = split(QuantizedWeight(codes, ones, ones * 2 ** (bits - 1), UniformGrid(bits, True), 256))
    assert digits.shape == (bits - 1, codes.shape[1], 1)
    assert torch.equal(
        torch.einsum("m,mkn->nk", 2.0 ** torch.arange(bits - 1), digits) + 2 ** (bits - 1), codes.float()
    )
    assert digits.abs().max() == 1


def test_how_often_the_best_of_all_is_found() -> None:
    # a descent by digits ends where no single one helps: on 300 rows of four weights and 3 bits it is the best of all
    # codes and scales in 44 %, and never better than that
    draw, hit, count = torch.Generator().manual_seed(3), 0, 0
    for _ in range(30):
        _, h = problem(4, draw)
        w = torch.randn(10, 4, generator=draw)
        found = losses(w, h, bitsplit(w, h.float(), UniformGrid(3, True), 4, damp_percent=1e-9).weight)
        for row, loss in zip(w.double(), found.tolist(), strict=True):
            least, energy = least_loss(row, h, 3), float(row @ h @ row)
            assert loss >= least - 1e-9 * energy
            hit += loss <= least + 2.0**-16 * energy  # a scale is off by 2^-9 of itself
            count += 1
    assert count == 300
    assert hit >= 120


@pytest.mark.parametrize("sym_range", ["full", "gptq", "restricted"])
def test_any_symmetric_range_is_taken_and_its_lowest_code_left_out(sym_range: str) -> None:
    w, h = correlated(6, 40)
    grid = UniformGrid(3, True, sym_range)  # type: ignore[arg-type]
    solution = bitsplit(w, h, grid, 16)
    assert solution.weight.grid == grid
    assert solution.damp_percent == 0.01
    assert solution.weight.codes.min() == 1
    other = bitsplit(w, h, UniformGrid(3, True, "restricted"), 16).weight
    assert torch.equal(solution.weight.dequantize(), other.dequantize())


def test_inputs_that_never_occur_pull_at_nothing() -> None:
    w, h = correlated(5, 48)
    h[[3, 40]], h[:, [3, 40]] = 0.0, 0.0
    moved = w.clone()
    # inside the extremes, which place the start by importances of next to nothing
    moved[:, [3, 40]] = 0.1
    a, b = (bitsplit(v, h, UniformGrid(4, True), 16, scale_search="hessian").weight for v in (w, moved))
    seen = h.diagonal() > 0
    same = (a.scales == b.scales).all(1)
    assert same.sum() >= 4  # one start may lie elsewhere
    assert torch.equal(a.codes[same][:, seen], b.codes[same][:, seen])
    before = h.clone()
    damped = metric(h, 0.5)
    assert torch.equal(damped.diagonal() > 0, seen)
    assert torch.equal(h, before)
    damped, start = metric(h, 0.01), start_of(4, w, h, 16)
    assert (losses(w, damped, a) < losses(w, damped, start)).all()


def test_inputs_that_never_occur_are_nearest_under_the_scales_that_were_found() -> None:
    w, h = correlated(30, 48, seed=9)
    never = torch.arange(48) % 4 == 0
    h[never], h[:, never] = 0.0, 0.0
    found = bitsplit(w, h, UniformGrid(4, True), 16).weight
    for j in never.nonzero()[:, 0].tolist():
        steps = torch.round(w[:, j] / found.scales[:, j // 16]).clamp(-7, 7)
        assert torch.equal(found.codes[:, j].float() - 8, steps)


def test_other_grids_are_refused() -> None:
    w, h = correlated(2, 8)
    with pytest.raises(SolverError, match=r"method bitsplit makes codes of signed digits.*use --sym"):
        bitsplit(w, h, UniformGrid(4, False), 4)
    for name in ("nf4", "codebook"):
        with pytest.raises(SolverError, match=f"bitsplit knows equally spaced levels, not the {name} grid; use gptq"):
            bitsplit(w, h, make_grid(name, 4, True), 4)
