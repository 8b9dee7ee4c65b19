"""Grids whose levels stand in tables: ties, searches, and the published values of each."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from grid_cases import FITTED, TABLES, errors, every_table, heavy
from torch import Tensor

from llmq.grids import make_grid
from llmq.grids.float4 import E2M1
from llmq.grids.log import from_sign_magnitude, sign_magnitude
from llmq.grids.piecewise import gaussian_breakpoint, laplace_breakpoint
from llmq.grids.powers import additive
from llmq.grids.rank import rank
from llmq.grids.scales import MAX_SCALE
from llmq.grids.table import TableGrid
from llmq.types import Affine

SEARCHED = {name: grid for name, grid in TABLES.items() if grid.name not in FITTED and grid.symmetric}
PIECEWISE = {name: grid for name, grid in TABLES.items() if grid.name.startswith("pwlq")}


@every_table
def test_levels_rise_and_fit_their_codes(grid: TableGrid) -> None:
    for levels in grid.choices:
        assert list(levels) == sorted(set(levels))
        assert 2 <= len(levels) <= 2**grid.bits
        assert grid.symmetric or (levels[0], levels[-1]) == (-1.0, 1.0)
    assert grid.tables.shape == (len(grid.choices), 2**grid.bits)
    assert (grid.tables.diff(dim=1) >= 0).all()


def test_the_outermost_level_spans_a_group_on_whichever_side_it_is() -> None:
    for levels in ((-3.0, -1.0, 0.0, 1.0), (-1.0, 0.0, 1.0, 3.0)):
        grid = TableGrid("lopsided", 2, (levels,))
        assert grid.top == 3
        assert grid.fit(torch.tensor([[6.0, -1.0]])).scale.item() == 2


def ties_up(grid: TableGrid, low: float, high: float) -> bool:
    """Return whether a tie between two neighbours goes to the upper one, by the rule of the grid."""
    if grid.tables.shape == (1, 16) and grid.top == 6:  # E2M1: the even mantissa, 0, 1, 2 and 4
        return abs(high) in E2M1[::2]
    if 0.0 in (low, high) and grid.name == "log":  # upwards, so that positive and negative differ
        return True
    return low + high < 0 or grid.name == "binary"


@every_table
def test_ties_go_where_the_grid_says(grid: TableGrid) -> None:
    for table, levels in enumerate(grid.choices):
        at = Affine(torch.ones(1, 1), torch.tensor([[float(table)]]))
        for code, (low, high) in enumerate(itertools.pairwise(levels)):
            middle = torch.tensor((low + high) / 2, dtype=torch.float64)
            if middle.float().double() != middle or 2 * middle.item() != low + high:
                continue
            assert grid.encode(middle.float()[None, None], at).item() == code + ties_up(grid, low, high)


@pytest.mark.parametrize("count", [3, 15, 16, 17, 40])
@pytest.mark.parametrize("several", [False, True])
def test_ranks_count_the_bounds_below(count: int, several: bool) -> None:
    draw = torch.Generator().manual_seed(count)
    bounds = (2 * torch.rand(5, count, generator=draw) - 1).sort(dim=1).values
    bounds[1, count // 2 :] = torch.inf
    u = torch.cat([torch.randn(5, 30, generator=draw), bounds[:, :1], torch.full((5, 1), 9.0)], dim=1)
    table = torch.arange(5.0)[:, None] if several else None
    own = bounds if several else bounds[:1]
    assert torch.equal(rank(u, own, table), (u[:, :, None] > own[:, None, :]).sum(2).int())


@pytest.mark.parametrize("name", SEARCHED)
def test_the_search_takes_the_best_of_its_spans(name: str) -> None:
    grid = SEARCHED[name]
    w, weight = heavy(8, 24, 0)
    top, extreme = max(map(abs, grid.choices[0])), w.abs().amax(1, keepdim=True)
    tried = [grid.rule.spanning(extreme * factor, top) for factor in grid.rule.factors]
    assert torch.equal(tried[0], grid.fit(w).scale)
    every = torch.stack([errors(grid, w, weight, Affine(scale, torch.zeros(8, 1))) for scale in tried])
    found = errors(grid, w, weight, grid.fit(w, weight))
    # sums of 24 squares in float32, and bounds rounded to float32 beside that
    assert (found <= every.amin(0) * (1 + 80 * 2.0**-24)).all()
    assert {s.item() for s in grid.fit(w, weight).scale} <= {s.item() for scale in tried for s in scale}


@pytest.mark.parametrize("name", [n for n, g in SEARCHED.items() if g.bits <= 4 and g.name != "mxfp4"])
def test_the_search_pays_on_heavy_tails(name: str) -> None:
    grid = SEARCHED[name]
    w, weight = heavy(64, 40, 1)
    assert errors(grid, w, weight, grid.fit(w, weight)).sum() < 0.95 * errors(grid, w, weight, grid.fit(w)).sum()


@pytest.mark.parametrize("name", SEARCHED)
def test_spans_down_to_a_quarter_are_tried(name: str) -> None:
    # an outlier without importance has four times the span of the rest
    grid, rest = SEARCHED[name], torch.linspace(-1, 1, 41)[None]
    w, weight = torch.cat([rest, torch.full((1, 1), 4.0)], dim=1), torch.ones(42)
    weight[41] = 0
    alone = errors(grid, rest, torch.ones(41), grid.fit(rest)).item()
    # spans are a sixteenth apart or less: 1.00 times the error of the rest is the most that is measured
    assert errors(grid, w, weight, grid.fit(w, weight)).item() <= 1.05 * alone


@pytest.mark.parametrize("norm", [1.0, 3.0])
@every_table
def test_the_search_lowers_the_power_it_is_given(grid: TableGrid, norm: float) -> None:
    w, weight = heavy(8, 24, 2)
    found, full = (errors(grid, w, weight, at, norm) for at in (grid.fit(w, weight, norm=norm), grid.fit(w)))
    assert (found <= full * (1 + 80 * 2.0**-24)).all()


# --- log


def documented(x: Tensor, clip: float) -> Tensor:
    """Return the values that the chip's documentation gives `x`, float64: logarithms are rounded."""
    z = round(16 * math.log2(clip)) - 127
    i = torch.round(16 * x.abs().log2()) - z
    positive = torch.exp2((i.clamp(0, 127) + z) / 16)
    negative = -torch.exp2((i.clamp(1, 127) + z) / 16)
    found = torch.where(x < -(2 ** ((z + 1) / 16 - 1)), negative, 0.0)
    return torch.where(x >= 2 ** (z / 16 - 1), positive, found)


