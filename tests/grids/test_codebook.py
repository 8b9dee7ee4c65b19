"""Learned levels: the table is the best of all, what it is rounded to, and codes are those of the nearest level."""

from typing import Any

import codebook_reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import SolverError, SpecError
from llmq.grids import GRIDS, codebook, make_grid
from llmq.grids.codebook import CodebookGrid
from llmq.grids.level_bytes import from_bytes, to_bytes
from llmq.types import Affine

every_bits = pytest.mark.parametrize("bits", [2, 3, 4])
few = settings(max_examples=40)


def rows(n: int, s: int, seed: int, kind: str = "tails") -> Tensor:
    """Return weights [N, S]: normal, of heavy tails, or of a few values only, which occur again and again."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(n, s, generator=draw)
    if kind == "tails":
        w *= torch.rand(n, s, generator=draw).pow(-0.5)
    return (2 * w).round() / 2 if kind == "repeated" else w


def energies(s: int, seed: int) -> Tensor:
    """Return weights of columns over four decades, some of them 0."""
    draw = torch.Generator().manual_seed(seed)
    return 10 ** (4 * torch.rand(s, generator=draw)) * (torch.rand(s, generator=draw) > 0.15)


def found_loss(w: Tensor, weight: Tensor, count: int) -> list[float]:
    """Return the loss of each row on the levels that are found before they are rounded."""
    levels = codebook._learned(w, weight.double(), count)
    return [reference.loss(row, weight, table) for row, table in zip(w, levels, strict=True)]


@settings(max_examples=80)
@given(
    s=st.integers(1, 9),
    count=st.sampled_from([2, 3, 4, 8]),
    kind=st.sampled_from(["normal", "tails", "repeated"]),
    plain=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_no_table_is_better(s: int, count: int, kind: str, plain: bool, seed: int) -> None:
    w, weight = rows(2, s, seed, kind), torch.ones(s) if plain else energies(s, seed)
    if not weight.any():
        return
    for row, loss in zip(w, found_loss(w, weight, count), strict=True):
        best = reference.best_loss(row, weight, count)
        # a level rounds to float32 once; at the best place the loss rises by mass times that squared
        room = float(weight.sum()) * (2.0**-24 * float(row.abs().max())) ** 2
        assert best * (1 - 1e-9) - room <= loss <= best * (1 + 1e-9) + room


@pytest.mark.parametrize("seed", range(5))
def test_cuts_of_the_sorted_row_are_all_that_need_be_tried(seed: int) -> None:
    w, weight = rows(1, 6, seed)[0], energies(6, seed) + 1
    least = float("inf")
    for number in range(4**6):
        of = torch.tensor([number // 4**i % 4 for i in range(6)])
        least = min(least, sum(reference._spread(w[of == c].double(), weight[of == c].double()) for c in range(4)))
    assert reference.best_loss(w, weight, 4) == pytest.approx(least, rel=1e-9)


def test_the_weighted_example() -> None:
    w, weight = torch.tensor([[0, 0.1, 0.9, 1, 5]]), torch.tensor([1, 1, 1, 1, 0.01])
    assert codebook._learned(w, weight.double(), 2)[0].tolist() == pytest.approx([0.05, 0.9701493])
    assert found_loss(w, weight, 2) == pytest.approx([0.1732], abs=5e-5)
    assert codebook._learned(w, torch.ones(5).double(), 2)[0].tolist() == pytest.approx([0.5, 5])
    assert found_loss(w, torch.ones(5), 2) == pytest.approx([0.82])


@pytest.mark.parametrize("kind", ["normal", "tails", "repeated"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "weighted"])
@pytest.mark.parametrize("count", [4, 8, 16])
def test_a_search_of_some_cuts_only_loses_next_to_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: str, plain: bool, count: int
) -> None:
    # with 64 places 0.7 % at most over these and 1000 columns, 1.7 % without Lloyd's iteration; with 256 0.05 %
    w, weight = rows(8, 300, 7, kind), torch.ones(300) if plain else energies(300, 7)
    monkeypatch.setattr(codebook, "_PLACES", 300)
    best = torch.tensor(found_loss(w, weight, count))
    monkeypatch.setattr(codebook, "_PLACES", 256 if kind == "repeated" else 64)  # nothing is lost where values are few
    found = torch.tensor(found_loss(w, weight, count))
    assert (found >= best * (1 - 1e-6) - 1e-6).all()
    assert found.sum() <= 1.01 * best.sum() + 1e-6


def test_places_of_a_search_go_to_where_levels_go() -> None:
    # one weight in a hundred is far out: cuts have to be there, too
    w = torch.cat([rows(4, 990, 1, "normal"), 30 + 10 * rows(4, 10, 2, "normal")], dim=1)
    places = codebook._places(w.sort(dim=1).values, torch.ones(4, 1000).double())
    assert places.shape == (4, codebook._PLACES + 1)
    assert (places[:, 0] == 0).all()
    assert (places[:, -1] == 1000).all()
    assert (places.diff(dim=1) >= 0).all()
    assert (places.unsqueeze(2) == torch.arange(991, 1000)).any(1).all()


@every_bits
def test_parts_of_the_work_do_not_show(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    w, weight = rows(9, 300, 3), energies(300, 3)
    whole = CodebookGrid(bits).fit(w, weight).levels
    for name in ("_ENTRIES", "_SAVINGS"):
        monkeypatch.setattr(codebook, name, 1)
    assert whole is not None
    assert torch.equal(CodebookGrid(bits).fit(w, weight).levels, whole)
    alone = [CodebookGrid(bits).fit(row[None], weight).levels for row in w]
    assert all(torch.equal(table[0], own) for table, own in zip(alone, whole, strict=True))


@every_bits
@few
@given(s=st.integers(1, 40), seed=st.integers(0, 10**6), power=st.integers(-30, 14))
def test_levels_are_what_files_hold(bits: int, s: int, seed: int, power: int) -> None:
    at = CodebookGrid(bits).fit(rows(3, s, seed) * 2.0**power / 8, energies(s, seed))
    levels = at.levels
    assert levels is not None
    assert (levels.shape, levels.dtype) == ((3, 1, 2**bits), torch.float32)
    assert (at.scale.shape, at.zero.shape) == ((3, 1), (3, 1))
    assert (at.scale == 1).all()
    assert not at.zero.any()
    assert (levels.diff(dim=2) >= 0).all()
    assert torch.equal(levels.half().float(), levels)
    assert torch.equal(levels.bfloat16().float(), levels)
    assert torch.equal(from_bytes(to_bytes(levels)), levels)
    assert torch.equal(CodebookGrid(bits).storable(levels), levels)
    middle = (levels[..., 1:].double() + levels[..., :-1].double()) / 2
    assert torch.equal(middle.float().double(), middle)


def test_levels_that_repeat_have_the_code_of_the_first() -> None:
    grid = CodebookGrid(3)
    levels = torch.tensor([[-2.0, -1.0, -1.0, -1.0, 0.5, 0.5, 2.0, 2.0]])
    at = Affine(torch.ones(1, 1), torch.zeros(1, 1), levels[:, None])
    tried = torch.tensor([[-3.0, -1.5, -1.4, -1.0, -0.9, -0.25, -0.2, 0.5, 0.6, 1.25, 1.3, 9.0]])
    assert grid.encode(tried, at).tolist() == [[0, 0, 1, 1, 1, 1, 4, 4, 4, 4, 6, 6]]
    assert torch.equal(grid.nearest(tried, at), grid.decode(grid.encode(tried, at), at))


@every_bits
@few
@given(s=st.integers(1, 24), seed=st.integers(0, 10**6), kind=st.sampled_from(["normal", "tails", "repeated"]))
def test_codes_are_those_of_the_first_of_the_nearest_levels(bits: int, s: int, seed: int, kind: str) -> None:
    grid, w = CodebookGrid(bits), rows(3, s, seed, kind)
    at = grid.fit(w)
    assert at.levels is not None
    levels = at.levels[:, 0]
    ties = (levels[:, 1:] + levels[:, :-1]) / 2
    near = 2.0**-16 * levels.abs().amax(1, keepdim=True)
    tried = torch.cat([w, levels, ties, ties + near, ties - near, 9 * w], dim=1)
    codes = grid.encode(tried, at)
    assert codes.dtype == torch.uint8
    # float64 distances are exact here, but for those of numbers that are twice as long
    assert torch.equal(codes.long(), reference.nearest_codes(tried, levels))
    values = grid.decode(codes, at)
    assert torch.equal(values, levels.gather(1, codes.long()))
    assert torch.equal(grid.nearest(tried, at), values)
    assert torch.equal(grid.encode(values, at), codes)


@every_bits
def test_any_shapes_that_broadcast(bits: int) -> None:
    grid, w = CodebookGrid(bits), rows(5, 24, 1)
    at = grid.fit(w)
    assert at.levels is not None
    flat = Affine(at.scale[:, 0], at.zero[:, 0], at.levels[:, 0])
    codes, values = grid.encode(w, at), grid.nearest(w, at)
    assert torch.equal(grid.encode(w.T, flat), codes.T)
    assert torch.equal(grid.nearest(w.T, flat), values.T)
    assert torch.equal(grid.decode(codes.T.contiguous(), flat), values.T)
    assert torch.equal(grid.nearest(w[:, 3], flat), values[:, 3])
    assert torch.equal(grid.encode(w[:, 3], flat), codes[:, 3])
    assert torch.equal(grid.encode(w[:, 3, None], at), codes[:, 3, None])
    assert torch.equal(grid.nearest(w[:, :1].expand(-1, 4), at), values[:, :1].expand(-1, 4))


@every_bits
def test_one_and_two_values_come_back_exactly(bits: int) -> None:
    grid = CodebookGrid(bits)
    w = torch.tensor([[0.0] * 6, [0.375] * 6, [-80.0] * 6, [1.0, -2.0, 1.0, 1.0, -2.0, 1.0]])
    for weight in (None, torch.arange(6.0)):
        at = grid.fit(w, weight)
        assert torch.equal(grid.nearest(w, at), w)
        assert at.levels is not None
        assert not at.levels[0].any()
    assert torch.equal(grid.fit(w[:, :1]).levels[2, 0], torch.full((2**bits,), -80.0))  # type: ignore[index]


def test_inputs_without_importance_do_not_count() -> None:
    grid, w = CodebookGrid(3), rows(4, 60, 5)
    weight = energies(60, 5)
    other = torch.where(weight == 0, 100 * w, w)
    assert torch.equal(grid.fit(w, weight).levels, grid.fit(other, weight).levels)  # type: ignore[arg-type]
    assert torch.equal(grid.fit(w, torch.zeros(60)).levels, grid.fit(w).levels)  # type: ignore[arg-type]
    assert torch.equal(grid.fit(w, 3 * torch.ones(60)).levels, grid.fit(w).levels)  # type: ignore[arg-type]
    assert not torch.equal(grid.fit(w, weight).levels, grid.fit(w).levels)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_are_treated_as_float32(dtype: torch.dtype) -> None:
    grid, w = CodebookGrid(3), rows(4, 60, 6).to(dtype)
    assert torch.equal(grid.fit(w).levels, grid.fit(w.float()).levels)  # type: ignore[arg-type]


def test_what_cannot_be_learned_is_refused() -> None:
    grid = CodebookGrid(4)
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(SolverError, match="NaN or infinity"):
            grid.fit(torch.tensor([[0.5, 1.0], [bad, 1.0]]))
    with pytest.raises(SolverError, match="float16"):
        grid.fit(torch.tensor([[-3e7, 1.0]]))
    with pytest.raises(SolverError, match="search_norm is 3"):
        grid.fit(torch.ones(1, 4), torch.ones(4), norm=3.0)


def test_the_row_of_the_table() -> None:
    row: Any = GRIDS["codebook"]
    assert row.defaults() == {"bits": 4, "group_size": -1, "sym": True, "format": "llmq"}
    for bits in (1, 5, 8):
        with pytest.raises(SpecError, match="use 2, 3, 4"):
            make_grid("codebook", bits, True)
    grid = make_grid("codebook", 3, True)
    assert (grid.name, grid.bits, grid.symmetric, grid.zeros) == ("codebook", 3, True, (0, 0))
    assert (grid.tables, grid.learns, grid.adapted(torch.ones(1, 1))) == (None, True, grid)
