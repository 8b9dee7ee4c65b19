"""Rescaling against a slow reference in float64, and what it must refuse."""

import importlib
from dataclasses import replace

import pytest
import torch
from refine_cases import different_rows, losses, problem, run, same
from rescale_reference import one_pass
from torch import Tensor

from llmq.descent import begin, complete, descend
from llmq.grids.uniform import UniformGrid
from llmq.refine.rescale import rescale
from llmq.types import Affine, QuantizedWeight

# the package gives its name to the function, so that the module is found only by importing it
rescale_module = importlib.import_module("llmq.refine.rescale")

both_signs = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
STEP = 2.0**-7  # between the storable scales of [1, 2)
H = torch.tensor([[1.0, 0.9], [0.9, 1.0]])


@both_signs
@pytest.mark.parametrize("start", ["rtn", "random"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("k", "group_size"), [(1, 1), (6, 6), (33, 8), (45, 41), (24, 32)], ids=str)
def test_one_pass_is_that_of_the_reference(k: int, group_size: int, bits: int, start: str, symmetric: bool) -> None:
    q, w, h = problem(6, k, group_size, bits, symmetric, start=start, seed=k)
    expected = one_pass(q.codes, q.scales, q.zeros, group_size, bits, symmetric, w, h)
    assert expected.clear.any(), "no row is clear of ties"
    found = run(rescale, q, w, h)
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(found, name)[expected.clear].double(), getattr(expected, name)[expected.clear])


@both_signs
@pytest.mark.parametrize("bits", [2, 3])
def test_it_goes_on_where_descent_ends(bits: int, symmetric: bool) -> None:
    q, w, h = problem(32, 64, 16, bits, symmetric, seed=4)
    for _ in range(50):
        q, before = descend(q, w, h), q
        if same(q, before):
            break
    assert same(q, before)
    assert losses(run(rescale, q, w, h), w, h).sum() < 0.96 * losses(q, w, h).sum()


@pytest.mark.parametrize(("entries", "leaf"), [(1, 32), (500, 32), (2**21, 1), (2**21, 7)], ids=str)
def test_where_the_work_is_split_changes_nothing(monkeypatch: pytest.MonkeyPatch, entries: int, leaf: int) -> None:
    q, w, h = problem(24, 70, 48, 3, False, start="random", seed=1)
    usual = run(rescale, q, w, h)
    monkeypatch.setattr(rescale_module, "_ENTRIES", entries)
    monkeypatch.setattr(rescale_module, "_LEAF", leaf)
    assert different_rows(usual, run(rescale, q, w, h)) <= 1


@pytest.mark.parametrize(("factor", "move"), [(0.94, 0), (1.06, 0), (1.0, 1), (1.0, -1)], ids=str)
def test_a_placement_nearby_is_found_at_once(factor: float, move: int) -> None:
    # the weight lies on its own grid: with the codes of another, the first visit brings it back
    codes = torch.arange(16, dtype=torch.uint8)[None].repeat(1, 2)
    grid = UniformGrid(4, symmetric=False)
    scale = grid.storable(torch.tensor([[0.5]]) * factor)
    home = QuantizedWeight(codes, scale, torch.full((1, 1), 7.0 + move), grid, 32)
    away = replace(home, scales=torch.tensor([[0.5]]), zeros=torch.full((1, 1), 7.0), codes=(codes + 1) % 16)
    _, _, h = problem(1, 32, 32, 4, False, seed=5)
    assert same(run(rescale, away, home.dequantize(), h), home)


@both_signs
def test_zeros_stay_codes(symmetric: bool) -> None:
    # a weight beyond both ends of the grid tempts the zero to leave it
    for sign in (1.0, -1.0):
        q, w, h = problem(8, 32, 16, 2, symmetric, seed=6)
        q = replace(q, zeros=q.zeros if symmetric else torch.full_like(q.zeros, 0.0 if sign > 0 else 3.0))
        for _ in range(3):
            q = run(rescale, q, sign * w.abs() - 0.1 * sign, h)
        assert q.zeros.min() >= 0
        assert q.zeros.max() <= 3


def test_scales_stay_below_the_largest_of_float16() -> None:
    q, w, h = problem(8, 32, 16, 3, True, seed=7)
    q = replace(q, scales=torch.full_like(q.scales, 64000.0))
    found = run(rescale, q, 1e6 * w, h)
    assert found.scales.abs().max() == 64000


