"""Small floats and their scales, and the grids of one and two bits: published values, and the best placement."""

import math

import pytest
import torch
from grid_cases import TABLES, errors, heavy, used
from torch import Tensor

from llmq.errors import SolverError
from llmq.grids import make_grid
from llmq.grids.float4 import E2M1
from llmq.grids.float_scales import shared_unit
from llmq.grids.low import _PARTS as LOW_PARTS
from llmq.grids.scales import MIN_SCALE
from llmq.grids.table import TableGrid
from llmq.types import Affine

# --- small floats

BLOCK = torch.tensor([[0.9, -0.31, 0.07, 5, 2.2, -7, 0.5, 1.1]])


def test_mxfp4_vector() -> None:
    grid = make_grid("mxfp4", 4, True)
    at = grid.fit(BLOCK)
    assert at.scale.item() == 1
    assert grid.nearest(BLOCK, at)[0].tolist() == [1, -0.5, 0, 4, 2, -6, 0.5, 1]


def test_nvfp4_vector() -> None:
    grid = make_grid("nvfp4", 4, True)
    unrounded = Affine(torch.tensor([[7 / 6]]), torch.zeros(1, 1))
    expected = [1.1667, -0.5833, 0, 4.6667, 2.3333, -7, 0.5833, 1.1667]
    assert grid.nearest(BLOCK, unrounded)[0].tolist() == pytest.approx(expected, abs=6e-5)
    assert grid.fit(BLOCK).scale.item() == 1.125  # 7/6 to four bits
    assert grid.storable(torch.tensor([1.19, 1.1, 1.18])).tolist() == [1.25, 1.125, 1.125]  # to the nearest


def test_e2m1_levels_are_those_of_the_format() -> None:
    values = {(1 if e else 0) * 2.0 ** (max(e, 1) - 1) + m * 2.0 ** (max(e, 1) - 2) for e in range(4) for m in (0, 1)}
    assert sorted(values) == list(E2M1)
    for name in ("fp4", "mxfp4", "nvfp4"):
        assert make_grid(name, 4, True).choices[0] == (*(-v for v in E2M1[:0:-1]), *E2M1)


