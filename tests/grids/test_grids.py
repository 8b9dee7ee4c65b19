"""Laws that every grid obeys, and what the uniform one promises beyond them."""

import pytest
import torch
from grid_cases import FITTED, every_grid, groups, uniform, used
from grid_reference import eight_bits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import SolverError, SpecError
from llmq.grids import GRIDS, make_grid
from llmq.grids.scales import MAX_SCALE, MIN_SCALE
from llmq.grids.uniform import UniformGrid
from llmq.types import Affine, Grid

few = settings(max_examples=4)

# How far a constant group may be from coming back, by its value: half a step of the scale, where the scale is not of
# eight bits as it is, and a level beside it. Those not named have the value as a level and a scale of its digits.
MISSES = {
    "log": 2 ** (1 / 32) - 1 + 2.0**-8,  # clips are powers of 2^(1/16), rounded to eight bits
    "fp4": 2.0**-8,  # the scale is a sixth of it
    "mxfp4": 0.25,  # seven and more scales are clipped to six, five become four
    "nvfp4": 2.0**-4,  # a sixth, to four bits
}


def round_trip(grid: Grid, w: Tensor) -> Tensor:
    at = grid.fit(w)
    return grid.decode(grid.encode(w, at), at)


@every_grid
@few
@given(w=groups())
def test_rounding_twice_is_rounding_once(grid: Grid, w: Tensor) -> None:
    at = grid.fit(w)
    codes = grid.encode(w, at)
    assert codes.dtype == torch.uint8
    assert torch.equal(grid.encode(grid.decode(codes, at), at), codes)


@every_grid
@few
@given(w=groups())
def test_every_code_survives_decoding_and_encoding(grid: Grid, w: Tensor) -> None:
    at = grid.fit(w)
    codes = used(grid, at)
    assert torch.equal(grid.encode(grid.decode(codes, at), at), codes)


@every_grid
@few
@given(w=groups())
def test_codes_that_stand_for_nothing_repeat_the_last_level(grid: Grid, w: Tensor) -> None:
    at = grid.fit(w)
    last = used(grid, at).max()
    rest = torch.arange(int(last), 2**grid.bits, dtype=torch.uint8)[None]
    assert (grid.decode(rest, at) == grid.decode(last[None, None], at)).all()
    assert grid.encode(w, at).max() <= last


@every_grid
@few
@given(w=groups())
def test_encode_finds_the_nearest_level(grid: Grid, w: Tensor) -> None:
    at = grid.fit(w)
    levels = grid.decode(used(grid, at), at).double()
    chosen = grid.decode(grid.encode(w, at), at).double()
    nearest = (w.double().T - levels).abs().amin(1)
    # In float32 are rounded the quotient, the bound between two levels of a table, and the levels themselves, each by
    # half a unit in its last place: near a tie, w may go to a level that is farther by twice the sum, 4 · 2^-24 |w|.
    assert ((w - chosen).abs()[0] <= nearest + 2.0**-22 * w.abs()[0].double()).all()


@every_grid
@few
@given(w=groups())
def test_larger_weights_have_no_smaller_levels(grid: Grid, w: Tensor) -> None:
    at = grid.fit(w)
    assert (grid.nearest(w.sort(dim=1).values, at).diff(dim=1) >= 0).all()


@every_grid
@few
@given(w=groups())
def test_zero_is_a_level(grid: Grid, w: Tensor) -> None:
    at = grid.fit(w)
    if grid.name not in ("binary", "residual_binary"):
        assert grid.nearest(torch.zeros(1, 1), at).item() == 0.0
    assert at.zero.item() == int(at.zero.item())
    assert grid.zeros[0] <= at.zero.item() <= grid.zeros[1]
    assert not grid.symmetric or grid.zeros[0] == grid.zeros[1]


@every_grid
@few
@given(w=groups())
def test_scales_are_exact_in_float16_and_bfloat16(grid: Grid, w: Tensor) -> None:
    scale = grid.fit(w).scale
    assert scale.dtype == torch.float32
    assert scale.shape == (1, 1)
    assert scale.item() != 0
    assert torch.equal(scale.half().float(), scale)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.equal(grid.storable(scale), scale)


