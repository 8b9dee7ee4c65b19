"""Orders against their definitions."""

from itertools import pairwise

import pytest
import torch
from order_reference import WHOLE_GROUPS, minimum_pivots, visit
from solver_cases import correlated

from llmq.errors import SolverError
from llmq.hessian import factorize
from llmq.solvers.orders import ORDERS, find_order

every_order = pytest.mark.parametrize("order", ORDERS)
SIZES = [(1, 1), (5, 2), (33, 8), (64, 64), (70, 32), (96, 1)]


@every_order
@pytest.mark.parametrize(("k", "group_size"), SIZES, ids=str)
def test_the_order_is_that_of_the_definition(order: str, k: int, group_size: int) -> None:
    _, h = correlated(1, k, seed=k)
    found = ORDERS[order].permutation(h, group_size)
    assert (found.dtype, found.shape) == (torch.int64, (k,))
    assert found.tolist() == visit(h, order, group_size)


@pytest.mark.parametrize("panel", [1, 7, 64])
def test_panels_change_nothing_in_the_pivots(monkeypatch: pytest.MonkeyPatch, panel: int) -> None:
    monkeypatch.setattr("llmq.solvers.orders._PANEL", panel)
    for seed in range(4):
        _, h = correlated(1, 48, seed, tokens=30)  # rank-deficient, so that only the ridge tells the last ones
        expected, gap = minimum_pivots(h)
        assert gap > 1e-4, "a choice so close that float32 may see the other one"
        assert ORDERS["pivot"].permutation(h, 8).tolist() == expected


@every_order
def test_groups_stay_whole_where_the_table_says_so(order: str) -> None:
    _, h = correlated(1, 70, seed=1)
    groups = (ORDERS[order].permutation(h, 16) // 16).tolist()
    changes = sum(a != b for a, b in pairwise(groups))
    assert (changes == 4) == ORDERS[order].whole_groups == (order in WHOLE_GROUPS)


def test_a_short_group_may_come_first() -> None:
    h = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0]))
    assert ORDERS["group"].permutation(h, 2).tolist() == [4, 3, 2, 1, 0]
    h = torch.diag(torch.tensor([1.0, 8.0, 3.0, 4.0, 5.0]))
    assert ORDERS["group"].permutation(h, 2).tolist() == [1, 0, 4, 3, 2]


@every_order
def test_equal_energies_keep_their_places(order: str) -> None:
    found = ORDERS[order].permutation(torch.eye(40) * 2, 8).tolist()
    assert found == (list(reversed(range(40))) if order == "pivot" else list(range(40)))


@every_order
def test_inputs_that_never_occur_come_last(order: str) -> None:
    if order == "natural":
        return
    _, h = correlated(1, 40, seed=2)
    dead = [0, 8, 9, 39] if order != "group" else list(range(8, 16))
    h[dead], h[:, dead] = 0.0, 0.0
    assert sorted(ORDERS[order].permutation(h, 8).tolist()[-len(dead) :]) == dead


def test_minimum_pivots_keep_the_bound_small() -> None:
    # Σ R_jj² bounds the loss of a sweep; the product of the R_jj² is the same in every order
    for seed in range(5):
        _, h = correlated(1, 64, seed)
        bounds = {}
        for order in ORDERS:
            visited = ORDERS[order].permutation(h, 16)
            factor = factorize(h[visited][:, visited], 0.01)
            assert factor is not None
            bounds[order] = factor.r.diagonal().double().square().sum().item()
        assert bounds["pivot"] == min(bounds.values())
        assert bounds["act"] < bounds["natural"]


def test_an_order_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(SolverError, match="order is 'best'; use natural, act, group, pivot"):
        find_order("best")
