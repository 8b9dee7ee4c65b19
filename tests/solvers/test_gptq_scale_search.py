"""GPTQ with the scale search, against the textbook in float64 that searches every span by R_jj²."""

from functools import partial
from typing import Any

import gptq_reference
import pytest
import torch
from gptq_reference import Trace, damped, gptq_u_form
from grid_reference import encode, place
from order_reference import visit
from solver_cases import assert_same, correlated, losses
from torch import Tensor

from llmq.grids.uniform import UniformGrid
from llmq.hessian import factorize
from llmq.solvers.gptq import gptq
from llmq.solvers.orders import ORDERS
from llmq.types import Affine

every_order = pytest.mark.parametrize("order", ["natural", "act", "group", "pivot"])
both_signs = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
U = 2.0**-24


def remaining_energy(h: Tensor, damp_percent: float, columns: list[int]) -> Tensor:
    """Return R_jj² of each original column: what H̃ leaves of its energy given all columns that come later.

    By its definition, a Schur complement: 1 / (H̃[B, B]⁻¹)_00 with B the column and those after it.
    """
    full = damped(h, damp_percent)
    energy = torch.empty(len(h), dtype=torch.float64)
    for at, column in enumerate(columns):
        behind = columns[at:]
        energy[column] = 1 / torch.linalg.inv(full[behind][:, behind])[0, 0]
    return energy


class Searching(gptq_reference._Groups):
    """Groups that are placed by the best of 35 spans, and remember how near float32 was to another choice."""

    def __init__(self, energy: Tensor, tolerance: float, *args: Any, **kwargs: Any) -> None:
        self.energy, self.tolerance = energy, tolerance
        super().__init__(*args, **kwargs)

    def _place(self, group: int, w: Tensor, columns: list[int] | None = None) -> None:
        start = group * self.group_size
        weight = self.energy[columns or list(range(start, start + w.shape[1]))]
        scales, zeros, errors, doubts, firm = [], [], [], [], []
        # static groups are placed by weights that float32 knows exactly; only a span of a full span is rounded
        known = 4 * U * 2**self.bits if self.static else self.tolerance
        ends = torch.stack([w.amin(1), w.amax(1)], dim=1)
        for step in range(35):
            placed = place(ends * (1 - 0.02 * step), self.bits, self.symmetric)
            scale, zero = placed.scale[:, None], placed.zero[:, None]
            off = ((encode(w, scale, zero, self.bits) - zero) * scale - w).abs()
            # weights may be off by `tolerance` steps, and R_jj² relatively by less than that. Where the scale may be
            # rounded the other way, by one of its last bits, levels are elsewhere by 2^(bits-7), zeros by 1.
            firm.append(placed.margin > known)
            loose = 2.0 ** (self.bits - 7) + (0 if self.symmetric else 1)
            moved = (self.tolerance + torch.where(firm[-1], 0.0, loose)) * placed.scale.abs()
            errors.append(off.square() @ weight)
            doubts.append((2 * off * moved[:, None] + moved[:, None] ** 2) @ weight + self.tolerance * errors[-1])
            scales.append(placed.scale)
            zeros.append(placed.zero)
        tried = torch.stack([torch.stack(scales), torch.stack(zeros)], dim=2)  # [35, N, 2]
        error, doubt, rows = torch.stack(errors), torch.stack(doubts), torch.arange(len(w))
        best = error.argmin(0)
        chosen = tried[best, rows]
        other = (tried != chosen).any(2)
        near = other & (error - error[best, rows] <= doubt + doubt[best, rows])
        self.margin = torch.where(near.any(0) | ~torch.stack(firm)[best, rows], 0.0, self.margin)
        self.scales[:, group], self.zeros[:, group] = chosen.T


def searched(monkeypatch: pytest.MonkeyPatch, w: Tensor, h: Tensor, grid: UniformGrid, size: int, order: str) -> Trace:
    """Return the textbook's answer with the search; its margin is not positive where float32 may differ."""
    # as in test_gptq.comparable: u·(K·(κ + 1)·moved + 4·max|w|/s), for at most 4 and 64 steps
    kappa = torch.linalg.cond(damped(h, 0.01)).item()
    tolerance = U * (4 * w.shape[1] * (kappa + 1) + 256)
    energy = remaining_energy(h, 0.01, visit(h, order, size))
    monkeypatch.setattr(gptq_reference, "_Groups", partial(Searching, energy, tolerance))
    trace = gptq_u_form(w, h, grid.bits, grid.symmetric, size, 0.01, order)
    assert trace.moved.max() < 4
    assert (w.abs().amax(1) / trace.scales.abs().amin(1)).max() < 64
    return trace._replace(margin=trace.margin - tolerance)


