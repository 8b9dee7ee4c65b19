import pytest
import torch
from kernel_cases import random_weight, random_x
from tolerance import assert_close_to_float64

from llmq_kernels import naive


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_truth_rounded_once_passes(dtype: torch.dtype) -> None:
    truth = torch.randn(5, 33, dtype=torch.float64)
    assert_close_to_float64(truth.to(dtype), truth, 64)


def test_all_zero_passes_only_if_exact() -> None:
    zero = torch.zeros(2, 2, dtype=torch.float64)
    assert_close_to_float64(zero.half(), zero, 64)
    with pytest.raises(AssertionError, match="inf eps"):
        assert_close_to_float64(zero.half() + 1, zero, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_nan_fails(dtype: torch.dtype) -> None:
    truth = torch.ones(3, 3, dtype=torch.float64)
    actual = truth.to(dtype)
    actual[1, 2] = torch.nan
    with pytest.raises(AssertionError, match="nan eps"):
        assert_close_to_float64(actual, truth, 64)


def test_a_wrong_shape_fails() -> None:
    with pytest.raises(AssertionError, match="is not"):
        assert_close_to_float64(torch.ones(1, 3).half(), torch.ones(3, dtype=torch.float64), 64)


def test_a_zero_off_by_one_in_one_group_of_112_fails() -> None:
    k = 112 * 128
    w = random_weight(32, k, 128, 4, symmetric=False)
    x = random_x(5, k, torch.float16)
    truth = naive.quant_matmul(x, w.codes, w.scales, w.zeros, None, 128)
    zeros = w.zeros.clone()
    zeros[:, 55] += 1
    wrong = naive.quant_matmul(x, w.codes, w.scales, zeros, None, 128)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close_to_float64(wrong.half(), truth, k)
