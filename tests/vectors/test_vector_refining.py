"""Entries, scales and codes in turn: each step against a slow float64 one, and the loss that never rises."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from vector_reference import decoded, descended_by_loss, least_entries, loss, random_weight, spread_inputs

from llmq.grids.vq import VectorGrid, VectorWeight, whole_vectors
from llmq.hessian import damped
from llmq.solvers.vectors import vector_weighted_rtn
from llmq.vectors import refining
from llmq.vectors.metrics import blocks_of, filled
from llmq.vectors.placing import per_vector

CASES = [  # N, K, group size, bits, d
    (12, 16, 16, 1, 4),
    (9, 24, 8, 2, 2),
    (7, 19, 19, 1, 4),
    (6, 26, 12, 1, 4),
    (150, 16, 16, 1, 8),
    (4, 72, 8, 2, 2),
]


def start(case: tuple[int, int, int, int, int]) -> tuple[VectorWeight, torch.Tensor, torch.Tensor]:
    n, k, size, bits, d = case
    w, h = random_weight(n, k), damped(spread_inputs(k), 0.05, torch.float32)
    q = vector_weighted_rtn(w, h, VectorGrid(bits, d), size).weight
    assert isinstance(q, VectorWeight)
    return q, w, h


def lost(q: VectorWeight, w: torch.Tensor, h: torch.Tensor) -> float:
    return loss(w, decoded(q.codes, q.scales, q.codebook, q.group_size, q.in_features), h)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_state_knows_its_loss_and_slope(case: tuple[int, int, int, int, int]) -> None:
    q, w, h = start(case)
    state = refining.begin(q, w, h)
    for _ in range(2):
        for step in (refining.refit, refining.rescaled, refining.descended):
            state = step(state)
            assert refining.loss(state) == pytest.approx(lost(state.weight, w, h), rel=1e-4)
            fresh = refining.begin(state.weight, w, h)
            scale = float(fresh.gradient.abs().max())
            torch.testing.assert_close(state.gradient, fresh.gradient, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_step_raises_the_loss(case: tuple[int, int, int, int, int]) -> None:
    q, w, h = start(case)
    state, history = refining.begin(q, w, h), [lost(q, w, h)]
    for _ in range(4):
        for step in (refining.refit, refining.rescaled, refining.descended):
            state = step(state)
            history.append(lost(state.weight, w, h))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(history))
    assert history[-1] < 0.97 * history[0]
    assert lost(refining.refined(q, w, h, 4), w, h) == pytest.approx(history[-1], rel=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_entries_reach_the_dense_least_squares(case: tuple[int, int, int, int, int]) -> None:
    q, w, h = start(case)
    d, count = q.codebook.shape[1], q.codes.shape[1]
    state = refining.begin(q, w, h)
    scales = per_vector(q.scales, VectorGrid(case[3], d), q.group_size, count)
    _, least = least_entries(whole_vectors(w, d), filled(h, d), q.codes, scales, *q.codebook.shape)
    found = refining.least_squares(state, steps=200)
    after = lost(replace(q, codebook=found), w, h)
    # 12 steps are the product's; with many, what is left is float32's
    assert after <= least * 1.001 + 1e-5 * float((w @ h * w).sum())
    short = lost(replace(q, codebook=refining.least_squares(state)), w, h)
    # measured: 1.4e-5 at most; steepest descent leaves 2e-3
    assert short - least <= 3e-4 * (lost(q, w, h) - least) + 1e-7 * float((w @ h * w).sum())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conjugate_gradients_fall_step_by_step(case: tuple[int, int, int, int, int]) -> None:
    q, w, h = start(case)
    state = refining.begin(q, w, h)
    losses = [lost(replace(q, codebook=refining.least_squares(state, steps)), w, h) for steps in range(6)]
    assert losses[0] == pytest.approx(lost(q, w, h))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))


def test_entries_that_would_lose_more_rounded_are_not_taken() -> None:
    q, w, h = start(CASES[0])
    state = refining.refit(refining.begin(q, w, h))
    coarse = replace(state.weight, codebook=(state.weight.codebook / 40).round(), scales=state.weight.scales * 40)
    settled = refining.begin(coarse, w, h)
    for _ in range(3):
        settled = refining.refit(settled)
    assert refining.refit(settled) is settled


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scales_are_the_best_of_their_neighbours(case: tuple[int, int, int, int, int]) -> None:
    q, w, h = start(case)
    state = refining.rescaled(refining.begin(q, w, h))
    last = state.weight.scales.shape[1] - 1  # groups are moved in turn: nothing moves after the last one
    here = _row_losses(state.weight, w, h)
    for factor in (1 + 2**-7, 1 - 2**-7):
        scales = state.weight.scales.clone()
        scales[:, last] = (scales[:, last] * factor).bfloat16().float()
        assert (here <= _row_losses(replace(state.weight, scales=scales), w, h) * (1 + 1e-5)).all()
    assert (state.weight.scales != q.scales).any()
    assert torch.equal(state.weight.scales.bfloat16().float(), state.weight.scales)


def test_scales_that_would_lose_more_rounded_are_not_taken() -> None:
    """A foreign file may have scales between those that we store."""
    q, w, h = start(CASES[0])
    units = replace(q, scales=torch.ones_like(q.scales)).dequantize().double()
    best = (units @ h.double() * w.double()).sum(dim=1) / (units @ h.double() * units).sum(dim=1)
    assert (best > 0).all()
    state = refining.begin(replace(q, scales=best.float()[:, None]), w, h)
    assert refining.rescaled(state) is state


def _row_losses(q: VectorWeight, w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    error = w.double() - decoded(q.codes, q.scales, q.codebook, q.group_size, q.in_features)
    return (error @ h.double() * error).sum(dim=1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_are_those_of_least_whole_loss_one_after_another(case: tuple[int, int, int, int, int]) -> None:
    q, w, h = start(case)
    d = q.codebook.shape[1]
    scales = per_vector(q.scales, VectorGrid(case[3], d), q.group_size, q.codes.shape[1])
    expected = descended_by_loss(whole_vectors(w, d), filled(h, d), q.codes, scales, q.codebook)
    found = refining.descended(refining.begin(q, w, h)).weight
    assert torch.equal(found.codes.long(), expected)
    assert (found.codes != q.codes).any()


def test_of_entries_that_are_as_good_the_old_one_stays() -> None:
    q, w, h = start(CASES[0])
    book = q.codebook[:8].repeat(2, 1)
    state = refining.begin(replace(q, codes=q.codes % 8, codebook=book), w, h)
    for _ in range(20):
        state = refining.descended(state)
    assert refining.descended(state) is state
    twins = refining.begin(replace(state.weight, codes=state.weight.codes + 8), w, h)
    assert int(twins.weight.codes.max()) < 16
    assert refining.descended(twins) is twins


def test_it_ends_where_nothing_changes() -> None:
    q, w, h = start(CASES[0])
    done = refining.refined(q, w, h, 50)
    assert refining.refined(done, w, h, 1) is done
    assert refining.refined(q, w, h, 0) is q


def test_columns_beyond_the_end_stay_out_of_it() -> None:
    h = spread_inputs(6)
    full = filled(h, 4, fill=3.0)
    assert full.shape == (8, 8)
    assert torch.equal(full[:6, :6], h)
    assert torch.equal(full[6:, 6:], 3.0 * torch.eye(2))
    assert not full[:6, 6:].any()
    assert torch.equal(blocks_of(full, 4)[1], full[4:, 4:])
    assert filled(h, 2) is h
