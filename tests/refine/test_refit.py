"""The refit of scales against float64 least squares, and what it must refuse."""

from dataclasses import dataclass, replace

import pytest
import torch
from descent_reference import U
from hypothesis import given, settings
from refine_cases import Problem, allowance, losses, problem, problems
from torch import Tensor

from llmq.grids.uniform import UniformGrid
from llmq.refine.refit import refit
from llmq.types import QuantizedWeight

both_signs = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
STEP = 2.0**-7  # between the storable scales of [1, 2)


@dataclass(frozen=True)
class Unrounded(UniformGrid):
    """The uniform grid for files that store float32 scales."""

    def storable(self, scale: Tensor) -> Tensor:
        return scale


def unrounded(q: QuantizedWeight) -> QuantizedWeight:
    return replace(q, grid=Unrounded(q.grid.bits, q.grid.symmetric))


def least_squares(q: QuantizedWeight, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best scales [N, G] of each row, their losses [N], and how far float32 may stay above these, [N].

    ‖(w - Σ s_g u_g) L‖² with H = L Lᵀ, by a QR decomposition. The solver's right sides and matrix are float32 sums
    of 2K products with errors r <= (2K + 4)·u·(|u| |H| |w| + |u| |H| |u| |s|), and its ridge adds 1e-9·mean(A)·s; to
    first order that costs rᵀ A⁻¹ r <= ‖r‖²/λ_min(A), doubled here. Scales rounded to float32 cost u²·|s| |A| |s| more.
    """
    k, groups = w.shape[1], q.scales.shape[1]
    half = torch.linalg.cholesky(h.double())
    of = torch.arange(k) // q.group_size
    members = (of[:, None] == torch.arange(groups)).double()  # [K, G]
    best, least, above = [], [], []
    for codes, zeros, row in zip(q.codes, q.zeros, w, strict=True):
        units = (codes.double() - zeros.double()[of])[:, None] * members
        s = torch.linalg.lstsq(half.T @ units, (half.T @ row.double())[:, None], driver="gelsd").solution[:, 0]
        e = row.double() - units @ s
        matrix = units.T @ h.double() @ units
        reach = units.abs().T @ h.double().abs()
        r = (2 * k + 4) * U * (reach @ row.double().abs() + reach @ units.abs() @ s.abs())
        r += 1e-9 * matrix.diagonal().mean() * s.abs()
        best.append(s)
        least.append(e @ h.double() @ e)
        above.append(2 * r @ r / torch.linalg.eigvalsh(matrix)[0] + 2 * U**2 * (s.abs() @ matrix.abs() @ s.abs()))
    return torch.stack(best), torch.stack(least), torch.stack(above)


@both_signs
@pytest.mark.parametrize("start", ["rtn", "random"])
@pytest.mark.parametrize(
    ("k", "group_size", "bits"), [(1, 1, 3), (16, 16, 2), (33, 8, 4), (48, 16, 3), (70, 32, 2)], ids=str
)
def test_scales_are_those_of_least_squares(k: int, group_size: int, bits: int, start: str, symmetric: bool) -> None:
    q, w, h = problem(24, k, group_size, bits, symmetric, start=start, seed=k)
    # a group of which every code is the zero has no scale to find
    units = q.codes.float() - q.zeros.repeat_interleave(group_size, dim=1)[:, :k]
    full = torch.stack([part.any(1) for part in units.split(group_size, dim=1)], 1).all(1)
    assert full.sum() >= 12
    q, w = QuantizedWeight(q.codes[full], q.scales[full], q.zeros[full], q.grid, group_size), w[full]
    found = refit(unrounded(q), w, h)
    best, least, above = least_squares(q, w, h)
    # in float64, since (code - zero) * scale is not exact for scales of more than eight bits
    e = w.double() - units[full].double() * found.scales.double().repeat_interleave(group_size, dim=1)[:, :k]
    reached = ((e @ h.double()) * e).sum(1)
    assert (reached >= least * (1 - 1e-9) - 1e-12).all()  # float64 all along
    # rows are refused whose best scales are more than twice their largest, or gain less than float32 can tell
    refused = (best.abs() > 2 * q.scales.abs().amax(1, keepdim=True)).any(1)
    kept = (found.scales == q.scales).all(1)
    assert (kept | ~refused).all()
    assert refused.float().mean() < 0.5
    allowed = above + torch.where(kept, allowance(q, q, w, h), 0.0) + 1e-12
    assert (reached <= least + allowed)[~refused].all()


@settings(max_examples=60)
@given(case=problems())
def test_stored_scales_are_taken_only_where_they_help(case: Problem) -> None:
    q, w, h = case
    found = refit(q, w, h)
    assert torch.equal(found.codes, q.codes)
    changed = (found.scales != q.scales).any(1)
    before, after = losses(q, w, h), losses(found, w, h)
    assert (after[changed] < (before + allowance(q, found, w, h))[changed]).all()


def two_columns(first: float, second: float, w: list[float]) -> tuple[QuantizedWeight, Tensor]:
    """Return two groups of one column, both one step above zero under scales `first` and `second`, and the weight."""
    codes = torch.tensor([[5, 5]], dtype=torch.uint8)
    q = QuantizedWeight(codes, torch.tensor([[first, second]]), torch.full((1, 2), 4.0), UniformGrid(3, True), 1)
    return q, torch.tensor([w])


def test_scales_that_are_worse_once_rounded_are_refused() -> None:
    # The best scales are w itself. Rounded they err by 0.4 steps each, in the same direction: 0.16 + 0.16 + 1.8·0.16
    # = 0.608 steps². The present ones err by 0.4 and -0.6: 0.16 + 0.36 - 1.8·0.24 = 0.088.
    h = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    q, w = two_columns(1.0, 1 + STEP, [1 + 0.4 * STEP, 1 + 0.4 * STEP])
    assert torch.equal(refit(q, w, h).scales, q.scales)
    found = refit(unrounded(q), w, h).scales
    torch.testing.assert_close(found, w, rtol=1e-5, atol=0)  # with the condition of 19: 20·u·19 and a ridge of 1e-9


def test_scales_that_are_better_once_rounded_are_taken() -> None:
    h = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    q, w = two_columns(1.5, 1.25, [1 + 0.4 * STEP, 1 + 0.6 * STEP])
    assert refit(q, w, h).scales.tolist() == [[1.0, 1 + STEP]]


def test_each_row_decides_for_itself() -> None:
    h = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    a, w = two_columns(1.0, 1 + STEP, [1 + 0.4 * STEP, 1 + 0.4 * STEP])
    b, v = two_columns(1.5, 1.25, [1 + 0.4 * STEP, 1 + 0.6 * STEP])
    both = QuantizedWeight(
        *(torch.cat([getattr(a, x), getattr(b, x)]) for x in ("codes", "scales", "zeros")), a.grid, 1
    )
    assert refit(both, torch.cat([w, v]), h).scales.tolist() == [[1.0, 1 + STEP], [1.0, 1 + STEP]]


@both_signs
@pytest.mark.parametrize("kind", ["full", "deficient"])
def test_groups_of_zeros_keep_their_scale(symmetric: bool, kind: str) -> None:
    # u_g = 0: no scale is better than another, and the next descent needs one of the right size
    q, w, h = problem(8, 48, 16, 3, symmetric, kind, seed=1)
    codes = q.codes.clone()
    codes[:, 16:32] = q.zeros[:, 1:2].to(torch.uint8)
    q = replace(q, codes=codes)
    found = refit(q, w, h)
    assert torch.equal(found.scales[:, 1], q.scales[:, 1])
    assert not torch.equal(found.scales, q.scales)


def test_groups_without_energy_keep_their_scale() -> None:
    q, w, h = problem(8, 48, 16, 3, True, seed=2)
    h[16:32], h[:, 16:32] = 0.0, 0.0
    found = refit(q, w, h)
    assert torch.equal(found.scales[:, 1], q.scales[:, 1])
    assert not torch.equal(found.scales, q.scales)


def test_negative_scales_survive() -> None:
    q, w, h = problem(24, 48, 16, 3, True, seed=3)
    assert 0.3 < (q.scales < 0).float().mean() < 0.7
    found = refit(q, w, h)
    assert torch.equal(found.scales.sign(), q.scales.sign())
    assert (found.scales != q.scales).any(1).float().mean() > 0.8
    assert losses(found, w, h).sum() < 0.97 * losses(q, w, h).sum()
