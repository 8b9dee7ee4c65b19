"""State batch normalization: two branches, shared scale and offset, statistics of one of them."""

import pytest
import torch
from torch import Tensor, nn

from llmq.errors import SolverError
from llmq.tune.state_norm import StateBatchNorm

every_shape = pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 4, 5)], ids=str)


def by_hand(x: Tensor, norm: StateBatchNorm, mean: Tensor, variance: Tensor) -> Tensor:
    around = (1, -1, *[1] * (x.ndim - 2))
    mean, variance, weight, bias = (t.double().view(around) for t in (mean, variance, norm.weight, norm.bias))
    return (x.double() - mean) / (variance + 1e-5).sqrt() * weight + bias


def drawn(shape: tuple[int, ...]) -> tuple[StateBatchNorm, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    norm = StateBatchNorm(3)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(3, generator=draw) + 0.5)
        norm.bias.copy_(torch.randn(3, generator=draw))
    return norm, torch.randn(shape, generator=draw), 3 * torch.randn(shape, generator=draw) + 2


@every_shape
def test_each_branch_is_normalized_by_its_own_batch(shape: tuple[int, ...]) -> None:
    norm, quantized, mixed = drawn(shape)
    others = [d for d in range(len(shape)) if d != 1]
    for x, found in ((quantized, norm(quantized)), (mixed, norm.mixed(mixed))):
        expected = by_hand(x, norm, x.double().mean(others), x.double().var(others, unbiased=False))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_running_statistics_are_those_of_quantized_weights_alone() -> None:
    norm, quantized, mixed = drawn((2, 3, 4, 5))
    reference = nn.BatchNorm2d(3)
    for step in range(4):
        norm.mixed(mixed * step)
        norm(quantized + step)
        reference(quantized + step)
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    torch.testing.assert_close(norm.running_var, reference.running_var)
    norm.eval()
    expected = by_hand(quantized, norm, norm.running_mean, norm.running_var)
    torch.testing.assert_close(norm(quantized).double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(SolverError, match="mixed weights are for training"):
        norm.mixed(mixed)


def test_both_branches_move_one_scale_and_one_offset() -> None:
    norm, quantized, mixed = drawn((2, 3, 4, 5))
    (norm(quantized).square().sum() + norm.mixed(mixed).square().sum()).backward()
    both = norm.weight.grad.clone(), norm.bias.grad.clone()
    alone = []
    for branch, x in ((norm, quantized), (norm.mixed, mixed)):
        norm.zero_grad()
        branch(x).square().sum().backward()
        alone.append((norm.weight.grad.clone(), norm.bias.grad.clone()))
    for i in range(2):
        torch.testing.assert_close(both[i], alone[0][i] + alone[1][i])
        assert alone[0][i].abs().min() > 0
        assert alone[1][i].abs().min() > 0
    assert {name for name, _ in norm.named_parameters()} == {"weight", "bias"}