@every_order
@both_signs
@pytest.mark.parametrize(("k", "group_size", "bits"), [(5, 5, 2), (12, 6, 3), (24, 8, 4), (21, 8, 2)], ids=str)
def test_codes_are_those_of_the_textbook_with_the_search(
    monkeypatch: pytest.MonkeyPatch, k: int, group_size: int, bits: int, order: str, symmetric: bool
) -> None:
    w, h = correlated(48, k, seed=k)
    h += 0.5 * h.diagonal().mean() * torch.eye(k)  # a condition near 10, for bounds that leave many rows to compare
    grid = UniformGrid(bits, symmetric)
    trace = searched(monkeypatch, w, h, grid, group_size, order)
    rows = trace.margin > 0
    assert rows.float().mean() > 0.2, "too few rows are clear of ties to tell anything"
    found = gptq(w, h, grid, group_size, order=order, scale_search="hessian").weight
    assert torch.equal(found.scales[rows].double(), trace.scales[rows])
    assert torch.equal(found.zeros[rows].double(), trace.zeros[rows])
    assert torch.equal(found.codes[rows].double(), trace.codes[rows])


@both_signs
def test_in_mixed_order_every_column_has_the_weight_of_its_own_place_in_the_sweep(symmetric: bool) -> None:
    # two groups whose columns are visited as 3 1 5 0 2 4; R_jj² by hand from the permuted Hessian
    w, _ = correlated(40, 6, seed=1)
    energy = torch.tensor([3.0, 7.0, 1.0, 9.0, 0.5, 4.0])
    h = (torch.eye(6) * 0.6 + 0.4) * (energy.sqrt()[:, None] * energy.sqrt())
    order = [3, 1, 5, 0, 2, 4]
    full = damped(h, 0.01)[order][:, order]
    r = torch.linalg.cholesky(full.flip(0, 1)).flip(0, 1)
    weight = torch.empty(6)
    weight[order] = r.diagonal().square().float()
    grid = UniformGrid(2, symmetric)
    found = gptq(w, h, grid, 3, order="act", scale_search="hessian").weight
    at = [grid.fit(part, weight[3 * g : 3 * g + 3]) for g, part in enumerate(w.split(3, dim=1))]
    # of 80 groups one may be so near to a tie between two spans that the last bits of R decide
    same = (found.scales == torch.cat([a.scale for a in at], 1)) & (found.zeros == torch.cat([a.zero for a in at], 1))
    assert (~same).sum() <= 1


@every_order
@both_signs
@pytest.mark.parametrize("bits", [2, 3])
def test_the_search_lowers_the_loss_on_average(bits: int, symmetric: bool, order: str) -> None:
    ratios = []
    for seed in range(6):
        w, h = correlated(24, 96, seed)
        run = partial(gptq, w, h, UniformGrid(bits, symmetric), 32, order=order)
        with_search, without = (run(scale_search=way).weight for way in ("hessian", "none"))
        ratios.append(losses(w, h, with_search).sum() / losses(w, h, without).sum())
    assert torch.stack(ratios).mean() < 0.95


@every_order
@both_signs
def test_without_the_search_nothing_is_different(symmetric: bool, order: str) -> None:
    w, h = correlated(12, 70, seed=2)
    grid = UniformGrid(3, symmetric)
    usual = gptq(w, h, grid, 16, order=order).weight
    assert_same(usual, gptq(w, h, grid, 16, order=order, scale_search="none").weight)
    if order in ("act", "pivot"):
        placed = [grid.fit(part) for part in w.split(16, dim=1)]
        assert torch.equal(usual.scales, torch.cat([at.scale for at in placed], dim=1))


def test_a_grid_is_asked_with_weights_only_when_searching() -> None:
    class Asked(UniformGrid):
        def fit(self, w: Tensor, weight: Tensor | None = None, *, norm: float = 2.0) -> Affine:
            seen.append((weight, norm))
            return super().fit(w, weight, norm=norm)

    w, h = correlated(4, 20, seed=3)
    r = factorize(h, 0.01)
    assert r is not None
    energy = list(r.r.diagonal().square().split(8))
    for order in ORDERS:
        for search in ("none", "mse", "hessian"):
            seen: list[tuple[Tensor | None, float]] = []
            gptq(w, h, Asked(3, True), 8, order=order, scale_search=search, search_norm=2.4)
            if search == "none":
                assert seen == [(None, 2.0)] * 3
                continue
            weights, norms = zip(*seen, strict=True)
            assert norms == ({"mse": 2.4, "hessian": 2.0}[search],) * 3
            assert sorted(len(weight) for weight in weights) == [4, 8, 8]
            assert search == "hessian" or all((weight == 1).all() for weight in weights)
            if (search, order) == ("hessian", "natural"):
                assert all(torch.equal(weight, own) for weight, own in zip(weights, energy, strict=True))
