"""Coordinate descent against a slow reference in float64 and against brute force."""

from dataclasses import replace

import pytest
import torch
from descent_reference import U, gradient_error, one_pass
from hypothesis import given, settings
from refine_cases import Problem, different_rows, losses, problem, problems, same

from llmq import descent as descent_module
from llmq.descent import descend
from llmq.types import Affine, QuantizedWeight

both_signs = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
both_starts = pytest.mark.parametrize("start", ["rtn", "random"])
CASES = [  # K, group size, bits, kind
    (1, 1, 2, "full"),
    (6, 6, 3, "full"),
    (33, 8, 4, "full"),
    (64, 64, 2, "full"),
    (70, 32, 3, "deficient"),
    (97, 32, 4, "dead"),
    (130, 48, 3, "full"),
]


@both_signs
@both_starts
@pytest.mark.parametrize(("k", "group_size", "bits", "kind"), CASES, ids=str)
def test_one_pass_is_that_of_the_reference(
    k: int, group_size: int, bits: int, kind: str, start: str, symmetric: bool
) -> None:
    q, w, h = problem(24, k, group_size, bits, symmetric, kind, start, seed=k)
    expected = one_pass(q.codes, q.scales, q.zeros, group_size, bits, w, h)
    assert expected.clear.float().mean() > 0.5, "too few rows are clear of ties to tell anything"
    found = descend(q, w, h)
    assert torch.equal(found.codes[expected.clear].double(), expected.codes[expected.clear])
    assert torch.equal(found.scales, q.scales)


@settings(max_examples=60)
@given(case=problems(n=4))
def test_any_pass_is_that_of_the_reference(case: Problem) -> None:
    q, w, h = case
    expected = one_pass(q.codes, q.scales, q.zeros, q.group_size, q.grid.bits, w, h)
    assert torch.equal(descend(q, w, h).codes[expected.clear].double(), expected.codes[expected.clear])


def converged(q: QuantizedWeight, w: torch.Tensor, h: torch.Tensor) -> QuantizedWeight:
    for _ in range(100):
        after = descend(q, w, h)
        if same(after, q):
            return q
        q = after
    raise AssertionError("100 passes and still moving")


@both_signs
@both_starts
@pytest.mark.parametrize("kind", ["full", "deficient", "dead"])
@pytest.mark.parametrize(("k", "group_size", "bits"), [(1, 1, 3), (4, 4, 2), (5, 2, 4), (6, 3, 3)], ids=str)
def test_no_single_code_could_be_better_at_the_end(
    k: int, group_size: int, bits: int, kind: str, start: str, symmetric: bool
) -> None:
    q, w, h = problem(6, k, group_size, bits, symmetric, kind, start, seed=10 * k)
    end = converged(q, w, h)
    least = losses(end, w, h)
    values = end.dequantize()
    # the last pass changed nothing, so that the gradient it saw holds the errors at its start alone
    off = gradient_error(values, w - values, torch.zeros_like(w), h)
    for j in range(k):
        for code in range(2**bits):
            codes = end.codes.clone()
            codes[:, j] = code
            other = replace(end, codes=codes)
            moved = (other.dequantize() - values)[:, j].double().abs()
            # H_jj Δ² - 2 Δ G_j, the first part exact up to a rounding of each distance
            allowed = 2 * moved * off[:, j] + 4 * U * h[j, j] * moved**2 + 1e-14 * least
            assert (losses(other, w, h) >= least - allowed).all()


@both_signs
@pytest.mark.parametrize("leaf", [1, 5, 64])
@pytest.mark.parametrize(("k", "group_size"), [(31, 1), (70, 16), (100, 100)], ids=str)
def test_where_the_pass_is_split_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, k: int, group_size: int, leaf: int, symmetric: bool
) -> None:
    q, w, h = problem(12, k, group_size, 3, symmetric, start="random", seed=1)
    usual = descend(q, w, h)
    monkeypatch.setattr(descent_module, "_LEAF", leaf)
    assert different_rows(usual, descend(q, w, h)) <= 1


@both_signs
def test_inputs_without_energy_keep_their_codes(symmetric: bool) -> None:
    q, w, h = problem(8, 70, 16, 3, symmetric, start="random", seed=2)
    dead = [0, 15, 16, 40, 69]
    h[dead], h[:, dead] = 0.0, 0.0
    found = descend(q, w, h)
    assert torch.equal(found.codes[:, dead], q.codes[:, dead])
    assert not torch.equal(found.codes, q.codes)


@both_signs
def test_a_diagonal_hessian_gives_the_nearest_codes_in_one_pass(symmetric: bool) -> None:
    q, w, _ = problem(8, 70, 16, 3, symmetric, start="random", seed=3)
    found = descend(q, w, torch.diag(torch.arange(1.0, 71.0)))
    expected = [
        q.grid.encode(w[:, 16 * g : 16 * g + 16], Affine(q.scales[:, g : g + 1], q.zeros[:, g : g + 1]))
        for g in range(5)
    ]
    assert torch.equal(found.codes, torch.cat(expected, dim=1))


def test_a_tie_changes_nothing() -> None:
    # H = I, w halfway between two levels: both codes cost the same, so whichever was there stays
    for code in (4, 5):
        q, _, _ = problem(1, 1, 1, 3, True)
        q = replace(q, codes=torch.tensor([[code]], dtype=torch.uint8), scales=torch.ones(1, 1))
        assert descend(q, torch.tensor([[0.5]]), torch.eye(1)).codes.item() == code
