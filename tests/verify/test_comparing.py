"""Two sets of logits in numbers: against the definitions, written out with loops."""

import math

import pytest
import torch

from llmq.errors import SpecError
from llmq.verify.comparing import compare


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl_of(before: list[float], after: list[float]) -> float:
    p, q = ([math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in (before, after))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("positions", [5, 4])
def test_numbers_are_what_their_names_say(positions: int) -> None:
    reference, other = (
        draw(2, 5, 7) * 3 - 9,
        draw(2, positions, 9, seed=1),
    )  # a padded vocabulary, the last position missing
    found = compare(reference, other)
    rows = [(reference[b, p].tolist(), other[b, p, :7].tolist()) for b in range(2) for p in range(positions)]
    differences = [abs(x - y) for before, after in rows for x, y in zip(before, after, strict=True)]
    largest = max(abs(x) for before, _ in rows for x in before)
    tops = [before.index(max(before)) == after.index(max(after)) for before, after in rows]
    assert found.finite
    assert found.positions == len(rows)
    # both are sums of float64 in another order
    assert found.max == pytest.approx(max(differences), rel=1e-12)
    assert found.mean == pytest.approx(sum(differences) / len(differences), rel=1e-12)
    assert found.relative == pytest.approx(max(differences) / largest, rel=1e-12)
    assert found.kl == pytest.approx(sum(kl_of(*row) for row in rows) / len(rows), rel=1e-9)
    assert found.agreement == pytest.approx(sum(tops) / len(tops))


def test_a_model_is_as_far_from_itself_as_nothing() -> None:
    logits = draw(2, 5, 7)
    found = compare(logits, logits)
    assert (found.max, found.mean, found.relative, found.agreement) == (0.0, 0.0, 0.0, 1.0)
    assert found.kl == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_no_numbers(value: float) -> None:
    other = draw(2, 5, 7)
    other[1, 3, 2] = value
    found = compare(draw(2, 5, 7), other)
    assert not found.finite
    assert found.max is found.mean is found.relative is found.kl is found.agreement is None


@pytest.mark.parametrize("shape", [(2, 6, 7), (1, 5, 7), (2, 5, 6), (2, 0, 7), (5, 7)])
def test_logits_of_something_else_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="logits"):
        compare(draw(2, 5, 7), draw(*shape))
