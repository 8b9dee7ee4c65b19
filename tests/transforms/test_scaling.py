"""Scales and their folding: against references in float64, and laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_reference import candidates, output_error
from torch import Tensor
from transform_cases import make, probes

from llmq.errors import SolverError
from llmq.families import Linear
from llmq.grids.uniform import UniformGrid
from llmq.solvers.gptq import gptq
from llmq.solvers.rtn import rtn
from llmq.transforms.folds import Fold, Norm, apply_scales_
from llmq.transforms.scaling import (
    EXPONENTS,
    Quantize,
    awq_scales,
    clipped_rtn,
    pooled_max,
    pooled_mean,
    smooth_scales,
)


def to_tenths(w: Tensor, h: Tensor | None = None) -> Tensor:
    """Round each row to steps of a tenth of its largest entry."""
    step = w.abs().amax(dim=1, keepdim=True) / 10
    return (w / step).round() * step


def problem(k: int, seed: int, *, dead: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return inputs x [T, K] with outlier channels, their Hessian, and two weights, all float64."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(60, k, generator=draw) @ (torch.eye(k) + 0.3 * torch.randn(k, k, generator=draw) / k**0.5)
    x = (x * torch.exp(1.5 * torch.randn(k, generator=draw))).double()
    if dead:
        x[:, :: max(k // 2, 1)] = 0
    weights = [torch.randn(n, k, generator=draw).double() for n in (5, 3)]
    return x, 2 * x.T @ x / len(x), weights


def owners(kind: str, k: int) -> Tensor | None:
    return {"own": None, "pairs": torch.arange(k) // 2, "far": torch.arange(k) % (k // 2)}[kind]


@pytest.mark.parametrize("dead", [False, True], ids=["", "dead"])
@pytest.mark.parametrize("kind", ["own", "pairs", "far"])
@pytest.mark.parametrize("k", [4, 10, 24])
def test_search_is_that_of_the_reference(k: int, kind: str, dead: bool) -> None:
    x, h, weights = problem(k, seed=k, dead=dead)
    source = owners(kind, k)
    found = awq_scales(x.abs().mean(0), weights, h, to_tenths, source)
    source = torch.arange(k) if source is None else source
    tried = candidates(x.abs().mean(0), source.tolist())
    errors = [output_error(weights, x, c, to_tenths) for c in tried]
    best = min(range(len(errors)), key=errors.__getitem__)
    # float64 on both sides: sums of some hundred terms
    assert found.loss == pytest.approx(errors[best], rel=1e-10)
    assert found.unscaled_loss == pytest.approx(errors[0], rel=1e-10)
    assert found.exponent == EXPONENTS[best]
    assert torch.allclose(found.scales[source], tried[best], rtol=1e-12)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 40), units=st.sampled_from([1e-6, 1.0, 1e4]))
def test_scaling_never_loses_in_its_own_measure(seed: int, k: int, units: float) -> None:
    x, h, weights = problem(k, seed, dead=seed % 3 == 0)
    found = awq_scales(x.abs().mean(0), weights, h, to_tenths)
    assert found.loss <= found.unscaled_loss
    c = found.scales
    assert (c >= 1e-4).all()
    active = x.abs().amax(0) > 0
    assert (c[~active] == 1).all()
    # the extremes are inverse to each other, unless the smaller was cut off
    if active.any() and c[active].min() > 1e-4:
        assert float(c[active].max() * c[active].min()) == pytest.approx(1)
    # whatever the units of x: to the last bit they are not, so that codes may flip at ties
    other = awq_scales(units * x.abs().mean(0), weights, h, to_tenths)
    assert other.loss == pytest.approx(found.loss, rel=1e-6)


def test_no_column_is_scaled_away() -> None:
    seen: list[float] = []

    def watch(w: Tensor, h: Tensor) -> Tensor:
        seen.append(float(w.min()))
        return w

    awq_scales(torch.tensor([1e-12, 1.0]), [torch.ones(1, 2)], torch.eye(2), watch)
    assert min(seen) == pytest.approx(1e-4)  # without a limit 1e-12^(.95 / 2) = 2e-6


def test_outlier_channels_gain_much() -> None:
    """Some inputs 30 times as large as others: what AWQ is for."""
    draw = torch.Generator().manual_seed(0)
    size = torch.ones(64)
    size[::16] = 30.0
    x = torch.randn(500, 64, generator=draw) * size
    h, w = 2 * x.T @ x / 500, torch.randn(32, 64, generator=draw)
    found = awq_scales(x.abs().mean(0), [w], h, to_tenths)
    assert found.exponent > 0
    assert found.loss < 0.5 * found.unscaled_loss
    assert (found.scales[::16].min() > found.scales[1:16].max()).all()


def test_equal_inputs_are_left_alone() -> None:
    found = awq_scales(torch.ones(8), [torch.randn(4, 8)], torch.eye(8), clipped_rtn(UniformGrid(4, False), 8))
    assert found.exponent == 0
    assert torch.equal(found.scales, torch.ones(8, dtype=torch.float64))


def test_the_quantizer_gets_weights_and_hessian_as_scaled() -> None:
    """Inputs divided by c have the Hessian D⁻¹ H D⁻¹."""
    x, h, weights = problem(6, seed=1)
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(w: Tensor, h: Tensor) -> Tensor:
        seen.append((w, h))
        return to_tenths(w)

    awq_scales(x.abs().mean(0), weights[:1], h, watch)
    assert len(seen) == len(EXPONENTS)
    for c, (w, hessian) in zip(candidates(x.abs().mean(0), list(range(6))), seen, strict=True):
        scaled = x / c
        assert torch.allclose(hessian, 2 * scaled.T @ scaled / len(x))
        assert torch.allclose(w, weights[0] * c)


def test_a_solver_may_judge() -> None:
    """With GPTQ as the quantizer the scales suit GPTQ: no worse than none for it, which those for rounding may be."""
    x, h, (w, _) = problem(24, seed=2)
    h = h.float()

    def solve(w: Tensor, h: Tensor) -> Tensor:
        return gptq(w, h, UniformGrid(3, False), 8).weight.dequantize()

    found = awq_scales(x.abs().mean(0), [w], h, solve)
    assert found.exponent > 0
    c = found.scales.float()
    error = w.float() - solve(w.float() * c, h / (c * c[:, None])) / c
    assert float(((error @ h) * error).sum()) == pytest.approx(found.loss, rel=1e-4)
    assert found.loss < found.unscaled_loss


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_statistics_that_cannot_be_are_refused(bad: float) -> None:
    with pytest.raises(SolverError, match="negative, NaN or infinite"):
        awq_scales(torch.tensor([1.0, bad]), [torch.ones(1, 2)], torch.eye(2), to_tenths)


@pytest.mark.parametrize("group_size", [5, 16, 32])
def test_clipped_rtn_without_preference_is_no_worse_than_rtn(group_size: int) -> None:
    w, grid = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), UniformGrid(3, True)
    quantize: Quantize = clipped_rtn(grid, group_size)
    found, plain = quantize(w, torch.eye(32)), rtn(w, None, grid, group_size).weight.dequantize()
    assert (found - w).square().sum() < (plain - w).square().sum()
    one = torch.zeros(32, 32)
    one[31, 31] = 1.0  # only this column matters: its own group is placed for it, the others are not shrunk
    last = 32 % group_size or group_size
    assert ((quantize(w, one) - w)[:, 31].square() <= (plain - w)[:, 31].square()).all()
    assert torch.equal(quantize(w, one)[:, :-last], plain[:, :-last])


def test_smoothquant_vector() -> None:
    x, w = torch.tensor([10.0, 0.5]), torch.tensor([0.2, 1.0])
    s = smooth_scales(x, w, 0.5)
    assert torch.allclose(s, torch.tensor([50**0.5, 0.5**0.5]).double())  # 7.0711, .7071
    assert torch.allclose(x / s, torch.tensor([2**0.5, 0.5**0.5]).double())
    assert torch.allclose(w * s, x / s)


@given(seed=st.integers(0, 10**6), a=st.floats(0, 1))
def test_smoothing_moves_a_share_of_the_difficulty(seed: int, a: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, w = torch.exp(2 * torch.randn(2, 9, generator=draw)).double()
    s = smooth_scales(x, w, a)
    # x/s and w·s multiply to x·w; their logarithms divide it as 1 - a to a
    assert torch.allclose((x / s).log(), (1 - a) * (x * w).log())
    assert torch.allclose((w * s).log(), a * (x * w).log())


def test_smoothing_leaves_dead_channels_alone() -> None:
    s = smooth_scales(torch.tensor([0.0, 3.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]))
    assert torch.equal(s, torch.ones(3, dtype=torch.float64))


def test_smoothing_of_norms_is_the_rescaling_of_quip() -> None:
    _, h, (w, _) = problem(12, seed=0)
    d = (h.diagonal() / w.square().sum(0)) ** 0.25
    found = smooth_scales(h.diagonal().sqrt(), w.norm(dim=0))
    assert torch.allclose(found, d)
    # W D and D⁻¹ H D⁻¹ then have proportional columns, the lowest tr(H) ‖W‖² that a rescaling reaches
    cost = lambda c: (h.diagonal() / c**2).sum() * (w * c).square().sum()  # noqa: E731
    assert all(cost(d) <= cost(d * torch.exp(0.1 * torch.randn(12).double())) for _ in range(20))


@pytest.mark.parametrize("a", [-0.1, 1.1])
def test_smoothing_exponents_out_of_range_are_refused(a: float) -> None:
    with pytest.raises(SolverError, match="use 0 to 1"):
        smooth_scales(torch.ones(2), torch.ones(2), a)


def test_pooling_over_the_inputs_of_a_channel() -> None:
    values, source = torch.tensor([1.0, -2.0, 5.0, 4.0]), torch.tensor([0, 1, 0, 1])
    assert torch.equal(pooled_mean(values, source), torch.tensor([3.0, 1.0]).double())
    assert torch.equal(pooled_max(values, source), torch.tensor([5.0, 4.0]))
    assert torch.equal(pooled_max(-values, source), torch.tensor([-1.0, 2.0]))


def linear(n: int, k: int, *, bias: bool = True) -> Linear:
    return Linear("layer", torch.nn.Linear(k, n, bias=bias).requires_grad_(False), transposed=False)


def test_fold_into_a_norm_of_one_plus_weight() -> None:
    module = torch.nn.LayerNorm(3)
    module.weight.data, module.bias.data = torch.tensor([0.0, 1.0, -0.5]), torch.tensor([1.0, 2.0, 3.0])
    reader = linear(2, 3)
    before = reader.weight.clone()
    c = torch.tensor([2.0, 0.5, 4.0])
    apply_scales_(Fold(Norm("norm", module, True, True), 0, 3, [reader], torch.arange(3)), c)
    assert torch.equal(module.weight.data, torch.tensor([0.5 - 1, 4.0 - 1, 0.125 - 1]))
    assert torch.equal(module.bias.data, torch.tensor([0.5, 4.0, 0.75]))
    assert torch.equal(reader.weight, before * c)


def test_fold_into_some_rows_of_a_linear_with_shared_channels() -> None:
    producer, reader = linear(7, 3), linear(2, 4)
    rows, bias, columns = producer.weight.clone(), producer.module.bias.clone(), reader.weight.clone()
    c = torch.tensor([2.0, 8.0])
    apply_scales_(Fold(producer, 4, 2, [reader], torch.tensor([0, 1, 0, 1])), c)
    assert torch.equal(producer.weight[[0, 1, 2, 3, 6]], rows[[0, 1, 2, 3, 6]])
    assert torch.equal(producer.weight[4:6], rows[4:6] / c[:, None])
    assert torch.equal(producer.module.bias[4:6], bias[4:6] / c)
    assert torch.equal(producer.module.bias[[0, 1, 2, 3, 6]], bias[[0, 1, 2, 3, 6]])
    assert torch.equal(reader.weight, columns * torch.tensor([2.0, 8.0, 2.0, 8.0]))


def test_products_are_rounded_once() -> None:
    """bfloat16 weights times a float64 factor: the nearest bfloat16 to the exact product."""
    producer, reader = linear(64, 3), linear(16, 64)
    for layer in (producer, reader):
        layer.module.bfloat16()
    rows, columns = producer.weight.double(), reader.weight.double()
    c = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(0)).double())
    apply_scales_(Fold(producer, 0, 64, [reader], torch.arange(64)), c)
    assert torch.equal(reader.weight, (columns * c).bfloat16())
    assert torch.equal(producer.weight, (rows / c[:, None]).bfloat16())


@pytest.mark.parametrize("bad", [torch.tensor([1.0, 0.0]), torch.tensor([1.0, torch.nan]), torch.ones(3)], ids=str)
def test_scales_that_cannot_be_undone_are_refused(bad: Tensor) -> None:
    fold = Fold(linear(2, 3), 0, 2, [linear(1, 2)], torch.arange(2))
    with pytest.raises(SolverError, match="layer -> layer: scales of shape"):
        apply_scales_(fold, bad)


def test_awq_on_a_block_lowers_the_error_of_its_grouped_values() -> None:
    """A whole fold with grouped-query attention: inputs of o_proj, scales per value channel, fold, loss as promised."""
    from llmq.transforms.wiring import find_wiring

    probe = probes(*make("llama"))[0]
    fold = next(f for f in find_wiring(*probe).folds if f.head_dim)
    reader = fold.consumers[0]
    inputs: list[Tensor] = []
    handle = reader.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    out = probe.run(probe.x)
    x = inputs[0]
    h = 2 * x.T @ x / len(x)
    quantize = clipped_rtn(UniformGrid(3, False), 16)
    found = awq_scales(x.abs().mean(0), [reader.weight], h, quantize, fold.source)
    assert found.scales.shape == (24,)
    apply_scales_(fold, found.scales)
    assert torch.allclose(probe.run(probe.x), out, atol=1e-5)
    handle.remove()
    after = inputs[1]
    error = reader.weight - quantize(reader.weight, 2 * after.T @ after / len(after))
    assert float(2 * (after @ error.T).square().sum() / len(x)) == pytest.approx(found.loss, rel=1e-3)