UNIT = Affine(torch.ones(1, 1), torch.zeros(1, 1))


def test_log_vector() -> None:
    x = torch.tensor([[1, 0.9, 0.5, 0.1, 0.004, 0.002, -0.0021, -0.0022]])
    expected = [1, 0.917004, 0.5, 0.100656, 0.004079, 0, 0, -0.00426]
    assert make_grid("log", 8, True).nearest(x, UNIT)[0].tolist() == pytest.approx(expected, abs=5e-6)
    assert documented(x[0].double(), 1.0).tolist() == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("clip", [1.0, 2 ** (3 / 16), 0.25])
def test_log_is_the_documented_form_save_between_the_two_means(clip: float) -> None:
    grid = make_grid("log", 8, True)
    x = (2 * torch.rand(1, 20000, generator=torch.Generator().manual_seed(0)) - 1) ** 3 * 1.2 * clip
    found = grid.nearest(x, Affine(torch.tensor([[clip]]), UNIT.zero))[0].double()
    expected = documented(x[0].double(), clip)
    same = (found - expected).abs() <= 1e-6 * clip
    assert same.double().mean() > 0.99
    # elsewhere ours is the nearer of two neighbours, and x between their means
    a, b, size = found[~same].abs(), expected[~same].abs(), x[0, ~same].double().abs()
    assert (a.maximum(b) / a.minimum(b) - 2 ** (1 / 16)).abs().max() < 1e-5
    assert ((a * b).sqrt() * (1 - 1e-6) <= size).all()
    assert (size <= (a + b) / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_log_codes_have_a_sign_and_a_magnitude(bits: int) -> None:
    grid, half = make_grid("log", bits, True), 2 ** (bits - 1)
    codes = torch.arange(2**bits, dtype=torch.uint8)
    stored = sign_magnitude(codes, bits)
    assert stored.unique().numel() == 2**bits
    assert torch.equal(from_sign_magnitude(stored, bits), codes)
    values = grid.decode(codes[None], UNIT)[0]
    assert values[stored == half].tolist() == [0.0]  # "-0", 0x80 of 8 bits
    assert (values[stored < half] > 0).all()
    assert (values[stored > half] < 0).all()
    order = values[stored > half].abs().argsort()
    assert stored[stored > half][order].tolist() == list(range(half + 1, 2 * half))
    assert values.max() == 1
    assert values.min() == -1


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_log_parts_small_weights_from_zero_by_sign(bits: int) -> None:
    grid = make_grid("log", bits, True)
    lowest = min(level for level in grid.choices[0] if level > 0)
    highest = max(level for level in grid.choices[0] if level < 0)
    assert highest == pytest.approx(-(2 ** (1 / {4: 2, 5: 4, 6: 6, 7: 12, 8: 16}[bits])) * lowest)
    halves = torch.tensor([[lowest / 2, highest / 2]], dtype=torch.float64).float()
    assert grid.nearest(halves, UNIT)[0].tolist() == pytest.approx([lowest, 0.0])
    closer = torch.nextafter(halves, torch.tensor([[0.0, -1.0]]))
    assert grid.nearest(closer, UNIT)[0].tolist() == pytest.approx([0.0, highest])


def test_log_clips_are_powers_of_a_sixteenth() -> None:
    grid = make_grid("log", 8, True)
    scale = torch.logspace(-4, 4, 101, base=10.0)[:, None]
    power = grid.storable(scale).log2() * 16
    moved = 2.0**-8 / math.log(2) + 1e-5  # by eight significant bits, in octaves
    assert (power - power.round()).abs().max() <= 16 * moved
    assert ((grid.storable(scale) / scale).log2().abs() <= 1 / 32 + moved).all()
    assert torch.equal(grid.storable(-scale), -grid.storable(scale))


def test_log_ratios() -> None:
    for bits, steps in {4: 2, 5: 4, 6: 6, 7: 12, 8: 16}.items():
        positive = [level for level in make_grid("log", bits, True).choices[0] if level > 0]
        assert len(positive) == 2 ** (bits - 1)
        assert [b / a for a, b in itertools.pairwise(positive)] == pytest.approx(
            [2 ** (1 / steps)] * (len(positive) - 1)
        )


# --- pot, apot


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_pot_has_every_power_and_drops_one_of_the_printed_set(bits: int) -> None:
    levels = make_grid("pot", bits, True).choices[0]
    powers = [2.0**-e for e in range(2 ** (bits - 1) - 1)]
    assert sorted(levels) == sorted([0.0, *powers, *(-p for p in powers)])
    assert len(levels) == 2**bits - 1
    printed = {0.0, *(s * 2.0**-e for e in range(2 ** (bits - 1)) for s in (-1, 1))}
    assert len(printed) == 2**bits + 1
    if bits > 3:  # one more bit divides the innermost interval only
        less = make_grid("pot", bits - 1, True).choices[0]
        inner = min(level for level in less if level > 0)
        assert [level for level in levels if abs(level) >= inner] == [level for level in less if level]


def test_additive_sets() -> None:
    expected = [0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48]
    assert additive(2, 2) == pytest.approx([level / 48 for level in expected])
    assert additive(2, 1) == (0.0, 0.25, 0.5, 1.0)
    for k, n, largest in ((2, 2, 1.5), (2, 3, 1.75), (1, 3, 1.75), (3, 2, 1.5), (2, 1, 1.0)):
        levels = additive(k, n)
        assert len(set(levels)) == 2 ** (k * n)
        assert levels[-1] == 1.0
        terms = [[0.0, *(2.0 ** -(i + j * n) for j in range(2**k - 1))] for i in range(n)]
        assert max(sum(choice) for choice in itertools.product(*terms)) == largest


def test_apot_of_four_bits_is_that_of_the_authors() -> None:
    levels = make_grid("apot", 4, True).choices[0]
    assert levels[7:] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1])
    w = torch.tensor([[0.72, -0.05001, 0.0499]])  # linear distance: .72 to .8, though .6 is nearer to it by ratio to 1
    assert make_grid("apot", 4, True).nearest(w, UNIT)[0].tolist() == pytest.approx([0.8, -0.1, 0.0])