@pytest.mark.parametrize("name", GRIDS)
def test_scales_are_exact_in_the_dtype_of_the_file(name: str) -> None:
    row = GRIDS[name]
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    for bits in row.bits:
        grid = make_grid(name, bits, row.symmetric[0]).adapted(w)
        unit = getattr(getattr(grid, "rule", None), "unit", 1.0)
        scale = grid.fit(w, torch.ones(32)).scale / unit
        assert torch.equal(scale.to(row.scale_dtype).float(), scale)


@every_grid
def test_a_group_of_zeros_stays_zero(grid: Grid) -> None:
    w = torch.tensor([[0.0, 0.0, -0.0], [1.0, -2.0, 0.5]])
    if grid.name == "binary":  # the smallest that there is
        assert (round_trip(grid, w)[0] == MIN_SCALE).all()
        return
    assert not round_trip(grid, w)[0].any()
    assert grid.fit(w).scale[0].item() == 1.0


@every_grid
@pytest.mark.parametrize("value", [1.0, -1.0, 0.375, -80.0], ids=str)
def test_constant_groups_come_back(grid: Grid, value: float) -> None:
    # uniform: value / 2^(bits-1) has as few digits as value; value / (2^bits - 1) does not, and moves all by 2^-8
    missed = 2.0**-8 if grid.name == "uniform" and not grid.symmetric else MISSES.get(grid.name, 0.0)
    found = round_trip(grid, torch.full((1, 4), value))
    torch.testing.assert_close(found, torch.full((1, 4), value), rtol=missed, atol=0)


@every_grid
def test_rows_do_not_see_each_other(grid: Grid) -> None:
    w = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_trip(grid, w), torch.cat([round_trip(grid, row[None]) for row in w]))


@every_grid
def test_half_precision_weights_are_treated_as_their_float32_values(grid: Grid) -> None:
    w = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(round_trip(grid, w.to(dtype)), round_trip(grid, w.to(dtype).float()))


@every_grid
def test_the_nearest_level_is_that_of_the_code_whatever_the_shapes(grid: Grid) -> None:
    w = 2 * torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    at = grid.fit(w[:, ::2])
    expected, kept = grid.decode(grid.encode(w, at), at), w.clone()
    assert torch.equal(grid.nearest(w, at), expected)
    assert torch.equal(w, kept)
    rows = Affine(at.scale[:, 0], at.zero[:, 0])
    assert torch.equal(grid.nearest(w[:, 3], rows), expected[:, 3])
    assert torch.equal(grid.nearest(w.T, rows), expected.T)
    assert torch.equal(grid.nearest(w[:, :1], at), expected[:, :1])


@every_grid
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_weights_that_are_not_finite_are_refused(grid: Grid, bad: float) -> None:
    w = torch.tensor([[0.5, 1.0], [bad, 1.0]])
    for placed in (lambda: grid.adapted(w).fit(w), lambda: grid.fit(w, torch.ones(2))):
        with pytest.raises(SolverError):
            placed()


@every_grid
def test_scales_beyond_float16_are_refused(grid: Grid) -> None:
    w = torch.tensor([[-3e7, 3e7 if grid.name in FITTED else 1.0]])
    for placed in (lambda: grid.fit(w), lambda: grid.adapted(w).fit(w)):
        with pytest.raises(SolverError, match="float16"):
            placed()


@every_grid
def test_the_scale_of_the_largest_weights_is_storable(grid: Grid) -> None:
    w = torch.tensor([[-3e4, 3e4]])
    assert torch.equal(grid.storable(2 * grid.fit(w).scale), 2 * grid.fit(w).scale)
    grid.fit(w, torch.ones(2))


