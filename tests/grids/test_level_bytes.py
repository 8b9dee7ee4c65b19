"""Tables of levels in bytes: the formula by hand, the best of all that there are, there and back, and damage."""

from itertools import product
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import SolverError, SpecError
from llmq.grids import level_bytes
from llmq.grids.level_bytes import LARGEST, from_bytes, nearest_table, power_for, size_of, to_bytes

counts = pytest.mark.parametrize("count", [4, 8, 16])
any_count = st.sampled_from([4, 8, 16])
SHARES = level_bytes._SHARES


def by_hand(stored: list[int]) -> list[float]:
    """Return the levels that the bytes of one table say, as the head of the module has it."""
    power, shift = stored[0] // 4 - 24, stored[0] % 4
    a, b = (byte - 256 if byte > 127 else byte for byte in stored[1:3])
    halves = [half for byte in stored[3:] for half in (byte % 16, byte // 16)]
    levels = [a]
    for share, half in zip(SHARES[len(halves) + 2], halves, strict=True):
        offset = half - 16 if half > 7 else half
        found = 2**shift * (floor((256 * a + share * (b - a)) / (256 * 2**shift) + 0.5) + offset)
        levels.append(max(levels[-1], min(found, b)))
    return [level * 2.0**power for level in (*levels, b)]


def tables(count: int, seed: int, rows: int = 12) -> Tensor:
    """Return rising levels [rows, count]: of normal and other sizes, some of which repeat."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, count, generator=draw) * torch.rand(rows, count, generator=draw).pow(-0.5)
    x[: rows // 3] = x[: rows // 3].round()
    x[rows // 3] = x[rows // 3, :1]
    x[rows // 3 + 1, 3:] = x[rows // 3 + 1, 3]
    return x.sort(dim=-1).values


def bytes_of(count: int, seed: int, rows: int = 200) -> Tensor:
    """Return bytes of tables, any that there are."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 256, (rows, size_of(count)), generator=draw, dtype=torch.uint8)
    found[:, 0] %= 4 * 34
    first, last = found[:, 1].view(torch.int8).int(), found[:, 2].view(torch.int8).int()
    finest = (torch.maximum(first.abs(), last.abs()) >= 64) | (found[:, 0] < 4)
    return found[(first <= last) & (first >= -127) & (last >= -127) & finest]


@given(count=any_count, seed=st.integers(0, 10**6))
def test_bytes_mean_what_the_formula_says(count: int, seed: int) -> None:
    stored = bytes_of(count, seed)
    levels = from_bytes(stored)
    assert (levels.shape, levels.dtype) == ((len(stored), count), torch.float32)
    assert levels.tolist() == [by_hand(row) for row in stored.tolist()]


@given(count=any_count, seed=st.integers(0, 10**6))
def test_every_table_comes_back(count: int, seed: int) -> None:
    levels = from_bytes(bytes_of(count, seed))
    assert torch.equal(nearest_table(levels), levels)
    stored = to_bytes(levels)
    assert (stored.shape, stored.dtype) == ((len(levels), size_of(count)), torch.uint8)
    assert torch.equal(from_bytes(stored), levels)
    assert (levels.diff(dim=-1) >= 0).all()
    assert torch.equal(levels.half().float(), levels)
    assert torch.equal(levels.bfloat16().float(), levels)


@given(count=any_count, seed=st.integers(0, 10**6), power=st.integers(-30, 12))
def test_what_is_rounded_can_be_stored(count: int, seed: int, power: int) -> None:
    x = tables(count, seed)
    x *= 2.0**power / x.abs().max().clamp(min=1)
    levels = nearest_table(x)
    assert torch.equal(from_bytes(to_bytes(levels)), levels)
    assert torch.equal(nearest_table(levels), levels)
    ends, step = [0, -1], torch.ldexp(torch.ones(len(x), 1), power_for(x))
    assert ((levels - x)[:, ends].abs() <= step / 2).all()
    assert ((levels >= levels[:, :1]) & (levels <= levels[:, -1:])).all()


@settings(max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_no_table_with_these_ends_is_nearer(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = (200 * torch.rand(3, 4, generator=draw) - 100).sort(dim=-1).values
    levels = nearest_table(x)
    every = [
        (shift, (low & 15) | (high & 15) << 4) for shift in range(4) for low, high in product(range(-8, 8), repeat=2)
    ]
    for row, found, (head, first, last, _) in zip(x, levels, to_bytes(levels).tolist(), strict=True):
        if row[2] - row[1] < 16:  # one may then be nearer to what the other was rounded to than to multiples of 8
            continue
        tried = torch.tensor([[head // 4 * 4 + shift, first, last, offsets] for shift, offsets in every])
        tried = torch.tensor([by_hand(table) for table in tried.tolist()])
        best = (tried - row)[:, 1:3].square().sum(dim=1).min()
        assert float((found - row)[1:3].square().sum()) <= float(best) * (1 + 1e-6)


@counts
def test_the_levels_of_normal_weights_need_no_offsets(count: int) -> None:
    """Shares are those of the best levels for a normal distribution: each the mean of its interval."""
    x = torch.tensor([0, *SHARES[count], 256]) / 128 - 1
    normal = torch.distributions.Normal(0.0, 1.0)

    def mean(low: Tensor, high: Tensor) -> Tensor:
        return (normal.log_prob(low).exp() - normal.log_prob(high).exp()) / (normal.cdf(high) - normal.cdf(low))

    size = {4: 1.5104, 8: 2.1520, 16: 2.7326}[count]  # of the outermost level, as Max prints it
    levels = size * x
    cuts = torch.cat([torch.tensor([-30.0]), (levels[1:] + levels[:-1]) / 2, torch.tensor([30.0])])
    # a 512th of the way from end to end, and half of that for either of the cuts' ends
    assert ((mean(cuts[:-1], cuts[1:]) - levels).abs() <= 2 * 2 * size / 512).all()
    stored = to_bytes(nearest_table(levels))
    assert not stored[3:].any()
    assert stored[0] % 4 == 0


@counts
def test_one_and_two_values_are_exact(count: int) -> None:
    x = torch.tensor([[0.0] * count, [0.375] * count, [-80.0] * count, [-2.0, *[1.0] * (count - 1)]])
    levels = nearest_table(x)
    assert torch.equal(levels[:3], x[:3])
    assert torch.equal(levels[3, [0, -1]], x[3, [0, -1]])


def test_limits() -> None:
    assert nearest_table(torch.tensor([0.0, 1.0, 2.0, LARGEST]))[3] == LARGEST
    assert nearest_table(torch.tensor([-LARGEST - 250, 0.0, 1.0, 2.0]))[0] == -LARGEST
    for value in (LARGEST + 257, 3e7):
        with pytest.raises(SolverError, match="float16"):
            nearest_table(torch.tensor([0.0, 1.0, 2.0, value]))
        with pytest.raises(SolverError, match="float16"):
            power_for(torch.tensor([[1.0], [-value]]))
    tiny = nearest_table(torch.tensor([0.0, 2.0**-26, 2.0**-24, 3 * 2.0**-24]))
    assert tiny.tolist() == [0.0, 0.0, 2.0**-24, 3 * 2.0**-24]
    assert power_for(torch.tensor([[127.4], [127.6], [64.0], [0.0]])).flatten().tolist() == [0, 1, 0, -7]


def test_what_none_has_written_is_refused() -> None:
    good = to_bytes(nearest_table(torch.tensor([-1.0, -0.3, 0.3, 1.0])))
    assert good.tolist()[:3] == [4 * (24 - 6), 192, 64]
    for place, value in ((0, 4 * 34), (1, 128), (1, 65), (2, 191), (1, 256 - 63)):
        bad = good.clone()
        bad[place] = value
        if place == 1 and value == 256 - 63:
            bad[2] = 63  # the next smaller power would do
        with pytest.raises(SpecError, match="levels are not between two ends"):
            from_bytes(bad)
    with pytest.raises(SpecError, match="not one that files hold"):
        to_bytes(torch.tensor([-1.0, -0.301, 0.3, 1.0]))
