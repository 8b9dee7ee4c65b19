import gc

import torch

from llmq.planning.counting import Counting, Held, Work, side


def test_products_are_counted_by_dtype_and_least_side() -> None:
    a, b, c = torch.randn(3, 8), torch.randn(8, 5), torch.randn(3, 5)
    with Counting() as counting:
        a @ b
        c.addmm_(a, b)
        a.double() @ b.double()
    assert counting.work.products == {("float32", side(3)): 2 * 2 * 3 * 8 * 5, ("float64", side(3)): 2 * 3 * 8 * 5}


def test_factors_and_solves_are_no_products() -> None:
    h, x = torch.eye(6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    with Counting() as counting:
        lower, _ = torch.linalg.cholesky_ex(h)
        torch.cholesky_solve(x, lower)
        torch.linalg.solve_triangular(lower, x, upper=False)
    assert counting.work.factors == {("float64", 2): 6**3 / 3}
    assert counting.work.solves == {("float64", 2): (2 + 1) * 6 * 6 * 4}
    assert counting.work.products == {}


def test_other_operations_count_by_the_bytes_they_make_and_views_not_at_all() -> None:
    x = torch.randn(10, 10)
    with Counting(whole=400) as counting:
        x + x  # as large as that: 400 bytes
        x[0] * 2  # 40 bytes; the view is free
        x.T.reshape(-1).view(10, 10)  # a copy, and a view of it
    assert (counting.work.far, counting.work.near, counting.work.calls) == (400 + 400, 40, 3)


def test_what_is_held_at_once_ends_with_its_last_view() -> None:
    with Held() as held:
        a = torch.zeros(100)
        part = a[:1]
        del a
        torch.zeros(50) + 1  # two at once
        assert held.peak == 400 + 2 * 200
        del part
        gc.collect()
        assert held.now == 0


def test_work_adds_up_and_scales() -> None:
    with Counting() as counting:
        torch.randn(4, 4) @ torch.randn(4, 4)
    work = counting.work
    twice = work + work
    assert twice == work * 2.0
    assert twice + work * -2.0 == Work(products=_zero(work.products), calls=0.0)


def _zero(amounts: dict[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    return dict.fromkeys(amounts, 0.0)