@pytest.mark.parametrize("kind", ["dead", "none"])
def test_groups_without_energy_stay(kind: str) -> None:
    q, w, h = problem(8, 48, 16, 3, False, kind, start="random", seed=2)
    h[16:32], h[:, 16:32] = 0.0, 0.0
    found = run(rescale, q, w, h)
    assert torch.equal(found.codes[:, 16:32], q.codes[:, 16:32])
    assert torch.equal(found.scales[:, 1], q.scales[:, 1])
    assert same(found, q) == (kind == "none")


@both_signs
def test_codes_at_zero_keep_a_finite_scale(symmetric: bool) -> None:
    # u = 0 wherever the weight is 0: no scale is better than another
    q, w, h = problem(8, 48, 16, 3, symmetric, seed=1)
    w[:, 16:32] = 0.0
    h[16:32, :16], h[:16, 16:32], h[16:32, 32:], h[32:, 16:32] = 0.0, 0.0, 0.0, 0.0
    q = replace(q, codes=torch.cat([q.codes[:, :16], q.zeros[:, 1:2].expand(-1, 16).byte(), q.codes[:, 32:]], dim=1))
    found = run(rescale, q, w, h)
    assert torch.equal(found.scales[:, 1], q.scales[:, 1])
    assert not found.dequantize()[:, 16:32].any()


def refitted(units: list[float], scale: float, w: list[float]) -> float:
    """Return the scale of one group with these codes (minus their zero) after its refit under `H`."""
    values = torch.tensor(units)[:, None] * scale
    gradient = H @ (torch.tensor(w)[:, None] - values)
    at = Affine(torch.tensor([scale]), torch.tensor([4.0]))
    found, at = rescale_module._refitted(values, gradient, H, UniformGrid(3, symmetric=True), at)
    assert torch.equal(found, torch.tensor(units)[:, None] * at.scale)
    return at.scale.item()


def test_the_refit_is_least_squares() -> None:
    # w = 1.25 u plus what is orthogonal to it under H: (1, -1) to (1, 1)
    assert refitted([1.0, 1.0], 1.0, [1.25 + 0.3, 1.25 - 0.3]) == 1.25
    assert refitted([1.0, 1.0], -1.0, [-1.25 + 0.3, -1.25 - 0.3]) == -1.25


def test_a_refit_that_is_no_better_once_rounded_is_refused() -> None:
    assert refitted([1.0, 1.0], 1.0, [1 + 0.4 * STEP, 1 + 0.4 * STEP]) == 1.0
    assert refitted([1.0, 1.0], 1.0, [1 + 0.6 * STEP, 1 + 0.6 * STEP]) == 1 + STEP


def test_a_refit_that_only_ties_is_refused() -> None:
    assert refitted([1.0, 1.0], 1 + STEP, [1 + STEP / 2, 1 + STEP / 2]) == 1 + STEP
    assert refitted([1.0, 1.0], 1.0, [1 + STEP / 2, 1 + STEP / 2]) == 1.0


def test_a_scale_above_the_limit_of_refits_is_not_pulled_below_it_at_a_loss() -> None:
    assert refitted([1.0, 1.0], 65280.0, [7e4, 7e4]) == 65280
    assert refitted([1.0, 1.0], 65280.0, [5e4, 5e4]) == torch.tensor(5e4).bfloat16().item()


def test_a_refit_goes_half_the_scale_at_most() -> None:
    assert refitted([1.0, 1.0], 1.0, [7.0, 7.0]) == 1.5
    assert refitted([1.0, 1.0], 1.0, [-7.0, -7.0]) == 0.5
    assert refitted([1.0, 1.0], -1.0, [7.0, 7.0]) == -0.5


def test_negative_scales_survive() -> None:
    q, w, h = problem(24, 48, 16, 3, True, seed=3)
    assert 0.3 < (q.scales < 0).float().mean() < 0.7
    found = run(rescale, q, w, h)
    assert torch.equal(found.scales.sign(), q.scales.sign())
    assert losses(found, w, h).sum() < 0.95 * losses(q, w, h).sum()


def test_rows_may_take_what_others_refuse() -> None:
    q, w, h = problem(16, 32, 16, 3, False, seed=9)
    for _ in range(30):
        q = run(rescale, q, w, h)
    w[::2] += 0.3 * torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    before = complete(begin(q, w, h))
    after = rescale(before)
    moved: Tensor = (after.values != before.values).any(0)
    assert moved[::2].all()
    assert not moved[1::2].any()
