"""MagR against a slow reference, the closed form of its step, and the laws of its objective."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from magr_reference import descend, objective, prox
from torch import Tensor

from llmq.errors import SolverError
from llmq.transforms.magr import _prox, largest_eigenvalue, magr


def problem(n: int, k: int, seed: int, kind: str = "full") -> tuple[Tensor, Tensor]:
    """Return weights [N, K] with a tail and a Hessian [K, K] of decaying spectrum, float64."""
    draw = torch.Generator().manual_seed(seed)
    rank = max(k // 3, 1) if kind == "deficient" else 4 * k
    x = torch.randn(rank, k, generator=draw) @ torch.diag(torch.arange(1.0, k + 1) ** -0.5)
    x = (x @ torch.linalg.qr(torch.randn(k, k, generator=draw)).Q).double()
    w = torch.randn(n, k, generator=draw).double() * torch.exp(0.5 * torch.randn(n, k, generator=draw)).double()
    return w, 2 * x.T @ x / len(x)


def units(w: Tensor, h: Tensor, alpha: float) -> tuple[Tensor, float]:
    """Return λ of each row [N], and what the step length is one over."""
    largest = largest_eigenvalue(h)
    return alpha * largest * (w**2).mean(1) ** 0.5, largest


cases = {
    "n": st.integers(1, 5),
    "k": st.integers(1, 24),
    "group_size": st.sampled_from([1, 5, 8, 24]),
    "alpha": st.sampled_from([0.001, 0.02, 0.3, 10.0]),
    "seed": st.integers(0, 10**6),
    "kind": st.sampled_from(["full", "deficient"]),
}


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 12), radius=st.sampled_from([0.0, 1e-3, 0.3, 2.0, 50.0]))
def test_prox_is_that_of_the_reference(seed: int, size: int, radius: float) -> None:
    v = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)).double()
    v[2] = v[2, 0]  # all equal: nothing but ties
    found = _prox(v, torch.full((3, 1), radius, dtype=torch.float64))
    for row, mine in zip(v, found, strict=True):
        assert torch.allclose(mine, prox(row, radius), atol=1e-13)


def test_prox_minimizes() -> None:
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(40, 6, generator=draw).double()
    radius = torch.rand(40, 1, generator=draw).double() * 3
    cost = lambda u: 0.5 * (u - v).square().sum(1) + radius[:, 0] * u.abs().amax(1)  # noqa: E731
    least = cost(_prox(v, radius))
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(50):
            other = _prox(v, radius) + size * torch.randn(v.shape, generator=draw).double()
            assert (cost(other) >= least - 1e-13).all()


@settings(max_examples=40)
@given(**cases, steps=st.integers(1, 4))
def test_steps_are_those_of_the_reference(
    n: int, k: int, group_size: int, alpha: float, seed: int, kind: str, steps: int
) -> None:
    w, h = problem(n, k, seed, kind)
    found = magr(w, h, group_size=group_size, alpha=alpha, steps=steps)
    penalty, largest = units(w, h, alpha)
    expected = descend(w, h, penalty, group_size, largest, steps)
    assert torch.allclose(found, expected, atol=1e-11)


@settings(max_examples=40)
@given(**cases)
def test_objective_never_rises(n: int, k: int, group_size: int, alpha: float, seed: int, kind: str) -> None:
    w, h = problem(n, k, seed, kind)
    penalty, _ = units(w, h, alpha)
    values = [objective(w, w, h, penalty, group_size)]
    for steps in (1, 2, 3, 5, 8, 20, 50):
        after = magr(w, h, group_size=group_size, alpha=alpha, steps=steps)
        values.append(objective(after, w, h, penalty, group_size))
    for before, after in pairwise(values):
        assert (after <= before * (1 + 1e-12)).all()


@settings(max_examples=40)
@given(k=st.integers(1, 40), seed=st.integers(0, 10**6), size=st.sampled_from([1e-20, 1.0, 1e20]))
def test_the_largest_eigenvalue_is_found_from_below(k: int, seed: int, size: float) -> None:
    _, h = problem(1, k, seed)
    for matrix in (size * h, size * torch.eye(k).double(), size * torch.diag(torch.eye(k)[0]).double()):
        exact = float(torch.linalg.eigvalsh(matrix)[-1])
        # 40^(1/40) = 1.10 for an average start; the objective falls as long as this stays above one half
        assert 0.8 * exact <= largest_eigenvalue(matrix) <= exact * (1 + 1e-12)


@pytest.mark.parametrize("group_size", [4, 7, 20])
def test_many_steps_reach_the_minimum(group_size: int) -> None:
    """At the minimum of a convex objective no direction leads down."""
    w, h = problem(4, 20, seed=3)
    h = h + 0.05 * h.trace() / 20 * torch.eye(20)
    alpha = 0.3
    end = magr(w, h, group_size=group_size, alpha=alpha, steps=3000)
    penalty, _ = units(w, h, alpha)
    least = objective(end, w, h, penalty, group_size)
    draw = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-1):
        for _ in range(50):
            other = end + size * torch.randn(w.shape, generator=draw).double()
            assert (objective(other, w, h, penalty, group_size) > least).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_penalty_changes_nothing(dtype: torch.dtype) -> None:
    w, h = problem(4, 21, seed=0)
    w, h = w.to(dtype), h.to(dtype)
    assert torch.equal(magr(w, h, group_size=8, alpha=0.0), w)
    assert torch.equal(magr(w, torch.zeros_like(h), group_size=8), w)  # nor does a layer without inputs


def test_a_zero_row_stays() -> None:
    w, h = problem(3, 16, seed=0)
    w[1] = 0
    assert not magr(w, h, group_size=8, alpha=0.1)[1].any()


@given(seed=st.integers(0, 10**6), of_h=st.sampled_from([1e-6, 7.0, 1e6]), of_w=st.sampled_from([1e-4, 3.0, 1e3]))
def test_units_do_not_matter(seed: int, of_h: float, of_w: float) -> None:
    w, h = problem(3, 12, seed)
    expected = magr(w, h, group_size=5, alpha=0.02, steps=10)
    assert torch.allclose(magr(of_w * w, of_h * h, group_size=5, alpha=0.02, steps=10), of_w * expected, rtol=1e-9)


def test_rows_are_independent() -> None:
    w, h = problem(6, 20, seed=1)
    whole = magr(w, h, group_size=8, alpha=0.1, steps=10)
    assert torch.allclose(magr(w[[4, 2]], h, group_size=8, alpha=0.1, steps=10), whole[[4, 2]], rtol=1e-12)


def test_groups_shrink_at_little_cost() -> None:
    """What it is for: free directions pay for smaller extremes."""
    w, h = problem(32, 64, seed=0, kind="deficient")
    w, h = w.float(), h.float()
    after = magr(w, h, group_size=32, alpha=0.01, steps=200)
    spans = [m.unflatten(1, (2, 32)).abs().amax(2).mean() for m in (w, after)]
    error = after - w
    assert spans[1] < 0.8 * spans[0]
    assert float(((error @ h) * error).sum() / ((w @ h) * w).sum()) < 1e-3
    assert after.dtype == torch.float32


def test_a_negative_penalty_is_refused() -> None:
    with pytest.raises(SolverError, match="alpha is -1"):
        magr(torch.ones(1, 2), torch.eye(2), group_size=2, alpha=-1.0)
