"""Both steps of k-means in a metric, and what comes of them."""

from itertools import pairwise

import pytest
import torch
from vector_reference import best_entries, costs_of

from llmq.vectors.codebooks import (
    Vectors,
    centroids,
    first_codebook,
    learn,
    least_costs,
    nearest_entries,
    vectors_of,
)

SIZES = [(1, 1, 2, 2), (3, 7, 2, 4), (5, 11, 4, 16), (4, 9, 8, 6), (2, 300, 4, 8)]  # P, N, d, entries


def random_vectors(p: int, n: int, d: int, seed: int = 0) -> Vectors:
    draw = torch.Generator().manual_seed(seed)
    scales = torch.rand(p, n, generator=draw) + 0.1
    return Vectors(torch.randn(p, n, d, generator=draw), scales, torch.randn(p, d, d, generator=draw))


def random_book(k: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(k, d, generator=torch.Generator().manual_seed(77 + seed))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_vectors_take_the_entry_of_least_cost(size: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    p, n, d, k = size
    monkeypatch.setattr("llmq.vectors.codebooks._CHUNK", 2 * n * k)  # several chunks, a ragged last one
    vectors, book = random_vectors(p, n, d), random_book(k, d)
    codes, costs = nearest_entries(vectors, book)
    expected = costs_of(vectors.values, vectors.scales, vectors.roots, book)
    # entries within float32 rounding of the best are as good: 100 eps of the cost of the whole vector
    slack = 1e-5 * (1 + expected.amax(dim=2))
    taken = expected.gather(2, codes[:, :, None])[:, :, 0]
    assert (taken <= expected.amin(dim=2) + slack).all()
    torch.testing.assert_close(costs.double(), taken, rtol=1e-4, atol=1e-4)
    assert torch.equal(least_costs(vectors, book), costs)


def test_in_the_plain_metric_that_is_the_nearest_entry() -> None:
    vectors = random_vectors(3, 50, 4)
    plain = Vectors(vectors.values, vectors.scales, torch.eye(4).expand(3, 4, 4))
    book = random_book(16, 4)
    codes, _ = nearest_entries(plain, book)
    points = (plain.values / plain.scales[:, :, None]).double()
    assert torch.equal(codes, torch.cdist(points, book.double().expand(3, -1, -1)).argmin(dim=2))


def test_of_equal_entries_the_first_is_taken() -> None:
    codes, _ = nearest_entries(random_vectors(2, 9, 2), torch.ones(5, 2))
    assert not codes.any()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_entries_are_least_squares_of_their_vectors(size: tuple[int, int, int, int]) -> None:
    p, n, d, k = size
    vectors, book = random_vectors(p, n, d), random_book(k, d)
    codes = torch.randint(0, k, (p, n), generator=torch.Generator().manual_seed(3))
    found, weight = centroids(vectors, codes, book)
    expected = best_entries(vectors.values, vectors.scales, vectors.roots, codes, k)
    empty = expected.isnan().any(dim=1)
    assert torch.equal(found[empty], book[empty])
    assert torch.equal(weight == 0, empty)

    def total(entries: torch.Tensor) -> float:
        costs = costs_of(vectors.values, vectors.scales, vectors.roots, entries)
        return float(costs.gather(2, codes[:, :, None]).sum())

    filled = torch.where(empty[:, None], book.double(), expected)
    assert total(found) <= total(filled) * (1 + 1e-4) + 1e-6  # random metrics are ill-conditioned: costs, not entries


def test_vectors_of_one_weight_have_their_mean_as_entry() -> None:
    draw = torch.Generator().manual_seed(0)
    metric = torch.randn(4, 4, generator=draw)  # any, if all share it
    vectors = Vectors(torch.randn(3, 20, 4, generator=draw), torch.ones(3, 20), metric.expand(3, 4, 4))
    codes = torch.randint(0, 5, (3, 20), generator=draw)
    found, _ = centroids(vectors, codes, torch.zeros(5, 4))
    for entry in range(5):
        torch.testing.assert_close(found[entry], vectors.values[codes == entry].mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "book", "cost"), [((1, 1, 1, 1, 0.01), (0.05, 0.97015), 0.1732), ((1, 1, 1, 1, 1), (0.5, 5), 0.82)]
)
def test_weighted_example_in_one_dimension(weights: tuple[float, ...], book: tuple[float, float], cost: float) -> None:
    """Weights 0, .1, .9, 1, 5: the far one either counts a hundredth, or takes an entry for itself."""
    roots = torch.tensor(weights).sqrt().view(5, 1, 1)
    vectors = vectors_of(torch.tensor([[0.0, 0.1, 0.9, 1.0, 5.0]]), torch.ones(1, 5), roots)
    found, history = learn(vectors, torch.tensor([[0.0], [5.0 if weights[-1] == 1 else 1.0]]))
    torch.testing.assert_close(found.flatten(), torch.tensor(book), rtol=1e-4, atol=1e-5)
    assert history[-1] == pytest.approx(cost, rel=1e-3)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_learning_never_raises_the_cost(size: tuple[int, int, int, int]) -> None:
    p, n, d, k = size
    vectors = random_vectors(p, n, d, seed=5)
    found, history = learn(vectors, random_book(k, d))
    assert all(after <= before for before, after in pairwise(history))
    assert history[-1] == pytest.approx(float(nearest_entries(vectors, found)[1].sum()), rel=1e-5)
    if n * p > 4 * k:
        assert history[-1] < 0.9 * history[0]


def test_an_empty_entry_splits_the_most_loaded() -> None:
    values = torch.tensor([[[0.0, 0.0], [0.0, 0.1], [4.0, 4.0], [9.0, 9.0], [30.0, 30.0]]])
    vectors = Vectors(values, torch.ones(1, 5), torch.eye(2).expand(1, 2, 2))
    # the last entry is far from all; of the first, which has four vectors, (9, 9) is the furthest
    found, history = learn(vectors, torch.tensor([[3.0, 3.0], [30.0, 30.0], [99.0, -99.0]]))
    expected = torch.tensor([[4 / 3, 4.1 / 3], [30.0, 30.0], [9.0, 9.0]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert history[-1] == pytest.approx(21.0733, rel=1e-4)


def test_no_entry_is_lost_on_fewer_vectors_than_entries() -> None:
    vectors = random_vectors(1, 3, 4)
    found, history = learn(vectors, first_codebook(vectors, 16))
    assert history[-1] == pytest.approx(0.0, abs=1e-5)
    assert found.isfinite().all()


def test_the_first_codebook_is_of_vectors_and_spread_in_any_linear_picture() -> None:
    vectors = random_vectors(4, 64, 4)
    one = Vectors(vectors.values, torch.ones(4, 64), vectors.roots)
    book = first_codebook(one, 32)
    points = one.values.flatten(0, 1)
    assert all(bool((points == entry).all(dim=1).any()) for entry in book)
    assert len(book.unique(dim=0)) == 32
    turn = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) + 2 * torch.eye(4)
    turned = first_codebook(Vectors(one.values @ turn, one.scales, one.roots), 32)
    torch.testing.assert_close(turned, book @ turn, rtol=1e-4, atol=1e-5)
    moved = first_codebook(Vectors(one.values + 5.0, one.scales, one.roots), 32)
    torch.testing.assert_close(moved, book + 5.0, rtol=1e-4, atol=1e-5)


def test_a_weight_of_zeros_has_a_codebook_of_zeros() -> None:
    vectors = Vectors(torch.zeros(2, 8, 4), torch.ones(2, 8), torch.eye(4).expand(2, 4, 4))
    found, history = learn(vectors, first_codebook(vectors, 16))
    assert not found.any()
    assert history[-1] == 0