def test_powers_are_taken_by_linear_distance() -> None:
    assert make_grid("pot", 4, True).nearest(torch.tensor([[0.72]]), UNIT).item() == 0.5  # log2 rounds to 1


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_apot_uses_all_codes_but_one(bits: int) -> None:
    levels = make_grid("apot", bits, True).choices[0]
    assert len(levels) == 2**bits - 1
    assert [-level for level in reversed(levels)] == list(levels)
    own = bits - 1
    if own % 2 == 0:
        assert list(levels[2**own - 1 :]) == list(additive(2, own // 2))


# --- piecewise linear


def best_breakpoint(m: float, cdf: Callable[[float], float]) -> float:
    """Return where (m - p)² + m (2p - m) (2 F(p) - 1) is least, by ternary search."""

    def loss(p: float) -> float:
        return (m - p) ** 2 + m * (2 * p - m) * (2 * cdf(p) - 1)

    low, high = 0.0, m / 2
    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return low


def gaussian(p: float) -> float:
    return 0.5 * (1 + math.erf(p / math.sqrt(2)))


def laplace(p: float) -> float:
    return 1 - 0.5 * math.exp(-math.sqrt(2) * p)


@pytest.mark.parametrize(
    ("m", "exact", "closed"),
    [(2, 0.8824, None), (3, 1.1583, 1.1607), (4, 1.3920, 1.3996), (6, 1.7547, 1.7538), (10, 2.2096, 2.2216)],
)
def test_breakpoints_of_normal_data(m: float, exact: float, closed: float | None) -> None:
    assert best_breakpoint(m, gaussian) == pytest.approx(exact, abs=6e-5)
    found = gaussian_breakpoint(torch.tensor(float(m), dtype=torch.float64)).item()
    assert found == pytest.approx(exact, abs=0.037 if m == 2 else 0.013)
    assert closed is None or found == pytest.approx(closed, abs=6e-5)


def test_breakpoint_of_laplace_data() -> None:
    assert best_breakpoint(4, laplace) == pytest.approx(1.2909, abs=6e-5)
    assert laplace_breakpoint(torch.tensor(4.0, dtype=torch.float64)).item() == pytest.approx(1.2893, abs=6e-5)


@pytest.mark.parametrize(("m", "ratio"), [(3, 0.2357), (4, 0.1962), (6, 0.1360)])
def test_normal_data_lose_what_the_formula_says(m: int, ratio: float) -> None:
    # the paper's 4 bits, 5 with the region's, of quantiles within [-m, m], against 4 uniform bits
    quantiles = torch.linspace(gaussian(-m), gaussian(m), 40001, dtype=torch.float64)[1:-1]
    w = (math.sqrt(2) * torch.erfinv(2 * quantiles - 1)).float()[None]
    grid = make_grid("pwlq", 5, False)
    table = round(best_breakpoint(m, gaussian) / m * 32) - 1
    at = Affine(torch.tensor([[float(m)]]), torch.tensor([[float(table)]]))
    found = (w - grid.nearest(w, at)).double().square().mean().item()
    # of a step 2 m / 15; levels are not so dense that errors are uniform in each, which the formula supposes
    assert found / ((2 * m / 15) ** 2 / 12) == pytest.approx(ratio, rel=0.1)
    assert found < 9 / 16 * (2 * m / 15) ** 2 / 12


@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_pwlq_has_two_regions_of_equal_steps(bits: int) -> None:
    steps = 2 ** (bits - 2) - 1
    for table, levels in enumerate(make_grid("pwlq", bits, False).choices):
        p = (table + 1) / 32
        assert len(levels) == 2**bits - 3
        positive = list(levels[len(levels) // 2 :])
        inner = [p * i / steps for i in range(steps + 1)]
        assert positive == pytest.approx([*inner, *(p + (1 - p) * i / steps for i in range(1, steps + 1))])


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_overlapping_pwlq_has_both_grids(bits: int) -> None:
    steps = 2 ** (bits - 2) - 1
    for table, levels in enumerate(make_grid("pwlq_overlapping", bits, False).choices):
        p = (table + 1) / 32
        both = {*(p * i / steps for i in range(steps + 1)), *(i / steps for i in range(steps + 1))}
        assert list(levels[len(levels) // 2 :]) == pytest.approx(sorted(both))


@pytest.mark.parametrize("name", [name for name, grid in PIECEWISE.items() if grid.bits <= 6])
def test_breakpoints_are_nearly_the_best_of_all(name: str) -> None:
    grid = PIECEWISE[name]
    w, weight = heavy(6, 128, 3)
    extreme = w.abs().amax(1, keepdim=True)
    scales = [grid.storable(extreme * factor) for factor in grid.rule.factors]
    tables = [torch.full((6, 1), float(table)) for table in range(16)]

    def error(at: Affine) -> Tensor:
        return (grid.nearest(w, at) - w).double().square() @ weight.double()

    every = torch.stack([error(Affine(s, t)) for s, t in itertools.product(scales, tables)])
    # one after another instead of together
    assert error(grid.fit(w, weight)).sum() <= 1.08 * every.amin(0).sum()


def test_the_closed_form_places_what_has_no_importances() -> None:
    draw = torch.Generator().manual_seed(4)
    grid = make_grid("pwlq", 6, False)
    normal, uniform = torch.randn(1, 4000, generator=draw), torch.rand(1, 4000, generator=draw)
    laplacian = torch.distributions.Laplace(0.0, 0.5**0.5).icdf(uniform)
    of = ((normal, gaussian_breakpoint), (laplacian, laplace_breakpoint))
    for unit, (standard, closed) in itertools.product((1.0, 0.02, 30.0), of):
        w = unit * standard
        at = grid.fit(w)
        assert at.scale.item() == pytest.approx(w.abs().max().item(), rel=2.0**-8)
        p = closed(torch.tensor(at.scale.item() / w.std().item())).item() * w.std().item()
        assert at.zero.item() + 1 == pytest.approx(32 * p / at.scale.item(), abs=0.51)


def test_the_search_never_leaves_the_span() -> None:
    # beyond it there may be no scale that float16 holds
    at = make_grid("pwlq", 4, False).fit(torch.tensor([[MAX_SCALE, -MAX_SCALE, 3.0]]), torch.ones(3))
    assert at.scale.item() <= MAX_SCALE
