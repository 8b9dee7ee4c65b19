"""The factor of a Hessian is one, and singular Hessians have one too."""

import pytest
import torch
from hessian_cases import U, expected, whole
from torch import Tensor

from llmq.errors import SolverError
from llmq.hessian import Factor, factorize
from llmq.planning.counting import Held


def gram(k: int, tokens: int, seed: int = 0) -> Tensor:
    """Return a correlated Hessian [k, k] of rank at most `tokens`."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=draw) @ (torch.eye(k) + torch.randn(k, k, generator=draw) / k**0.5)
    return expected(x).float()


def check_factor(h: Tensor, found: Factor | None, dead: Tensor | None = None) -> Factor:
    """Check that R is upper triangular and ``R Rᵀ = H + λI`` for the damping that `found` reports; return `found`.

    A computed Cholesky factor of A is exact for some A + Δ with |Δ_ij| ≤ γ_{K+1} √(A_ii A_jj) (Higham 2002,
    theorem 10.3, and Cauchy-Schwarz); γ_n ≈ n·u. Dividing and multiplying by the roots of the diagonal, damping, and
    storing R add fewer than ten roundings.
    """
    assert found is not None
    k = len(h)
    target = h.double().clone()
    damp = found.damp_percent * h.double().diagonal().mean()
    if dead is not None:
        target[dead, dead] = 1.0
    target.diagonal().add_(damp)
    r = found.r.double()
    assert found.r.dtype == torch.float32
    assert torch.equal(r, r.triu())
    assert (r.diagonal() > 0).all()
    root = target.diagonal().sqrt()
    error = (r @ r.T - target).abs() / root / root[:, None]
    assert error.max() <= (k + 11) * U
    return found


@pytest.mark.parametrize("k", [1, 2, 31, 64, 129])
@pytest.mark.parametrize("damp", [0.001, 0.01, 1.0])
def test_factor_reproduces_the_damped_hessian(k: int, damp: float) -> None:
    h = gram(k, 4 * k)
    found = check_factor(h, factorize(h, damp))
    assert (found.damp_percent, found.remedies) == (damp, ())


@pytest.mark.parametrize("k", [1, 2, 7, 33, 130, 259])
@pytest.mark.parametrize("damp", [1e-9, 0.01])
def test_an_order_is_that_of_rows_and_columns(k: int, damp: float) -> None:
    h = gram(k, 4 * k if damp > 1e-6 else k // 2 + 1)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    found = factorize(h, damp, order)
    check_factor(h[order][:, order], found)
    plain = factorize(h[order][:, order].clone(), damp)
    assert plain is not None
    assert torch.equal(found.r, plain.r)  # type: ignore[union-attr]


def test_a_factor_takes_the_memory_of_one_matrix_and_little_more() -> None:
    with Held() as live:
        h, order = gram(512, 2048).clone(), torch.arange(512).flip(0)
        before = live.peak = live.now
        factorize(h, 0.01, order)
    assert live.peak - before < 1.3 * h.nbytes


def test_factor_leaves_its_argument_alone() -> None:
    h = gram(8, 32)
    before = h.clone()
    factorize(h, 0.01)
    assert torch.equal(h, before)


def test_asymmetry_of_rounding_is_averaged() -> None:
    h = gram(8, 32)
    skew = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).triu(1) * 1e-4
    check_factor(h, factorize(h + skew - skew.T, 0.01))


@pytest.mark.parametrize("damp", [1e-9, 1e-6, 0.01])
@pytest.mark.parametrize(
    "h",
    [
        expected(torch.randn(1, 64, generator=torch.Generator().manual_seed(0))).float(),
        gram(64, 1),
        gram(64, 20),
        gram(32, 128).repeat(2, 2),
    ],
    ids=["one-token", "rank-1", "rank-20", "duplicate-rows"],
)
def test_singular_hessians_are_factored(h: Tensor, damp: float) -> None:
    found = check_factor(h, factorize(h, damp))
    assert found.damp_percent >= damp
    # the rungs are those of factorize's docstring: float64 first, then ten times the damping each
    assert len(found.remedies) == 0 or round(torch.tensor(found.damp_percent / damp).log10().item()) == (
        len(found.remedies) - 1
    )


def test_diagonal_of_sixty_decades_is_factored() -> None:
    h = torch.diag(torch.tensor([1.0, 1e-30, 1e30]))
    found = check_factor(h, factorize(h, 0.01))
    assert found.remedies == ()


def test_one_huge_channel_does_not_cost_the_others_their_digits() -> None:
    # the bound of check_factor is relative to √(A_ii A_jj): the small entries keep their own digits
    h = gram(16, 64)
    scale = torch.ones(16)
    scale[3] = 1e6
    check_factor(h * scale * scale[:, None], factorize(h * scale * scale[:, None], 1e-9))


def test_inputs_that_never_occur_are_uncorrelated_with_everything() -> None:
    h = gram(8, 32)
    dead = torch.tensor([0, 5])
    h[dead], h[:, dead] = 0.0, 0.0
    r = check_factor(h, factorize(h, 0.01), dead).r
    off = r - torch.diag(r.diagonal())
    assert not off[dead].any()
    assert not off[:, dead].any()


def test_inputs_that_never_occur_at_all_are_factored() -> None:
    found = factorize(torch.zeros(4, 4), 0.01)
    assert found is not None
    assert torch.equal(found.r, torch.eye(4))


def test_damping_is_raised_tenfold_and_never_accumulates() -> None:
    # One eigenvalue is -0.05 of the mean diagonal: 0.001 and 0.01 fail, 0.1 holds. Damping added to what is damped
    # already would give 0.111 or, with the two attempts at 0.001, 0.112: 10 % off, and the check sees 1e-5.
    k = 16
    q = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    values = torch.linspace(0.5, 1.5, k, dtype=torch.float64)
    values[0] = 0
    values[0] = -0.05 * values.sum() / (k + 0.05)
    h = ((q * values) @ q.T).float()
    found = check_factor(h, factorize(h, 0.001))
    assert found.damp_percent == pytest.approx(0.1)
    assert len(found.remedies) == 3
    assert all("damping" in remedy for remedy in found.remedies)


def test_float64_comes_before_more_damping() -> None:
    # rank one and exact; 1 + 1e-8 is 1 in float32, and the second pivot 0
    x = whole(1, 64) + 10
    found = check_factor(x.T @ x, factorize(x.T @ x, 1e-8))
    assert found.damp_percent == 1e-8
    assert len(found.remedies) == 1
    assert "float64" in found.remedies[0]


@pytest.mark.parametrize(
    "h",
    [
        torch.tensor([[1.0, 10.0], [10.0, 1.0]]),
        torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [0.0, -5.0]]),
    ],
    ids=["strong-coupling", "no-diagonal", "negative-diagonal"],
)
def test_an_indefinite_matrix_has_no_factor(h: Tensor) -> None:
    assert factorize(h, 0.01) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_hessian_that_is_not_finite_is_an_error(bad: float) -> None:
    h = gram(4, 16)
    h[1, 2] = bad
    with pytest.raises(SolverError, match="NaN or infinite"):
        factorize(h, 0.01)
