"""Block tuning: never worse than its start on what it was not tuned on, always on the grid, and nothing left behind."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from tune_cases import Case, assert_on_grid, gpt2, llama, make_case, padded, windows

from llmq.calibration import Calibration, split_held_out
from llmq.stream import Stream
from llmq.tune.block import BlockRates, Site, tune_block
from llmq.types import QuantizedWeight

RATES = BlockRates(steps=20, codes=0.02, scales=0.01)


def held_out_loss(case: Case, site: Site, weights: dict[str, QuantizedWeight], *, held_out: bool = True) -> float:
    """Return the loss of a block with these weights: squared error over the mean square of the training targets."""
    case.hold(site.index, weights)
    energies: list[float] = []
    losses: list[float] = []
    for number, batch in enumerate(site.stream.batches):
        valid = torch.ones_like(batch.ids, dtype=torch.bool) if batch.valid is None else batch.valid
        target = site.targets[number][valid].double()
        if not batch.held_out:
            energies.append(float(target.square().mean()))
        if batch.held_out == held_out:
            with torch.no_grad():
                out = site.stream.through(site.block, site.index, number, site.stream.hidden[number])
            losses.append(float((out[valid].double() - target).square().mean()))
    return sum(losses) / len(losses) / (sum(energies) / len(energies))


def starts(case: Case, index: int) -> dict[str, QuantizedWeight]:
    return {name: q for name, (_, _, q) in case.layers[index].items()}


def same(a: dict[str, QuantizedWeight], b: dict[str, QuantizedWeight]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name].codes, b[name].codes)
        and torch.equal(a[name].scales, b[name].scales)
        and torch.equal(a[name].zeros, b[name].zeros)
        for name in a
    )


@pytest.mark.parametrize(("symmetric", "index"), [(True, 1), (False, 0), (False, 1)])
def test_the_result_is_better_on_held_out_windows_and_the_report_is_true(symmetric: bool, index: int) -> None:
    case = make_case(symmetric=symmetric, calibration=windows(16), held_out=windows(3, seed=1))
    site = case.site(index)
    own, before = dict(site.block.named_modules()), starts(case, index)
    found, report = tune_block(site, case.layers[index], RATES)
    assert dict(site.block.named_modules()) == own
    assert all(p.grad is None for p in site.block.parameters())
    assert found.keys() == before.keys()
    for name, q in found.items():
        assert_on_grid(q)
        assert torch.equal(q.zeros, before[name].zeros)
        assert (q.grid, q.group_size) == (before[name].grid, before[name].group_size)
    assert (report.what, report.steps) == (f"model.layers.{index}", 20)
    assert report.kept_step > 0
    assert report.kept_step % 2 == 0  # every tenth of the steps is looked at
    assert report.held_out_after == pytest.approx(held_out_loss(case, site, found), rel=1e-4)
    assert report.held_out_before == pytest.approx(held_out_loss(case, site, before), rel=1e-4)
    assert held_out_loss(case, site, found) < 0.95 * held_out_loss(case, site, before)
    assert any(not torch.equal(q.codes, before[name].codes) for name, q in found.items())
    assert any(not torch.equal(q.scales, before[name].scales) for name, q in found.items())


@pytest.mark.parametrize(("codes", "scales"), [(0.02, 0.0), (0.0, 0.01)])
def test_codes_and_scales_help_each_on_its_own(codes: float, scales: float) -> None:
    case = make_case(calibration=windows(16), held_out=windows(3, seed=1))
    site, before = case.site(), starts(case, 0)
    found, report = tune_block(site, case.layers[0], BlockRates(20, codes, scales))
    assert report.held_out_after < 0.95 * report.held_out_before
    assert any(not torch.equal(q.codes, before[name].codes) for name, q in found.items()) == (codes > 0)
    assert any(not torch.equal(q.scales, before[name].scales) for name, q in found.items()) == (scales > 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("codes", "scales"), [(0.3, 0.0), (0.0, 0.3), (5.0, 0.01), (0.01, 5.0), (1e4, 1e4)])
def test_no_learning_rate_makes_it_worse(seed: int, codes: float, scales: float) -> None:
    case = make_case(calibration=windows(4, seed=seed), held_out=windows(2, seed=9))
    site = case.site()
    found, report = tune_block(site, case.layers[0], BlockRates(8, codes, scales), seed)
    for q in found.values():
        assert_on_grid(q)
    assert report.held_out_after <= report.held_out_before
    if report.kept_step == 0:
        assert same(found, starts(case, 0))
        assert report.held_out_after == report.held_out_before
    else:
        assert held_out_loss(case, site, found) < held_out_loss(case, site, starts(case, 0))


def test_the_best_state_is_kept_and_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmq.tune import block

    losses = iter([5.0, 4.0, 1.0, 2.0, 3.0, 1.0])
    monkeypatch.setattr(block._Problem, "held_out_loss", lambda _: next(losses))
    case = make_case()
    _, report = tune_block(case.site(), case.layers[0], BlockRates(5))
    assert (report.kept_step, report.held_out_before, report.held_out_after) == (2, 5.0, 1.0)
    losses = iter([1.0, 4.0, 1.0])
    found, report = tune_block(make_case().site(), case.layers[0], BlockRates(2))
    assert (report.kept_step, report.held_out_after) == (0, 1.0)
    assert same(found, starts(case, 0))
    losses = iter([1.0, float("nan"), 0.5])
    assert tune_block(make_case().site(), case.layers[0], BlockRates(2))[1].kept_step == 2
    losses = iter([float(-n) for n in range(13)])  # every second of 23 steps, and the last
    assert tune_block(make_case().site(), case.layers[0], BlockRates(23))[1].kept_step == 23


def test_no_steps_change_nothing() -> None:
    case = make_case(held_out=windows(2, seed=1))
    found, report = tune_block(case.site(), case.layers[0], BlockRates(0))
    assert same(found, starts(case, 0))
    assert (report.steps, report.kept_step) == (0, 0)
    assert report.held_out_before == report.held_out_after > 0


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    def tuned(seed: int) -> dict[str, QuantizedWeight]:
        case = make_case()
        return tune_block(case.site(), case.layers[0], replace(RATES, steps=5), seed)[0]

    assert same(tuned(0), tuned(0))
    assert not same(tuned(0), tuned(1))


def test_held_out_batches_only_judge_and_all_others_train(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(held_out=windows(3, seed=1))
    assert [batch.held_out for batch in case.stream.batches] == [False, False, False, True, True]
    site, trained, judged = case.site(), [], []
    through = Stream.through

    def watched(stream: Stream, block: torch.nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        (trained if torch.is_grad_enabled() else judged).append(batch)
        return through(stream, block, index, batch, hidden)

    monkeypatch.setattr(Stream, "through", watched)
    tune_block(site, case.layers[0], BlockRates(6))
    assert judged == [3, 4] * 7
    assert sorted(trained[:3]) == sorted(trained[3:]) == [0, 1, 2]


def test_without_held_out_windows_those_trained_on_judge() -> None:
    case = make_case()
    site = case.site()
    found, report = tune_block(site, case.layers[0], RATES)
    assert report.held_out_before == pytest.approx(held_out_loss(case, site, starts(case, 0), held_out=False), rel=1e-4)
    assert report.held_out_after == pytest.approx(held_out_loss(case, site, found, held_out=False), rel=1e-4)


def test_padding_counts_nothing() -> None:
    def tuned(calibration: Calibration, held_out: Calibration | None, noise: float) -> dict[str, QuantizedWeight]:
        case = make_case(calibration=calibration, held_out=held_out)
        site = case.site()
        for target, batch in zip(site.targets, site.stream.batches, strict=True):
            if batch.valid is not None:
                target[~batch.valid] += noise
        found, report = tune_block(site, case.layers[0], replace(RATES, steps=6))
        assert report.held_out_after == pytest.approx(
            held_out_loss(case, site, found, held_out=held_out is not None), rel=1e-4
        )
        return found

    train, held_out = split_held_out(padded(), 0.4, 0)
    assert same(tuned(train, held_out, 0.0), tuned(train, held_out, 1e3))


def test_only_answers_are_matched_where_they_alone_count() -> None:
    def tuned(noise: float) -> dict[str, QuantizedWeight]:
        train, held_out = split_held_out(replace(windows(6), loss_mask=torch.arange(16).expand(6, 16) % 3 == 0), 0.4, 0)
        case = make_case(calibration=train, held_out=held_out)
        site = case.site()
        for target in site.targets:
            target[:, 1::3] += noise
        return tune_block(site, case.layers[0], replace(RATES, steps=6))[0]

    assert same(tuned(0.0), tuned(1e3))
    assert not same(tuned(0.0), starts(make_case(), 0))


def test_weights_that_are_kept_transposed() -> None:
    case = make_case(gpt2(), held_out=windows(2, seed=1))
    site = case.site()
    assert all(linear.transposed for linear, _, _ in case.layers[0].values())
    found, report = tune_block(site, case.layers[0], RATES)
    assert report.held_out_after == pytest.approx(held_out_loss(case, site, found), rel=1e-4)
    assert held_out_loss(case, site, found) < 0.9 * held_out_loss(case, site, starts(case, 0))


def test_linears_that_stay_dense_are_left_alone() -> None:
    case = make_case()
    dense, (linear, _, _) = next(iter(case.layers[0].items()))
    case.layers[0].pop(dense)
    kept = linear.weight.clone()
    found, _ = tune_block(case.site(), case.layers[0], replace(RATES, steps=3))
    assert dense not in found
    assert torch.equal(linear.weight, kept)


def test_an_interrupted_run_leaves_the_block_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(llama(attention_bias=True))
    site, calls = case.site(), []
    own = dict(site.block.named_modules())
    wanted = {name: p.requires_grad for name, p in site.block.named_parameters()}
    through = Stream.through

    def fail(stream: Stream, *arguments: object) -> Tensor:
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return through(stream, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Stream, "through", fail)
    with pytest.raises(KeyboardInterrupt):
        tune_block(site, case.layers[0], RATES)
    assert dict(site.block.named_modules()) == own
    assert {name: p.requires_grad for name, p in site.block.named_parameters()} == wanted