def error_bound(grid: UniformGrid, w: Tensor, scale: float) -> Tensor:
    """Return what |w - ŵ| may be for each entry of the group `w` [1, S] under the stored `scale`.

    A level is at most |scale|/2 away from anything between the outermost levels; the rest is how far those fall
    short. Let s be the scale before it was rounded to eight bits.
    Symmetric: the extreme is half·s from 0, code 0 half·|scale|: short by half·(s - |scale|). On the other side the
    last level is at (half-1)·|scale| and entries beyond it are clipped.
    Asymmetric: the zero is rounded, so that the low end is short by at most |scale|/2 and the high end by that plus
    top·(s - scale); where the zero is clamped (no entry of one sign) one end is exact and the other short by
    top·(s - scale) alone.
    """
    w = w.double()
    low, high = w.min().item(), w.max().item()
    if grid.symmetric:
        half = 2 ** (grid.bits - 1)
        extreme = low if -low >= high else high
        short = max(0.0, abs(extreme) - half * abs(scale))
        clipped = w.abs() - (half - 1) * abs(scale)
        same_side = w * extreme >= 0
        bound = torch.where(same_side, abs(scale) / 2 + short, clipped.clamp(min=abs(scale) / 2))
    else:
        top = 2**grid.bits - 1
        short = max(0.0, max(high, 0.0) - min(low, 0.0) - top * scale)
        bound = torch.full_like(w, scale / 2 + short)
    # w / scale is rounded to float32 before it is rounded to a code
    return bound + 2.0**-23 * w.abs()


@uniform()
@few
@given(w=st.one_of(groups(), groups(low=0.0), groups(high=0.0)))
def test_error_is_at_most_half_a_step(grid: UniformGrid, w: Tensor) -> None:
    scale = grid.fit(w).scale.item()
    assert ((w - round_trip(grid, w)).abs() <= error_bound(grid, w, scale)).all()


@uniform()
@few
@given(w=groups())
def test_the_scale_is_the_range_over_the_steps(grid: UniformGrid, w: Tensor) -> None:
    low, high = w.double().min().item(), w.double().max().item()
    if grid.symmetric:
        ideal = (low if -low >= high else high) / -(2 ** (grid.bits - 1))
    else:
        ideal = (max(high, 0) - min(low, 0)) / (2**grid.bits - 1)
    assume(abs(ideal) > 2 * MIN_SCALE)
    scale = grid.fit(w).scale.item()
    # half a unit of eight bits, and the float32 division before it
    assert abs(scale - ideal) <= abs(ideal) * (2.0**-8 + 2.0**-23)


@uniform(symmetric=(True,))
@few
@given(w=groups())
def test_the_largest_magnitude_gets_the_lowest_code(grid: UniformGrid, w: Tensor) -> None:
    assume(w.abs().max() > 2 ** (grid.bits + 1) * MIN_SCALE)
    at = grid.fit(w)
    # 8-bit scales may be 2^-8 too large: half = 2^7 steps then fall half a step short, which rounds to code 0 or 1
    assert grid.encode(w, at).min() <= (1 if grid.bits == 8 else 0)


@uniform(symmetric=(False,))
@few
@given(w=groups())
def test_asymmetric_groups_reach_both_ends(grid: UniformGrid, w: Tensor) -> None:
    assume(w.abs().max() > 2 ** (grid.bits + 1) * MIN_SCALE)
    at = grid.fit(torch.cat([w, -w], dim=1))
    top = 2**grid.bits - 1
    codes = grid.encode(torch.cat([w, -w], dim=1), at)
    # top steps of a scale that is 2^-8 too large are top/256 < 1 steps too long, shared between both ends
    assert codes.max() - codes.min() >= top - 1


def test_full_range_symmetric_vector() -> None:
    w = torch.tensor([[-1.5, -0.7, 0.2, 0.4, 1.0, 0.05, -0.3, 0.9]])
    grid = UniformGrid(4, symmetric=True)
    at = grid.fit(w)
    assert (at.scale.item(), at.zero.item()) == (0.1875, 8)
    codes = grid.encode(w, at)
    assert (codes.int() - 8).tolist() == [[-8, -4, 1, 2, 5, 0, -2, 5]]
    assert (w - grid.decode(codes, at)).square().mean().item() == pytest.approx(0.002090, abs=5e-7)


def test_full_range_symmetric_takes_the_sign_of_the_extreme() -> None:
    w = torch.tensor([[1.5, 0.7, -0.2]])
    grid = UniformGrid(4, symmetric=True)
    assert grid.fit(w).scale.item() == -0.1875
    assert round_trip(grid, w)[0, 0].item() == 1.5


