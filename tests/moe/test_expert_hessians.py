"""Hessians of experts are those of the tokens that the router sends to them."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experts_reference import expert_hessian, shrunk
from moe_cases import CONFIGS, EXPERTS, bank_stages, make_moe, routed, started, windows
from torch import Tensor, nn

from llmq import experts as experts_module
from llmq.calibration import from_token_lists
from llmq.errors import SpecError
from llmq.experts import ENOUGH, LEAST, PRIOR, expert_problems
from llmq.hessian import HessianSum
from llmq.problems import Problem, Twin
from llmq.report import SHRUNK, STARVED


def close(found: Tensor, expected: Tensor) -> bool:
    """Return whether a float32 sum of float32 activations, behind an attention layer, is the float64 one."""
    # both forward passes are float32: some 1e-6 each, and squares double it; one token more or less moves it by 1/200
    return float(torch.linalg.norm(found - expected)) <= 1e-4 * float(torch.linalg.norm(expected))


def by_expert(problems: Iterable[Problem]) -> dict[int, Problem]:
    return {int(problem.name.split(".experts.")[1].split(".")[0]): problem for problem in problems}


def inner(fused: nn.Module, expert: int, x: Tensor) -> Tensor:
    """Return what the last projection of an expert of transformers' own module reads."""
    weight = fused.gate_up_proj[expert]
    y = x @ (weight if fused.is_transposed else weight.T)
    if fused.has_bias:
        y = y + fused.gate_up_proj_bias[expert]
    return fused._apply_gate(y).detach()


@pytest.mark.parametrize("name", CONFIGS)
def test_hessians_of_both_stages(name: str, tmp_path: Path) -> None:
    folder, calibration, index = make_moe(tmp_path / "m", name), windows(), 1
    stream, loader = started(folder, calibration, batch_tokens=96)
    stream.advance(loader.block(0), 0)
    seen, (up, down) = bank_stages(stream, loader, index)
    assert len(up.linears) == 2 * EXPERTS
    assert len(down.linears) == EXPERTS
    fused, hidden, picked = routed(folder, calibration.input_ids, index)
    for stage, inputs in ((up, lambda _: hidden), (down, lambda expert: inner(fused, expert, hidden))):
        problems = by_expert(expert_problems(seen, stage, None, {}))
        assert list(problems) == list(range(EXPERTS))
        for expert, problem in problems.items():
            x = inputs(expert)
            own, tokens = expert_hessian(x, picked, expert)
            thin = tokens < ENOUGH * x.shape[1]
            # all 256 tokens: fewer than four per input even for the last projection of these experts
            every = 2 * x.double().T @ x.double()
            expected = shrunk(own, tokens, every, len(x), PRIOR * x.shape[1] if thin else 0.0)
            assert problem.train is not None
            assert problem.routed == problem.train.tokens == tokens
            assert problem.remedies == ((SHRUNK,) if thin else ())
            if stage is up or thin is False or len(x) <= ENOUGH * x.shape[1]:
                assert close(problem.train.mean("x"), expected), (stage is up, expert)


def test_the_last_projection_borrows_from_a_sample_of_all_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_module, "ENOUGH", 3.0)  # 96 of the 256 tokens, every second one is taken
    folder, calibration = make_moe(tmp_path / "m", "qwen3_moe"), windows()
    stream, loader = started(folder, calibration)
    seen, (_, down) = bank_stages(stream, loader, 0)
    fused, hidden, picked = routed(folder, calibration.input_ids, 0)
    shares = by_expert(expert_problems(seen, replace(down), None, {}))
    checked = 0
    for expert, problem in shares.items():
        x = inner(fused, expert, hidden)
        own, tokens = expert_hessian(x, picked, expert)
        if tokens < 96:
            sample = x[::2].double()
            expected = shrunk(own, tokens, 2 * sample.T @ sample, len(sample), PRIOR * 32)
            assert problem.train is not None
            assert close(problem.train.mean("x"), expected)
            checked += 1
    assert checked or all(problem.remedies == () for problem in shares.values())


