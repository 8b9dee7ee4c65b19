"""A linear that gradients move: where it starts, how it moves, and that it never leaves its grid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from tunable_reference import gradients, weight
from tune_cases import assert_on_grid

from llmq.families import Linear
from llmq.grids.uniform import SymRange, UniformGrid
from llmq.solvers.rtn import rtn
from llmq.tune.tunable import TunableLinear, put, tunable
from llmq.types import QuantizedWeight

U = 2.0**-24
CASES = [  # N, K, group size, bits, symmetric, sym_range
    (5, 32, 16, 4, False, "full"),
    (7, 40, 16, 3, False, "full"),  # a ragged last group
    (3, 33, 33, 2, True, "full"),
    (4, 24, 8, 3, True, "restricted"),
    (4, 25, 8, 2, True, "restricted"),
    (6, 20, 8, 8, False, "full"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
Case = tuple[int, int, int, int, bool, SymRange]


def made(case: Case, *, bias: bool = False) -> tuple[Linear, Tensor, QuantizedWeight]:
    """Return a linear, weights of which some round otherwise than the codes of `q` say, and `q`."""
    n, k, group_size, bits, symmetric, sym_range = case
    generator = torch.Generator().manual_seed(k)
    w = torch.randn(n, k, generator=generator)
    q = rtn(w, None, UniformGrid(bits, symmetric, sym_range), group_size).weight
    module = nn.Linear(k, n, bias=bias)
    shaken = w + 0.5 * q.scales.abs().mean() * torch.randn(n, k, generator=generator)
    return Linear("block.x", module, transposed=False), shaken, q


def spread(t: Tensor, q: QuantizedWeight) -> Tensor:
    return torch.stack([t[:, j // q.group_size] for j in range(q.codes.shape[1])], dim=1)


@every_case
def test_it_starts_at_the_given_weight_bit_for_bit(case: Case) -> None:
    linear, w, q = made(case)
    for layer in (TunableLinear(linear, q, w), TunableLinear(linear, q)):
        assert torch.equal(layer.weight(), q.dequantize())  # the same operations on the same numbers
        found = layer.quantized()
        assert torch.equal(found.codes, q.codes)
        assert torch.equal(found.scales, q.scales)
        assert torch.equal(found.zeros, q.zeros)
        assert (found.grid, found.group_size) == (q.grid, q.group_size)


@every_case
def test_latents_start_at_the_weight_or_as_near_as_the_code_allows(case: Case) -> None:
    linear, w, q = made(case)
    latent = TunableLinear(linear, q, w).latent
    assert latent is not None
    exact = w.double() / spread(q.scales, q).double() + spread(q.zeros, q).double()
    codes, found = q.codes.double(), latent.detach().double()
    far = (exact - codes).abs() > 0.35
    assert far.any()
    assert (~far).any()
    # a quotient and a sum of at most 2^8 in float32
    assert (found - exact)[~far].abs().max() <= 2 * 2**8 * U
    assert ((found - codes).abs()[far] - 0.35).abs().max() <= 2**8 * U
    assert (((found - codes) * (exact - codes))[far] > 0).all()


@every_case
@pytest.mark.parametrize("moved", [False, True])
def test_gradients_are_those_of_the_reference(case: Case, moved: bool) -> None:
    linear, w, q = made(case)
    layer = TunableLinear(linear, q, w)
    assert layer.latent is not None
    generator = torch.Generator().manual_seed(1)
    codes = q.codes
    if moved:  # codes and scales that are no longer those of the start
        with torch.no_grad():
            layer.change.copy_(0.3 * torch.rand(q.scales.shape, generator=generator) - 0.1)
            layer.latent.add_(torch.randn(w.shape, generator=generator))
            layer.clamp_()
        codes = layer.latent.detach().round()
        assert not torch.equal(codes, q.codes.float())
    slope = torch.randn(w.shape, generator=generator)
    (layer.weight() * slope).sum().backward()
    change = layer.change.detach()
    latent, by_change = gradients(slope, codes, q.scales, q.zeros, q.group_size, change)
    assert layer.latent.grad is not None
    assert layer.change.grad is not None
    expected = weight(codes, q.scales, q.zeros, q.group_size, change)
    torch.testing.assert_close(layer.weight().double(), expected, rtol=4 * U, atol=0)
    torch.testing.assert_close(layer.latent.grad.double(), latent, rtol=4 * U, atol=0)
    # a sum of as many terms as a group has columns
    terms = (slope.double() * expected).abs()
    bound = torch.stack([part.sum(1) for part in terms.split(q.group_size, dim=1)], dim=1)
    assert ((layer.change.grad.double() - by_change).abs() <= 2 * (q.group_size + 4) * U * bound).all()


def test_fixed_codes_have_gradients_by_the_scales_only() -> None:
    linear, _, q = made(CASES[1])
    layer = TunableLinear(linear, q)
    assert [name for name, _ in layer.named_parameters()] == ["change"]
    layer.weight().sum().backward()
    _, by_change = gradients(
        torch.ones(q.codes.shape), q.codes, q.scales, q.zeros, q.group_size, torch.zeros_like(q.scales)
    )
    assert layer.change.grad is not None
    torch.testing.assert_close(layer.change.grad.double(), by_change, rtol=1e-5, atol=1e-5)


def test_output_is_that_of_the_weight_and_the_bias_in_the_dtype_of_the_input() -> None:
    linear, w, q = made(CASES[1], bias=True)
    layer = TunableLinear(linear, q, w)
    bias = linear.module.bias
    assert isinstance(bias, Tensor)
    assert layer.bias is bias
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(2), requires_grad=True)
    out = layer(x)
    expected = x.double() @ q.dequantize().double().T + bias.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    (slope,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(slope, q.dequantize().sum(0).expand(2, 3, 40), rtol=1e-5, atol=1e-5)
    linear.module.to(torch.bfloat16)
    assert TunableLinear(linear, q)(x.bfloat16()).dtype == torch.bfloat16


@every_case
@given(seed=st.integers(0, 2**31), size=st.sampled_from([0.3, 3.0, 1e3]))
def test_wherever_it_is_pushed_it_stays_on_the_grid(case: Case, seed: int, size: float) -> None:
    linear, w, q = made(case)
    layer = TunableLinear(linear, q, w)
    assert layer.latent is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.latent.add_(size * torch.randn(w.shape, generator=generator))
        layer.change.add_(0.2 * torch.randn(q.scales.shape, generator=generator))
    free = layer.latent.detach().clone()
    layer.clamp_()
    found = layer.quantized()
    assert_on_grid(found)
    # in the forward pass the same codes, on scales that are not yet rounded
    values = (found.codes.float() - spread(q.zeros, q)) * spread(q.scales * (1 + layer.change.detach()), q)
    torch.testing.assert_close(layer.weight().detach(), values, rtol=4 * U, atol=0)
    lowest, top = int(case[5] == "restricted"), 2 ** case[3] - 1
    inside = (free >= lowest) & (free <= top)
    assert torch.equal(layer.latent[inside], free[inside])  # what needs no clamping stays
    if size == 1e3:
        assert (int(found.codes.min()), int(found.codes.max())) == (lowest, top)


@every_case
def test_rounded_scales_are_those_that_are_stored(case: Case) -> None:
    linear, w, q = made(case)
    layer = TunableLinear(linear, q, w)
    with torch.no_grad():
        layer.change.add_(0.2 * torch.randn(q.scales.shape, generator=torch.Generator().manual_seed(3)))
    found = layer.quantized()
    assert not torch.equal(found.scales, q.scales)
    layer.round_()
    assert torch.equal(layer.quantized().scales, found.scales)
    # the change is relative: a quotient, a difference, a sum and a product bring the scale back to three roundings
    torch.testing.assert_close(layer.weight().detach(), found.dequantize(), rtol=6 * U, atol=0)


class Nested(nn.Module):
    """A block with a linear at its top and one below."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.attn, self.norm = nn.Linear(4, 4), nn.Module(), nn.LayerNorm(4)
        self.attn.q = nn.Linear(4, 4)


def test_layers_take_the_places_of_the_blocks_own_and_give_them_back() -> None:
    block = Nested()
    own = dict(block.named_modules())
    others = {"model.layers.3.top": nn.Linear(4, 4), "model.layers.3.attn.q": nn.Linear(4, 4)}
    with tunable(block, "model.layers.3.", others):
        assert block.top is others["model.layers.3.top"]
        assert block.attn.q is others["model.layers.3.attn.q"]
    assert dict(block.named_modules()) == own

    def fail() -> None:
        with tunable(block, "model.layers.3.", others):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert dict(block.named_modules()) == own
    put(block, "model.layers.3.", others)
    assert block.attn.q is others["model.layers.3.attn.q"]


def test_only_what_is_put_in_gets_gradients() -> None:
    block = Nested()
    block.attn.q.requires_grad_(False)
    before = {name: p.requires_grad for name, p in block.named_parameters()}
    other = nn.Linear(4, 4)
    with tunable(block, "", {"top": other}):
        block.norm(block.top(torch.ones(1, 4))).square().sum().backward()
        assert other.weight.grad is not None
    assert all(p.grad is None for p in block.parameters())
    assert {name: p.requires_grad for name, p in block.named_parameters()} == before
