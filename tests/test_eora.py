"""Low-rank compensation: what it leaves is what its theorem says, and nothing of its rank leaves less."""

import pytest
import torch
from eora_reference import eora_reference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmq.eora import eora
from llmq.errors import SolverError, SpecError

# Factors are rounded to float32 once; a loss is quadratic in them, so it is off by about eps times a small constant
# of what there was before.
LOSS_TOLERANCE = 1e-6


def problem(seed: int, n: int, k: int, occurring: int | None = None) -> tuple[Tensor, Tensor]:
    """Return an error [n, k] and the Hessian of uneven, correlated inputs in a space of `occurring` dimensions."""
    generator = torch.Generator().manual_seed(seed)
    error = torch.randn(n, k, generator=generator)
    mix = torch.randn(occurring or k, k, generator=generator)
    strength = torch.logspace(0, -1.5, occurring or k)[:, None]
    x = torch.randn(4 * k, occurring or k, generator=generator) @ (strength * mix)
    return error, 2 * x.T @ x / len(x)


def loss(error: Tensor, h: Tensor) -> float:
    error, h = error.double(), h.double()
    return float(((error @ h) * error).sum())


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    n, k = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    occurring = draw(st.integers(1, k))
    error, h = problem(draw(st.integers(0, 2**16)), n, k, occurring)
    return error, h, draw(st.integers(1, min(n, k)))


def test_the_louder_output_is_corrected_not_the_larger_error() -> None:
    # E H Eᵀ = diag(9, 16): plain SVD would take the 3 and leave 16
    a, b = eora(torch.diag(torch.tensor([3.0, 2.0])), torch.diag(torch.tensor([1.0, 4.0])), 1)
    torch.testing.assert_close(b @ a, torch.tensor([[0.0, 0.0], [0.0, 2.0]]))


@given(problems())
def test_what_is_left_is_the_sum_of_the_other_squared_singular_values(case: tuple[Tensor, Tensor, int]) -> None:
    error, h, rank = case
    a, b = eora(error, h, rank)
    assert a.shape == (rank, error.shape[1])
    assert b.shape == (error.shape[0], rank)
    assert a.dtype == b.dtype == torch.float32
    rest = float(eora_reference(error, h, rank).singular_values[rank:].square().sum())
    # the reference drops eigenvalues below K·eps of the largest, at most K of them
    slack = error.shape[1] ** 2 * torch.finfo(torch.float32).eps * float(torch.linalg.matrix_norm(h, 2))
    slack *= float(error.double().square().sum())
    assert loss(error - b @ a, h) == pytest.approx(rest, abs=LOSS_TOLERANCE * loss(error, h) + slack)


@pytest.mark.parametrize(("n", "k"), [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("occurring", [None, 9])
def test_where_inputs_occur_it_is_the_reference(n: int, k: int, occurring: int | None) -> None:
    error, h = problem(3, n, k, occurring)
    for rank in (1, 4, 8):
        a, b = eora(error, h, rank)
        expected = eora_reference(error, h, rank)
        # singular values differ by 1 % and more, eigenvectors of the Gram matrix are good to 1e-12 / 0.01
        torch.testing.assert_close(
            (b @ a).double() @ expected.active, expected.b @ expected.a, rtol=1e-4, atol=1e-5 * float(error.abs().max())
        )


@given(problems(), st.integers(0, 2**16), st.floats(1e-3, 1.0))
def test_no_other_matrix_of_the_rank_leaves_less(case: tuple[Tensor, Tensor, int], seed: int, size: float) -> None:
    error, h, rank = case
    a, b = eora(error, h, rank)
    generator = torch.Generator().manual_seed(seed)
    ours, slack = loss(error - b @ a, h), LOSS_TOLERANCE * loss(error, h)
    other = (b + size * torch.randn(b.shape, generator=generator)) @ (
        a + size * torch.randn(a.shape, generator=generator)
    )
    assert ours <= loss(error - other, h) + slack
    u, s, v = torch.linalg.svd(error)
    assert ours <= loss(error - (u[:, :rank] * s[:rank]) @ v[:rank], h) + slack


def test_plain_svd_leaves_clearly_more() -> None:
    error, h = problem(0, 24, 32)
    a, b = eora(error, h, 4)
    u, s, v = torch.linalg.svd(error)
    assert loss(error - b @ a, h) < 0.8 * loss(error - (u[:, :4] * s[:4]) @ v[:4], h)


@pytest.mark.parametrize(("n", "k"), [(8, 12), (12, 8), (1, 5), (5, 1)])
@pytest.mark.parametrize("occurring", [None, 1])
def test_the_full_rank_is_the_error_itself(n: int, k: int, occurring: int | None) -> None:
    error, h = problem(1, n, k, occurring)
    a, b = eora(error, h, min(n, k))
    torch.testing.assert_close(b @ a, error, rtol=1e-5, atol=1e-6)


@given(problems())
def test_directions_are_orthonormal_and_the_correction_no_larger_than_the_error(
    case: tuple[Tensor, Tensor, int],
) -> None:
    error, h, rank = case  # also where H is singular: nothing is divided by
    a, b = eora(error, h, rank)
    torch.testing.assert_close(b.T @ b, torch.eye(rank), rtol=0, atol=1e-5)
    assert float((b @ a).norm()) <= (1 + 1e-5) * float(error.norm())


@given(problems(), st.integers(-20, 20))
def test_the_scale_of_the_hessian_does_not_matter(case: tuple[Tensor, Tensor, int], power: int) -> None:
    error, h, rank = case
    for ours, scaled in zip(eora(error, h, rank), eora(error, h * 2.0**power, rank), strict=True):
        torch.testing.assert_close(ours, scaled, rtol=0, atol=0)


def test_directions_come_by_falling_weight() -> None:
    error, h = problem(2, 10, 14)
    whole, part = eora(error, h, 8), eora(error, h, 3)
    torch.testing.assert_close(whole[0][:3], part[0], rtol=0, atol=0)
    torch.testing.assert_close(whole[1][:, :3], part[1], rtol=0, atol=0)


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(SpecError, match=f"rank is {rank}; a layer of 8 outputs and 12 inputs takes 1 to 8"):
        eora(*problem(0, 8, 12), rank)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(position: int, value: float) -> None:
    case = problem(0, 8, 8)
    case[position][2, 3] = value
    with pytest.raises(SolverError, match=("quantization error", "Hessian")[position]):
        eora(*case, 2)
