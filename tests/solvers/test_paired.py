"""What answers for the drift of a layer's inputs: GPTAQ against its paper, the exact shift against least squares."""

import pytest
import torch
from gptaq_reference import gptaq_columns, p_by_the_paper
from gptq_reference import damped
from solver_cases import assert_same, correlated
from test_gptq import assert_follows, comparable
from torch import Tensor

from llmq.errors import SolverError
from llmq.grids.uniform import UniformGrid
from llmq.planning.counting import Held
from llmq.solvers.gptaq import gptaq
from llmq.solvers.gptq import gptq
from llmq.solvers.shift import shifted

every_order = pytest.mark.parametrize("order", ["natural", "act", "group", "pivot"])
both_signs = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


def streams(k: int, seed: int, drift: float = 0.2) -> tuple[Tensor, Tensor]:
    """Return inputs X and X_fp, float64 [K, T], whose difference goes with X."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.7 * torch.randn(k, k, generator=draw) / k**0.5
    x = (mix @ torch.randn(k, 8 * k, generator=draw)).double()
    turn = drift * torch.randn(k, k, generator=draw).double() / k**0.5
    return x, x + turn @ x + drift * torch.randn(k, 8 * k, generator=draw).double()


def moments(x: Tensor, fp: Tensor) -> tuple[Tensor, Tensor]:
    """Return H and D as the driver passes them."""
    return (2 * x @ x.T / x.shape[1]).float(), (2 * (fp - x) @ x.T / x.shape[1]).float()


@both_signs
@every_order
@pytest.mark.parametrize(
    ("k", "group_size", "bits", "alpha"),
    [(5, 5, 2, 1.0), (24, 8, 3, 0.25), (33, 11, 4, 0.5), (70, 32, 4, 0.25)],
    ids=str,
)
def test_codes_are_those_of_the_paper(
    k: int, group_size: int, bits: int, alpha: float, order: str, symmetric: bool
) -> None:
    w, _ = correlated(24, k, seed=k)
    h, cross = moments(*streams(k, k))
    trace = gptaq_columns(w, h, cross, alpha, bits, symmetric, group_size, 0.05, order)
    grid = UniformGrid(bits, symmetric)
    found = gptaq(w, h, grid, group_size, cross=cross, alpha=alpha, damp_percent=0.05, order=order)
    # twice the terms of gptq, the second kind with an inverse of its own: twice the distance from ties
    rows = comparable(h, 0.05, w, trace._replace(margin=trace.margin / 2))
    assert_follows(found.weight, trace, rows)
    plain = gptq(w, h, grid, group_size, damp_percent=0.05, order=order).weight
    assert k == 5 or not torch.equal(found.weight.codes, plain.codes)


def test_the_rule_of_the_reference_is_that_of_the_paper() -> None:
    h, cross = moments(*streams(12, 1))
    p = p_by_the_paper(damped(h, 0.01), cross, 0.25)
    full = damped(h, 0.01)
    for i in range(11):
        expected = 0.25 * cross[i, i + 1 :].double() @ torch.linalg.inv(full[i + 1 :, i + 1 :])
        torch.testing.assert_close(p[i, i + 1 :], expected, rtol=1e-9, atol=1e-12)
    assert not p.tril().any()


@every_order
def test_no_alpha_or_no_drift_is_gptq(order: str) -> None:
    w, _ = correlated(12, 48, seed=2)
    h, cross = moments(*streams(48, 2))
    grid = UniformGrid(3, symmetric=False)
    plain = gptq(w, h, grid, 16, order=order, scale_search="hessian").weight
    options = {"order": order, "scale_search": "hessian"}
    assert_same(gptaq(w, h, grid, 16, cross=cross, alpha=0.0, **options).weight, plain)
    assert_same(gptaq(w, h, grid, 16, cross=torch.zeros_like(h), alpha=1.0, **options).weight, plain)


def output_error(w: Tensor, q: Tensor, x: Tensor, fp: Tensor) -> float:
    return float((w.double() @ fp - q.double() @ x).square().sum())


def test_both_answers_lower_the_error_of_the_outputs() -> None:
    ratios = {"gptaq": 0.0, "shift": 0.0}
    for seed in range(5):
        w, _ = correlated(16, 64, seed)
        x, fp = streams(64, seed, 0.3)
        h, cross = moments(x, fp)
        grid = UniformGrid(4, symmetric=False)
        plain = output_error(w, gptq(w, h, grid, 32).weight.dequantize(), x, fp)
        q = gptaq(w, h, grid, 32, cross=cross, alpha=1.0).weight.dequantize()
        ratios["gptaq"] += output_error(w, q, x, fp) / plain / 5
        target = shifted(w, h, cross, alpha=1.0, damp_percent=0.01)
        ratios["shift"] += output_error(w, gptq(target, h, grid, 32).weight.dequantize(), x, fp) / plain / 5
    # the second half of what columns behind can answer is lost to gptaq
    assert ratios["shift"] < ratios["gptaq"] < 0.97


@pytest.mark.parametrize("solve", ["gptaq", "shift"])
def test_a_cross_moment_with_nan_is_an_error(solve: str) -> None:
    w, h = correlated(4, 8)
    cross = torch.zeros(8, 8)
    cross[1, 2] = float("inf")
    run = {
        "gptaq": lambda: gptaq(w, h, UniformGrid(4, symmetric=True), 8, cross=cross),
        "shift": lambda: shifted(w, h, cross, alpha=0.5, damp_percent=0.01),
    }[solve]
    with pytest.raises(SolverError, match="cross moment holds NaN or infinite"):
        run()


# --- the exact shift


def test_without_alpha_nothing_shifts() -> None:
    w, _ = correlated(8, 32, seed=3)
    h, cross = moments(*streams(32, 3))
    assert torch.equal(shifted(w, h, cross, alpha=0.0, damp_percent=0.01), w)


def test_without_drift_nothing_shifts() -> None:
    w, _ = correlated(8, 32, seed=3)
    x, _ = streams(32, 3)
    h, cross = moments(x, x)
    assert torch.equal(shifted(w, h, cross, alpha=1.0, damp_percent=0.01), w)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("damp", [0.0, 0.01, 0.5])
def test_the_shift_is_that_of_the_formula(alpha: float, damp: float) -> None:
    w, _ = correlated(8, 20, seed=4)
    h, cross = moments(*streams(20, 4))
    expected = w.double() + alpha * w.double() @ cross.double() @ torch.linalg.inv(damped(h, damp))
    # the result is rounded to float32; λ is a product of float32 numbers
    torch.testing.assert_close(
        shifted(w, h, cross, alpha=alpha, damp_percent=damp).double(), expected, rtol=1e-6, atol=1e-6
    )


def test_a_shift_holds_one_factor() -> None:
    w, _ = correlated(4, 512, seed=6)
    moved = moments(*streams(512, 6))
    with Held() as live:
        h, cross = (t.clone() for t in moved)
        before = live.peak = live.now
        shifted(w, h, cross, alpha=0.5, damp_percent=0.01)
    assert live.peak - before < 1.3 * 2 * h.nbytes  # float64


def test_the_full_shift_is_the_least_squares_answer_to_the_original_outputs() -> None:
    # real matrices, which no rounding of the moments comes between: ‖W X_fp - V X‖² is least at W*
    w, _ = correlated(6, 16, seed=5)
    x, fp = streams(16, 5)
    h, cross = 2 * x @ x.T / x.shape[1], 2 * (fp - x) @ x.T / x.shape[1]
    solved = torch.linalg.lstsq(x.T, (w.double() @ fp).T).solution.T
    best = output_error(w, solved, x, fp)
    target = shifted(w, h, cross, alpha=1.0, damp_percent=0.0)
    torch.testing.assert_close(target.double(), solved, rtol=1e-6, atol=1e-6)  # W* is returned in float32
    # at the minimum the loss is flat: errors of 1e-7 in W* cost 1e-14
    assert output_error(w, target, x, fp) <= best * (1 + 1e-8)
    for part in (0.0, 0.5):
        assert output_error(w, shifted(w, h, cross, alpha=part, damp_percent=0.0), x, fp) > best * (1 + 1e-3)


def test_inputs_that_never_occur_are_not_shifted() -> None:
    w, _ = correlated(4, 12, seed=6)
    x, fp = streams(12, 6)
    x[3] = 0
    h, cross = moments(x, fp)
    assert torch.equal(shifted(w, h, cross, alpha=1.0, damp_percent=0.01)[:, 3], w[:, 3])


def test_a_hessian_that_cannot_be_solved_is_an_error() -> None:
    w, _ = correlated(4, 12)
    h = torch.full((12, 12), 10.0).fill_diagonal_(1.0)
    with pytest.raises(SolverError, match=r"not positive definite at damping 0\.01"):
        shifted(w, h, torch.zeros(12, 12), alpha=0.5, damp_percent=0.01)