def test_padding_and_held_out_tokens_teach_no_expert(tmp_path: Path) -> None:
    folder = make_moe(tmp_path / "m", "mixtral")
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(1, 128, (n,), generator=generator).tolist() for n in (32, 5, 17, 1)]
    train = from_token_lists(samples, pad_token_id=0, source="x")
    stream, loader = started(folder, train, held_out=windows(2, 32, seed=5))
    seen, (up, _) = bank_stages(stream, loader, 0)
    _, hidden, picked = routed(folder, train.input_ids, 0, train.attention_mask.long())
    valid = train.attention_mask.reshape(-1)
    _, hidden_out, picked_out = routed(folder, windows(2, 32, seed=5).input_ids, 0)
    for expert, problem in by_expert(expert_problems(seen, up, None, {})).items():
        parts = ((problem.train, hidden[valid], picked[valid]), (problem.held_out, hidden_out, picked_out))
        for total, x, picks in parts:
            own, tokens = expert_hessian(x, picks, expert)
            every = 2 * x.double().T @ x.double()
            assert total is not None
            assert total.tokens == tokens
            assert close(total.mean("x"), shrunk(own, tokens, every, len(x), PRIOR * 64))
        assert problem.routed == problem.train.tokens


def test_an_expert_without_tokens_is_solved_on_those_of_others(tmp_path: Path) -> None:
    folder, calibration = make_moe(tmp_path / "m", "gpt_oss", never=2), windows()
    stream, loader = started(folder, calibration)
    seen, (up, down) = bank_stages(stream, loader, 0)
    seen = replace(seen, reference=stream.fork(), original=copy.deepcopy(seen.block))
    fused, hidden, _ = routed(folder, calibration.input_ids, 0)
    for stage, x, remedy in ((up, hidden, SHRUNK), (down, inner(fused, 2, hidden), STARVED)):
        problem = by_expert(expert_problems(seen, stage, Twin(stage, last=False), {}))[2]
        assert problem.paired is (remedy is SHRUNK), "what is rounded is not shifted"
        assert problem.train is not None
        assert problem.routed == problem.train.tokens == 0
        assert problem.remedies == (remedy,)
        assert close(problem.train.mean("x"), 2 * x.double().T @ x.double() / len(x))


@pytest.mark.parametrize(("count", "starved"), [(1, True), (2, False)])
def test_the_threshold_of_rounding(count: int, starved: bool, tmp_path: Path) -> None:
    """96 inputs: from 1.5 tokens on the last projection is solved."""
    assert LEAST * 96 == 1.5
    folder, calibration = make_moe(tmp_path / "m", "gpt_oss"), windows()
    stream, loader = started(folder, calibration)
    seen, (up, down) = bank_stages(stream, loader, 0)
    list(expert_problems(seen, up, None, {}))
    assert down.experts is not None
    for number, entry in enumerate(down.experts.entries):  # as if the router sent `count` tokens to expert 1
        picked = torch.where(entry.picked == 1, 0, entry.picked)
        picked[:count] = torch.tensor([1, 0]) if number == 0 else picked[:count]
        down.experts.entries[number] = entry._replace(picked=picked)
    problem = by_expert(expert_problems(seen, down, None, {}))[1]
    assert problem.routed == count
    assert problem.remedies == (STARVED if starved else SHRUNK,)


def test_all_experts_learn_from_all_tokens(tmp_path: Path) -> None:
    folder, calibration = make_moe(tmp_path / "m", "deepseek_v3"), windows()
    stream, loader = started(folder, calibration)
    stream.advance(loader.block(0), 0)
    seen, (up, down) = bank_stages(stream, loader, 1)
    fused, hidden, picked = routed(folder, calibration.input_ids, 1)
    for stage, inputs in ((up, lambda _: hidden), (down, lambda expert: inner(fused, expert, hidden))):
        problems = by_expert(expert_problems(seen, stage, None, {}, all_experts=True))
        assert list(problems) == list(range(EXPERTS))
        for expert, problem in problems.items():
            x = inputs(expert).double()
            assert problem.train is not None
            assert problem.train.tokens == len(x)
            assert problem.routed == expert_hessian(hidden, picked, expert)[1]
            assert problem.remedies == ()
            assert close(problem.train.mean("x"), 2 * x.T @ x / len(x))
            assert [linear.name.split(".experts.")[1].split(".")[0] for linear, _ in problem.rows] == [
                str(expert)
            ] * len(problem.rows)