@pytest.mark.parametrize(
    ("w", "zero", "codes"),
    [
        ([-700.0, 0.0, 1000.0, 333.0], 105, [0, 105, 255, 155]),
        ([-1.0, 2.0], 85, [0, 255]),
        ([3.0, 5.0], 0, None),
        ([-255 / 64, -3.0], 255, [0, 63]),  # a scale of 5/255 would be rounded to eight bits, to zero 254
    ],
    ids=["int8-example", "minus1-to-2", "positive", "negative"],
)
def test_affine_vectors(w: list[float], zero: int, codes: list[int] | None) -> None:
    grid, group = UniformGrid(8, symmetric=False), torch.tensor([w])
    at = grid.fit(group)
    assert at.zero.item() == zero
    ideal = (max(*w, 0) - min(*w, 0)) / 255
    assert at.scale.item() == eight_bits(torch.tensor(ideal))[0].item()
    assert codes is None or grid.encode(group, at).tolist() == [codes]


def test_zero_stays_a_code_where_the_scale_is_rounded_down() -> None:
    # 255.9 / 255 is rounded to 1, and -lo / 1 to 256
    at = UniformGrid(8, symmetric=False).fit(torch.tensor([[-255.9, -1.0]]))
    assert (at.scale.item(), at.zero.item()) == (1.0, 255.0)


def test_all_positive_group_is_not_cut_in_half() -> None:
    # The original GPTQ code gives (.1, .4, .7, .7) here.
    w = torch.tensor([[0.1, 0.4, 0.8, 1.5]])
    assert round_trip(UniformGrid(4, symmetric=True), w)[0].tolist() == pytest.approx([0.1875, 0.375, 0.75, 1.5])


@uniform()
@pytest.mark.parametrize("magnitude", [1e-8, 1e-6, 1e5], ids=str)
def test_tiny_and_large_groups_have_storable_scales(grid: UniformGrid, magnitude: float) -> None:
    w = torch.tensor([[magnitude, magnitude / 3], [-magnitude, -magnitude / 2]])
    scale = grid.fit(w).scale
    assert torch.equal(scale.half().float(), scale)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert (scale.abs() >= MIN_SCALE).all()
    for row, s in zip(w, scale, strict=True):
        assert ((row - round_trip(grid, row[None])).abs() <= error_bound(grid, row[None], s.item())).all()


def test_the_sign_of_a_tiny_scale_is_kept() -> None:
    scale = UniformGrid(4, symmetric=True).fit(torch.tensor([[1e-8, 0.0], [-1e-8, 0.0]])).scale
    assert scale.tolist() == [[-MIN_SCALE], [MIN_SCALE]]


def test_limits_of_scales_are_the_range_that_both_half_types_share() -> None:
    for scale in (MIN_SCALE, MAX_SCALE):
        assert torch.tensor(scale).half().item() == torch.tensor(scale).bfloat16().item() == scale
    past = torch.tensor(MAX_SCALE).bfloat16().view(torch.int16) + 1
    assert past.view(torch.bfloat16).half().isinf()
    finer = torch.tensor(MIN_SCALE * (1 + 2.0**-7)).bfloat16()  # eight bits above the lower limit still fit ...
    assert finer.half().float() == finer.float()
    finer = torch.tensor(MIN_SCALE / 2 * (1 + 2.0**-7)).bfloat16()  # ... and below it no more
    assert finer.half().float() != finer.float()


def test_the_largest_storable_scale_is_used() -> None:
    grid = UniformGrid(4, symmetric=True)
    assert grid.fit(torch.tensor([[-8 * MAX_SCALE, 0.0]])).scale.item() == MAX_SCALE
    with pytest.raises(SolverError, match="float16"):
        grid.fit(torch.tensor([[-8 * 65536.0, 0.0]]))


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_bits_outside_2_to_8_are_refused(bits: int) -> None:
    with pytest.raises(SpecError, match="2 to 8"):
        UniformGrid(bits, symmetric=True)
