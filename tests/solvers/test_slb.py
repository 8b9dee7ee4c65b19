"""Searched low-bit weights: candidates, the exact gradient, the limit of the temperature, and what it gains."""

import sys

import pytest
import torch
from solver_cases import correlated, losses

from llmq.grids import GRIDS, make_grid
from llmq.grids.uniform import UniformGrid
from llmq.solvers.bitsplit import metric
from llmq.solvers.rtn import rtn
from llmq.solvers.slb import Candidates, _descend_, _spacing, candidates, logit_gradient, mixture, slb
from llmq.solvers.weighted_rtn import weighted_rtn
from llmq.types import Affine, Grid

ALL: dict[str, Grid] = {
    f"{name}-{bits}-{symmetric}": make_grid(name, bits, symmetric)
    for name, row in GRIDS.items()
    for bits in sorted({row.bits[0], row.bits[-1], 4} & set(row.bits))
    for symmetric in row.symmetric
}
every_grid = pytest.mark.parametrize("grid", ALL.values(), ids=ALL.keys())
uniform = pytest.mark.parametrize(
    "grid",
    [UniformGrid(bits, sym) for bits in (2, 3, 4, 5, 6, 8) for sym in (True, False)],
    ids=lambda g: f"{g.bits}-{'sym' if g.symmetric else 'asym'}",
)


def levels_of(grid: Grid, at: Affine) -> list[float]:
    """Return all levels of one group, each once, rising."""
    codes = torch.arange(2**grid.bits, dtype=torch.uint8)[None]
    values = grid.decode(codes, at)
    return sorted({float(v) for v, own in zip(values[0], grid.encode(values, at)[0] == codes[0], strict=True) if own})


