import math

import pytest

from llmq_eval.intervals import interval, t_quantile


def test_interval_of_hand_made_numbers() -> None:
    # mean 5, sd sqrt(20/3) with n - 1 = 3, t = 3.1824: margin 3.1824 * 2.58199 / 2
    low, high = interval([2.0, 4.0, 6.0, 8.0]) or (math.nan, math.nan)
    assert low == pytest.approx(5 - 4.10845, abs=1e-4)
    assert high == pytest.approx(5 + 4.10845, abs=1e-4)


@pytest.mark.parametrize("values", [[], [3.0]], ids=["none", "one"])
def test_fewer_than_two_values_have_no_interval(values: list[float]) -> None:
    assert interval(values) is None


def test_equal_values_leave_no_doubt() -> None:
    assert interval([0.5] * 7) == (0.5, 0.5)


# From published tables of Student's t.
@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706), (9, 2.262), (30, 2.042), (31, 2.0395), (40, 2.0211), (59, 2.0010), (120, 1.9799)],
)
def test_t_quantile_is_the_tabulated_one(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=6e-4)


def test_t_quantile_falls_towards_the_normal_one() -> None:
    quantiles = [t_quantile(degrees) for degrees in range(1, 200)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[-1] > 1.96
    assert t_quantile(10**9) == pytest.approx(1.959964)
