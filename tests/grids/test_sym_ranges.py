"""The three ranges of symmetric groups, the nearest level without codes, and the norm of the search."""

import pytest
import torch
from grid_reference import place
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import SpecError
from llmq.grids import uniform
from llmq.grids.uniform import SymRange, UniformGrid
from llmq.types import Affine

RANGES: tuple[SymRange, ...] = ("full", "gptq", "restricted")
every_range = pytest.mark.parametrize("sym_range", RANGES)
every_bits = pytest.mark.parametrize("bits", [2, 3, 4, 8])
VECTOR = torch.tensor([[-1.5, -0.7, 0.2, 0.4, 1.0, 0.05, -0.3, 0.9]])


def group(n: int, s: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, s, generator=draw) * torch.rand(n, s, generator=draw).pow(-0.5)


groups = st.builds(group, st.integers(1, 6), st.integers(1, 40), st.integers(0, 10**6))


@pytest.mark.parametrize(
    ("sym_range", "scale", "codes", "error"),
    [
        ("restricted", 1.5 / 7, [-7, -3, 1, 2, 5, 0, -1, 4], 0.002634),
        ("gptq", 0.2, [-8, -4, 1, 2, 5, 0, -2, 4], 0.005312),  # -3.5, -1.5 and 4.5 steps are ties
        ("full", 0.1875, [-8, -4, 1, 2, 5, 0, -2, 5], 0.002090),
    ],
)
def test_vectors(sym_range: SymRange, scale: float, codes: list[int], error: float) -> None:
    grid = UniformGrid(4, True, sym_range)
    at = grid.fit(VECTOR)
    assert at.zero.item() == 8
    assert at.scale.item() == torch.tensor(scale).bfloat16().item()
    unrounded = Affine(torch.tensor([[scale]]), at.zero)  # the vectors are for scales of any precision
    found = grid.encode(VECTOR, unrounded)
    assert (found.int() - 8).tolist() == [codes]
    mean = (VECTOR - grid.decode(found, unrounded)).square().mean().item()
    assert mean == pytest.approx(error, abs=6e-7)  # six digits after the point


@every_bits
@settings(max_examples=25)
@given(w=groups)
def test_scales_are_those_of_the_definitions(bits: int, w: Tensor) -> None:
    half, largest = 2 ** (bits - 1), w.abs().amax(1, keepdim=True)
    for sym_range, ideal in (("gptq", 2 * largest / (2**bits - 1)), ("restricted", largest / (half - 1))):
        at = UniformGrid(bits, True, sym_range).fit(w)
        assert (at.zero == half).all()
        # half a unit of eight bits, and the float32 division before it
        assert ((at.scale - ideal).abs() <= ideal * (2.0**-8 + 2.0**-23)).all()
    expected = place(w.double(), bits, True)
    clear = expected.margin > 2.0**-20
    found = UniformGrid(bits, True, "full").fit(w).scale[:, 0].double()
    assert torch.equal(found[clear], expected.scale[clear])


@every_bits
@every_range
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_groups_of_one_sign_keep_the_bound_of_their_range(bits: int, sym_range: SymRange, sign: float) -> None:
    w = sign * torch.linspace(0.1, 1.5, 40)[None]
    grid = UniformGrid(bits, True, sym_range)
    at = grid.fit(w)
    off = (w - grid.nearest(w, at)).abs()
    # half a step everywhere, of 2A/(2^bits - 1) a whole less half at +A; P roundings of the scale by 2^-9 beside that
    beyond = 0.75 if sym_range == "gptq" else 0.5
    assert off.max() <= at.scale.abs().item() * (beyond + 2 ** (bits - 1) * 2.0**-8)


@every_bits
def test_the_restricted_range_never_uses_the_lowest_code(bits: int) -> None:
    grid = UniformGrid(bits, True, "restricted")
    w = group(64, 40, 0)
    for at in (grid.fit(w), grid.fit(w, torch.ones(40))):
        codes = grid.encode(w, at)
        assert codes.min() == 1
        assert codes.max() == 2**bits - 1
    assert UniformGrid(bits, False, "restricted").encode(w, UniformGrid(bits, False).fit(w)).min() == 0


def test_asymmetric_grids_do_not_know_ranges() -> None:
    w, weight = group(16, 40, 1), torch.ones(40)
    for sym_range in RANGES:
        expected, found = UniformGrid(3, False).fit(w, weight), UniformGrid(3, False, sym_range).fit(w, weight)
        assert torch.equal(found.scale, expected.scale)
        assert torch.equal(found.zero, expected.zero)


def test_other_ranges_are_refused() -> None:
    with pytest.raises(SpecError, match="full, gptq, restricted"):
        UniformGrid(4, True, "signed")


@every_bits
@every_range
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@settings(max_examples=25)
@given(w=groups)
def test_the_nearest_level_is_that_of_the_code(bits: int, sym_range: SymRange, symmetric: bool, w: Tensor) -> None:
    grid = UniformGrid(bits, symmetric, sym_range)
    at = grid.fit(w[:, ::2])
    expected = grid.decode(grid.encode(w, at), at)
    kept = w.clone()
    assert torch.equal(grid.nearest(w, at), expected)
    assert torch.equal(w, kept)
    assert torch.equal(grid.nearest(w.T, Affine(at.scale.T, at.zero.T)), expected.T)


@every_range
@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4, 4.0])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_the_search_lowers_the_norm_it_is_given(sym_range: SymRange, symmetric: bool, norm: float) -> None:
    w = group(32, 40, 2)
    weight = torch.rand(40, generator=torch.Generator().manual_seed(3)) + 0.1
    grid = UniformGrid(3, symmetric, sym_range)

    def error(at: Affine) -> Tensor:
        return ((grid.nearest(w, at) - w).double().abs() ** norm) @ weight.double()

    ends = torch.stack([w.amin(1), w.amax(1)], dim=1)
    tried = torch.stack([error(grid.fit(ends * (1 - 0.02 * step))) for step in range(35)])
    # a power and a sum of 40 in float32
    assert (error(grid.fit(w, weight, norm=norm)) <= tried.amin(0) * (1 + 100 * 2.0**-24)).all()


def test_the_norm_decides_what_becomes_of_outliers() -> None:
    w, weight = group(64, 40, 4), torch.ones(40)
    scales = [UniformGrid(4, False).fit(w, weight, norm=norm).scale.sum() for norm in (1.0, 2.0, 4.0)]
    assert scales[0] < scales[1] < scales[2]  # a higher power weighs the clipped ones more


def test_the_search_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    w, weight, grid = group(33, 40, 5), torch.rand(40), UniformGrid(3, False)
    whole = grid.fit(w, weight)
    for chunk in (1, 100, 40 * 32):
        monkeypatch.setattr(uniform, "_CHUNK", chunk)
        found = grid.fit(w, weight)
        assert torch.equal(found.scale, whole.scale)
        assert torch.equal(found.zero, whole.zero)