@every_grid
def test_candidates_are_all_levels_or_the_two_around_the_weight(grid: Grid) -> None:
    w, _ = correlated(4, 21, seed=5)
    own = grid.adapted(w)
    start = rtn(w, None, own, 8).weight
    there = candidates(start, w)
    assert there.codes.dtype == torch.uint8
    for i in range(len(w)):
        for j in range(w.shape[1]):
            levels = None if start.levels is None else start.levels[i, j // 8][None, None]
            at = Affine(start.scales[i, j // 8].view(1, 1), start.zeros[i, j // 8].view(1, 1), levels)
            known, v = levels_of(own, at), float(w[i, j])
            found = sorted(float(x) for x in there.values[:, i, j][there.given[:, i, j]])
            decoded = own.decode(there.codes[:, i, j][None], at)[0]
            assert torch.equal(decoded, there.values[:, i, j])
            if own.bits <= 3:
                assert found == known
            else:
                below, above = [x for x in known if x <= v], [x for x in known if x >= v]
                assert found == sorted({*below[-1:], *above[:1]})
    spacing = _spacing(there)
    assert torch.equal(spacing > 0, there.given.sum(0) > 1)


def test_the_spacing_is_the_mean_distance_of_candidates() -> None:
    values = torch.tensor([-1.0, 0.0, 3.0, 9.0]).view(4, 1, 1)
    given = torch.tensor([True, True, True, False]).view(4, 1, 1)
    assert _spacing(Candidates(values.byte(), values, given)).item() == 2.0


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.05])
def test_the_gradient_is_autograds(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, values = (torch.randn(5, 3, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    logits[4, 0] = -torch.inf
    w, h = (t.double() for t in correlated(3, 7))
    free = logits.clone().requires_grad_()
    weight = (torch.softmax(free / temperature, 0) * values).sum(0)
    (((weight - w) @ h) * (weight - w)).sum().backward()
    share, mixed = mixture(logits, values, temperature)
    assert torch.equal(mixed, weight)
    found = logit_gradient(share, values, mixed, 2 * (mixed - w) @ h, temperature)
    torch.testing.assert_close(found, free.grad, rtol=1e-12, atol=1e-12)
    assert not found[4, 0].any()


def test_probabilities_sum_to_one_and_the_cold_mixture_is_a_candidate() -> None:
    draw = torch.Generator().manual_seed(1)
    logits, values = (torch.randn(8, 3, 50, generator=draw) for _ in range(2))
    best = values.gather(0, logits.argmax(0, keepdim=True))[0]
    two = logits.topk(2, dim=0).values
    gap = float((two[0] - two[1]).min())
    off = []
    for temperature in (1.0, 0.1, 0.01, gap / 40):
        share, mixed = mixture(logits, values, temperature)
        # eight float32 numbers
        assert (share.sum(0) - 1).abs().max() <= 8 * 2.0**-23
        assert (share >= 0).all()
        off.append(float((mixed - best).abs().max()))
    assert off == sorted(off, reverse=True)
    # seven others of at most exp(-40) each
    assert off[-1] <= 7 * 4.3e-18 * 10 + 2.0**-22


def test_adam_takes_the_steps_of_its_formulas() -> None:
    # the whole descent again in float64, with autograd, for so few steps that last digits mean nothing
    w, h = correlated(2, 12, seed=4)
    start = weighted_rtn(w, h, UniformGrid(3, False), 6).weight
    there = candidates(start, w)
    unit = _spacing(there)
    logits = -(w - there.values).abs() / unit
    expected = logits.double().requires_grad_()
    energy = (unit.double().square() @ h.double().diagonal())[:, None] / 12
    optimizer = torch.optim.Adam([expected], lr=0.2)
    for step in range(4):
        share = torch.softmax(expected / 0.02 ** (step / 3), 0)
        error = (share * there.values.double()).sum(0) - w.double()
        optimizer.zero_grad()
        ((error @ h.double()) * error / energy).sum().backward()
        optimizer.step()
    _descend_(logits, there.values, w, h, unit, steps=4)
    torch.testing.assert_close(logits.double(), expected.detach(), rtol=1e-3, atol=1e-3)


@every_grid
def test_no_row_loses_by_the_search(grid: Grid) -> None:
    w, h = correlated(6, 40, seed=6)
    own = grid.adapted(w)
    start = weighted_rtn(w, h, own, 16).weight
    solution = slb(w, h, own, 16)
    found, damped = solution.weight, metric(h, 0.01)
    before, after = losses(w, damped, start), losses(w, damped, found)
    changed = (found.codes != start.codes).any(1)
    # sums in float32 compare them
    assert (after[changed] < before[changed] * (1 + 1e-6)).all()
    assert torch.equal(found.scales, start.scales)
    assert torch.equal(found.zeros, start.zeros)
    assert solution.damp_percent == 0.01
    for g in range(3):
        levels = None if found.levels is None else found.levels[:, g, None]
        at = Affine(found.scales[:, g, None], found.zeros[:, g, None], levels)
        codes = found.codes[:, 16 * g : 16 * g + 16]
        assert torch.equal(own.encode(own.decode(codes, at), at), codes)


@uniform
def test_the_search_gains_on_correlated_inputs(grid: Grid) -> None:
    # 0.62 to 0.78 of rounding to nearest on the same scales is measured
    w, h = correlated(16, 64, seed=7)
    before = losses(w, h, weighted_rtn(w, h, grid, 32).weight).sum()
    assert losses(w, h, slb(w, h, grid, 32).weight).sum() < 0.9 * before


def test_rows_by_themselves_and_other_scales_of_the_hessian_lose_as_much() -> None:
    # codes hang on last digits, the sum of 24 rows' losses hardly
    w, h = correlated(24, 64, seed=8)
    grid = UniformGrid(3, True)
    whole = losses(w, h, slb(w, h, grid, 32).weight).sum()
    parts = torch.cat([losses(part, h, slb(part, h, grid, 32).weight) for part in w.split([5, 19])]).sum()
    scaled = losses(w, h, slb(w, 3.7e4 * h, grid, 32).weight).sum()
    for other in (parts, scaled):
        assert abs(other / whole - 1) < 0.1


def test_rows_are_searched_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = correlated(7, 24)
    alone = torch.cat([slb(row[None], h, UniformGrid(2, True), 8).weight.codes for row in w])
    monkeypatch.setattr(sys.modules["llmq.solvers.slb"], "_ENTRIES", 4 * 24)
    assert torch.equal(slb(w, h, UniformGrid(2, True), 8).weight.codes, alone)


@pytest.mark.parametrize(("bits", "each"), [(2, 4), (3, 8), (4, 2)])
def test_pieces_have_so_many_logits(bits: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = correlated(7, 24)
    pieces, module = [], sys.modules["llmq.solvers.slb"]
    monkeypatch.setattr(module, "_ENTRIES", 2 * each * 24 + 1)  # those of two rows
    monkeypatch.setattr(module, "_searched", lambda start, rows, _: pieces.append(len(rows)) or start)
    assert slb(w, h, UniformGrid(bits, True), 8).weight.codes.shape == w.shape
    assert pieces == [2, 2, 2, 1]


def test_inputs_that_never_occur_stay_rounded_to_nearest() -> None:
    w, h = correlated(6, 48)
    h[[3, 40]], h[:, [3, 40]] = 0.0, 0.0
    for bits in (2, 4):
        grid = UniformGrid(bits, False)
        start = weighted_rtn(w, h, grid, 16).weight
        found = slb(w, h, grid, 16).weight
        assert torch.equal(found.codes[:, [3, 40]], start.codes[:, [3, 40]])
        assert (found.codes != start.codes).any()