@pytest.mark.parametrize("last", [False, True])
def test_paired_inputs_are_those_of_the_same_tokens(last: bool, tmp_path: Path) -> None:
    """The original model may send a token elsewhere: what counts is what the expert would have seen of it there."""
    folder, calibration = make_moe(tmp_path / "m", "qwen3_moe"), windows()
    stream, loader = started(folder, calibration)
    seen, stages = bank_stages(stream, loader, 0)
    stage, reference = stages[last], stream.fork()

    original = copy.deepcopy(seen.block)
    with torch.no_grad():  # errors of the layers in front: other inputs, other routes
        seen.block.self_attn.o_proj.weight.mul_(0.8)
        seen.block.mlp.experts.get_submodule("0.up_proj").weight.mul_(1.1)
    seen = replace(seen, reference=reference, original=original)
    start = [t.clone() for t in reference.hidden]
    problems = by_expert(expert_problems(seen, stage, Twin(stage, last=last), {}))
    fused, x_ref, _ = routed(folder, calibration.input_ids, 0)
    taken = stream.arguments(seen.block, 0, 0, seen.block.mlp.experts, 1)[0]
    x, picked = taken[0], taken[1]
    for expert, problem in problems.items():
        rows = (picked == expert).any(dim=1)
        here = seen.block.mlp.experts.inner(expert, x).detach() if last else x
        there = inner(fused, expert, x_ref) if last else x_ref
        gap, mine = (there - here)[rows].double(), here[rows].double()
        k, tokens = here.shape[1], int(rows.sum())
        expected = 2 * gap.T @ mine
        if problem.remedies:
            step = max(1, int(len(x) / (ENOUGH * k))) if last else 1
            others = 2 * ((there - here)[::step].double().T @ here[::step].double()) / len(here[::step])
            expected = (expected + PRIOR * k * others) / (tokens + PRIOR * k)
        else:
            expected = expected / tokens
        assert problem.paired
        assert problem.train is not None
        assert close(problem.train.cross("x"), expected)
    moved = [not torch.equal(a, b) for a, b in zip(start, reference.hidden, strict=True)]
    assert all(moved) if last else not any(moved), "the last stage of a block lets the reference pass it"


def test_weights_of_tokens_follow_them_to_the_experts(tmp_path: Path) -> None:
    folder, calibration = make_moe(tmp_path / "m", "mixtral"), windows()
    stream, loader = started(folder, calibration, batch_tokens=96)
    seen, (up, _) = bank_stages(stream, loader, 0)
    weights = torch.rand(1, 8, 32, generator=torch.Generator().manual_seed(3))
    _, hidden, picked = routed(folder, calibration.input_ids, 0)
    g = weights.reshape(-1).double()
    for expert, problem in by_expert(
        expert_problems(seen, up, None, {linear.name: weights for linear in up.linears})
    ).items():
        rows = (picked == expert).any(dim=1)
        x, mine = hidden[rows].double(), g[rows]
        own = 2 * (x * mine[:, None]).T @ x
        every = 2 * hidden.double().T @ hidden.double() / len(hidden)
        prior = PRIOR * 64 * float(mine.mean())  # in units of the expert's mean token
        assert problem.train is not None
        assert close(problem.train.mean("x"), (own + prior * every) / (float(mine.sum()) + prior))


def test_a_bank_that_sees_other_tokens_is_refused(tmp_path: Path) -> None:
    stream, loader = started(make_moe(tmp_path / "m", "qwen3_moe"), windows())
    seen, (up, _) = bank_stages(stream, loader, 0)
    bank = seen.block.mlp.experts
    forward = seen.block.mlp.forward
    seen.block.mlp.forward = lambda hidden: bank(hidden[0, :5], torch.zeros(5, 2).long(), torch.ones(5, 2))[None]
    with pytest.raises(SpecError, match=r"mlp\.experts: gets hidden states \[5, 64\] for 256 tokens"):
        list(expert_problems(seen, up, None, {}))
    seen.block.mlp.forward = forward


def test_inputs_are_recorded_once_and_let_go(tmp_path: Path) -> None:
    stream, loader = started(make_moe(tmp_path / "m", "qwen3_moe"), windows(), batch_tokens=96)
    seen, (up, down) = bank_stages(stream, loader, 0)
    passes = []
    seen.block.mlp.experts.register_forward_pre_hook(lambda *_: passes.append(1))
    for stage in (up, down):
        assert len(list(expert_problems(seen, stage, None, {}))) == EXPERTS
        assert len(passes) == len(stream.batches) == 3
        assert stage.experts is not None
        assert len(stage.experts.entries) == (0 if stage is down else 3)


def test_blending_is_a_weighted_mean() -> None:
    x, y = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (3, 40))
    own, other = HessianSum(5, x.device, paired=True), HessianSum(5, x.device, paired=True)
    own.add_(x, reference=x + 1)
    other.add_(y, reference=2 * y)
    own.blend_(other, 7.0)
    torch.testing.assert_close(own.mean("x"), (2 * x.T @ x + 7 * 2 * y.T @ y / 40) / 10)
    torch.testing.assert_close(own.cross("x"), (2 * torch.ones(5, 3) @ x + 7 * 2 * y.T @ y / 40) / 10)
    assert own.tokens == 3
    before = own.mean("x")
    own.blend_(HessianSum(5, x.device, paired=True), 7.0)
    assert torch.equal(own.mean("x"), before), "nothing to borrow"