def test_nf4_is_the_quantiles_of_the_paper() -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    end = 0.9677083  # the paper's offset: the outermost quantiles
    positive = normal.icdf(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    expected = torch.tensor(make_grid("nf4", 4, True).choices[0], dtype=torch.float64)
    torch.testing.assert_close(expected, levels / levels.max(), rtol=0, atol=2e-6)
    assert torch.equal(expected.float().double(), expected)  # printed digits are those of float32 numbers


def test_mxfp4_scales_are_powers_of_two() -> None:
    grid = make_grid("mxfp4", 4, True)
    scale = torch.tensor([[1.0], [1.49], [1.5], [3.2], [0.74], [2.0**-30], [-1.0]])
    assert grid.storable(scale)[:, 0].tolist() == [1, 1, 2, 4, 0.5, MIN_SCALE, MIN_SCALE]
    extremes = torch.tensor([[4.0], [7.99], [8.0], [3.99], [6.0]])
    assert grid.fit(extremes).scale[:, 0].tolist() == [1, 1, 2, 0.5, 1]
    w, weight = heavy(64, 32, 5)
    base = grid.fit(w).scale
    steps = (grid.fit(w, weight).scale / base).unique().tolist()
    assert set(steps) <= {2.0, 1.0, 0.5, 0.25}
    assert len(steps) > 1
    # 7.9 is cut to 6 scales of 1, and next to 4 of 2
    assert grid.fit(torch.tensor([[7.9, 0.0]]), torch.ones(2)).scale.item() == 2


@pytest.mark.parametrize("size", [1.0, 1e-4])  # of small weights, E4M3 goes below the least scale
def test_nvfp4_scales_are_e4m3_under_one_power_of_two(size: float) -> None:
    grid = make_grid("nvfp4", 4, True)
    w, weight = heavy(64, 16, 6)
    w *= size
    w[3] = 0
    w[5] *= 1e-4
    adapted = grid.adapted(w)
    assert isinstance(adapted, TableGrid)
    unit = adapted.rule.unit  # type: ignore[attr-defined]
    assert math.frexp(unit)[0] == 0.5
    largest = w.abs().max().item() / 6
    assert 224 < largest / unit <= 448
    for found in (adapted.fit(w).scale, adapted.fit(w, weight).scale):
        assert torch.equal((found / unit).to(torch.float8_e4m3fn).float() * unit, found)
        assert (found >= MIN_SCALE).all()
        assert torch.equal(found, found.half().float())
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()[:, None] * unit
    kept = every.clamp(min=MIN_SCALE)
    assert torch.equal(adapted.storable(every), kept)
    assert adapted.storable(torch.tensor([[1e9]])).item() == 448 * unit  # there is no larger one
    assert torch.equal(grid.adapted(w).storable(every), grid.adapted(2 * w / 2).storable(every))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named_by_the_group_that_has_it(bad: float) -> None:
    w = torch.tensor([[1.0, 2.0], [bad, 3.0]])
    grid = make_grid("nvfp4", 4, True).adapted(w)
    grid.fit(w[:1])
    with pytest.raises(SolverError, match="the weight has NaN or infinity"):
        grid.fit(w)


def test_the_power_of_a_weight_is_the_least() -> None:
    assert [shared_unit(x) for x in (448.0, 448.5, 224.0, 224.5, 896.0)] == [1.0, 2.0, 0.5, 1.0, 2.0]
    assert shared_unit(0.0) == MIN_SCALE / 256


def test_nvfp4_search_visits_every_scale_down_to_a_fifth() -> None:
    rule = make_grid("nvfp4", 4, True).adapted(torch.full((1, 1), 6.0 * 448)).rule  # type: ignore[attr-defined]
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for extreme in (448.0, 100.0, 13.0, 9.0):
        tried = {rule.spanning(torch.tensor([[6 * extreme * f]]), 6.0).item() for f in rule.factors}
        base = rule.storable(torch.tensor(extreme)).item()
        assert {s for s in every.tolist() if 0.25 * base <= s <= base} <= tried
        assert base == 448 or max(tried) > base


# --- low end


def brute_ternary(a: Tensor, weight: Tensor) -> float:
    """Return the least weighted squared error of 0 and ±s for the magnitudes `a`, over all sets of the largest."""
    order = a.argsort(descending=True)
    a, weight = a[order], weight[order]
    found = [(weight * a.square()).sum().item()]
    for k in range(1, len(a) + 1):
        if weight[:k].sum() > 0:
            s = (weight[:k] * a[:k]).sum() / weight[:k].sum()
            found.append((weight * (a - torch.where(torch.arange(len(a)) < k, s, 0.0)).square()).sum().item())
    return min(found)


def brute_residual(a: Tensor, weight: Tensor) -> float:
    """Return the least weighted squared error of two magnitudes for `a`, over all ways to cut the sorted ones."""
    order = a.argsort()
    a, weight, found = a[order], weight[order], []
    for k in range(len(a)):
        loss = 0.0
        for part in (slice(0, k), slice(k, len(a))):
            mass = weight[part].sum()
            if mass > 0:
                loss += (weight[part] * (a[part] - (weight[part] * a[part]).sum() / mass).square()).sum().item()
        found.append(loss)
    return min(found)


@pytest.mark.parametrize("size", [1, 2, 5, 30])
@pytest.mark.parametrize("seed", range(4))
def test_low_grids_are_placed_where_they_lose_least(size: int, seed: int) -> None:
    w, weight = heavy(6, size, seed)
    weight[0] = 1.0
    for importance in (weight, torch.ones(size)):
        mass = importance.double().sum().item()
        for row in w:
            a = row.abs().double()
            given = importance if importance is weight else None
            for name, least in (
                ("ternary", brute_ternary(a, importance.double())),
                ("residual_binary", brute_residual(a, importance.double())),
                ("binary", (importance.double() * (a - (importance.double() @ a) / mass).square()).sum().item()),
            ):
                grid = TABLES[next(n for n in TABLES if n.startswith(f"{name}-"))]
                at = grid.fit(row[None], given)
                found = errors(grid, row[None], importance, at).item()
                # off the minimum by the rounding of a level, d, a row loses d² times its mass: 2^-8 of the scale, and
                # half a 32nd of it for the inner level of two
                off = at.scale.item() * (2.0**-8 + (0.5 / LOW_PARTS if name == "residual_binary" else 0.0))
                assert found <= least + mass * off**2 * (1 + 1e-3) + 1e-6 * mass * a.max().item() ** 2
                if name != "residual_binary" or at.zero.item():
                    assert found >= least - 1e-9 * mass


def test_binary_scales_by_the_mean_magnitude() -> None:
    at = make_grid("binary", 1, True).fit(torch.tensor([[1.0, -2.0, 3.0, -2.0]]))
    assert at.scale.item() == 2.0
    at = make_grid("binary", 1, True).fit(torch.tensor([[1.0, -3.0]]), torch.tensor([3.0, 1.0]))
    assert at.scale.item() == 1.5


def test_residual_binary_of_two_magnitudes_is_exact() -> None:
    w = torch.tensor([[1.0, -0.25, 0.25, -1.0], [3.0, 3.0, -3.0, 3.0], [2.0, 0.0, -2.0, 0.0]])
    grid = make_grid("residual_binary", 2, False)
    assert torch.equal(grid.nearest(w, grid.fit(w)), w)


@pytest.mark.parametrize("name", ["ternary-2-sym", "binary-1-sym", "residual_binary-2-asym"])
def test_without_importances_it_is_the_squared_error_that_is_least(name: str) -> None:
    w, _ = heavy(400, 6, 7)
    found, other = TABLES[name].fit(w), TABLES[name].fit(w, norm=4.0)
    assert torch.equal(found.scale, other.scale)
    assert torch.equal(found.zero, other.zero)


def test_residual_binary_tries_the_inner_levels_beside_the_nearest() -> None:
    # its ratio is 24.4997 / 32; under scales of eight bits 25 / 32 is a fifth better than 24 / 32, and best of all
    w, weight = torch.tensor([[-1.6013, 2.1296, 1.6435]]), torch.tensor([1.4676, 25.646, 3.2802])
    grid = make_grid("residual_binary", 2, False)
    assert isinstance(grid, TableGrid)
    every = [
        Affine(torch.tensor([[2 + step / 64]]), torch.tensor([[float(table)]]))
        for step in range(20)
        for table in range(32)
    ]
    best = min(every, key=lambda at: errors(grid, w, weight, at).item())
    assert grid.fit(w, weight)[:2] == (best.scale, best.zero)


def test_levels_of_low_grids() -> None:
    assert make_grid("ternary", 2, True).choices == ((-1.0, 0.0, 1.0),)
    assert make_grid("binary", 1, True).choices == ((-1.0, 1.0),)
    grid = make_grid("residual_binary", 2, False)
    assert grid.zeros == (0, 31)
    assert used(grid, Affine(torch.ones(1, 1), torch.zeros(1, 1))).numel() == 3
    assert grid.choices[8] == (-1.0, -0.25, 0.25, 1.0)
