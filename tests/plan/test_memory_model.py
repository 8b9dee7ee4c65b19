from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plan_cases import job_of
from tiny_models import make_llama, make_text, make_tokenizer

from llmq.budget import Budget
from llmq.calibration import load_calibration, random_windows, split_held_out
from llmq.errors import SpecError
from llmq.layers import solve_stage
from llmq.planning.counting import Held
from llmq.planning.memory import MemoryModel, fit, windows_of
from llmq.planning.miniature import _problem, held

BASE = 10**6
QUICK = {"shift": 0.0, "refine_rounds": 0, "scale_search": "none"}  # a solver that is quickly looked at


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


def test_depth_does_not_matter(folder: Path, tmp_path: Path) -> None:
    deeper = make_llama(tmp_path, num_hidden_layers=12)
    one, other = (MemoryModel(job_of(model, **QUICK), 16, 64, BASE) for model in (folder, deeper))
    assert one.estimate(Budget()).total == other.estimate(Budget()).total


def test_parts_grow_with_what_they_are_for(folder: Path) -> None:
    job = job_of(folder, **{**QUICK, "shift": 0.5})
    few, many = (MemoryModel(job, windows, 64, BASE).estimate(Budget()).host for windows in (16, 64))
    assert many["hidden states"] == 4 * few["hidden states"] == 2 * 64 * 64 * 64 * 4
    plain = job_of(folder, **QUICK)
    assert "a block" in MemoryModel(plain, 16, 64, BASE).estimate(Budget()).host
    half, whole = (MemoryModel(j, 16, 64, BASE).estimate(Budget()).host for j in (plain, job))
    assert 2 * half["a block"] == whole["a block and its original"]
    assert 2 * half["hidden states"] == whole["hidden states"]
    for parts in (half, whole):  # what attention returned, of each stream
        assert parts["parts of a block that are final"] == parts["hidden states"]
    assert "parts of a block that are final" not in MemoryModel(job, 16, 64, BASE).estimate(Budget(replays=False)).host


def test_hessians_are_held_twice_where_some_windows_judge_and_twice_where_inputs_are_paired(folder: Path) -> None:
    # so many tokens at once that measuring holds more than solving
    def hessians(**fields: object) -> int:
        model = MemoryModel(job_of(folder, **QUICK, **fields), 128, 64, BASE)  # type: ignore[arg-type]
        return model.estimate(Budget()).host["Hessians and solver of mlp.down_proj"]

    assert hessians() - hessians(held_out=0.0) == 4 * 128 * 128


def test_a_lane_is_held_besides_the_sums_that_it_is_added_to(folder: Path) -> None:
    job = job_of(folder, **QUICK)
    found = []
    for windows in (128, 256, 512):  # in batches of 128; with two lanes, one trains and one judges
        model = MemoryModel(job, windows, 64, BASE)
        model._solving = lambda *_: 0  # type: ignore[method-assign]
        found.append(model.estimate(Budget()).host["Hessians and solver of mlp.down_proj"])
    assert found[0] == found[1] == found[2] - 4 * 128 * 128


def test_each_budget_needs_no_more_than_the_one_before(folder: Path) -> None:
    model = MemoryModel(job_of(folder, **QUICK), 256, 64, BASE)
    totals = [model.estimate(budget).total for budget in model.budgets()]
    assert len(totals) >= 3
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


def test_the_first_budget_that_fits_is_taken(folder: Path) -> None:
    job = job_of(folder, **QUICK)
    model = MemoryModel(job, 256, 64, BASE)
    budgets = list(model.budgets())
    for budget in (budgets[0], budgets[2], budgets[-1]):
        limit = model.estimate(budget).total
        first = next(b for b in budgets if model.estimate(b).total <= limit)
        assert fit(job, 256, 64, limit, BASE) == first
    assert fit(job, 256, 64, None, BASE) == Budget()


def test_what_cannot_fit_is_refused_with_the_least_that_would_do(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"--max-memory 0.00 GiB: this run needs at least .* are for ") as error:
        fit(job_of(folder, **QUICK), 64, 64, BASE, BASE)
    assert "allow more" in str(error.value)


@pytest.mark.parametrize(
    ("samples", "fields"), [(9, {}), (1, {}), (40, {"held_out": 0.3}), (8, {"random_windows": 0.0})]
)
def test_windows_are_those_of_a_run(samples: int, fields: dict[str, float], folder: Path, tmp_path: Path) -> None:
    job = job_of(folder, **fields)
    text = make_text(tmp_path / "text.txt", 10_000)
    whole = load_calibration(str(text), make_tokenizer(), num_samples=samples, seq_len=16, seed=0)
    train, judges = split_held_out(whole, job.recipe.held_out if samples > 1 else 0.0, 0)
    random = random_windows(train, job.recipe.random_windows, 128, 0)
    parts = [part.input_ids.shape[0] for part in (train, judges, random) if part is not None]
    assert windows_of(job, samples) == sum(parts)


@pytest.mark.parametrize("fields", [{}, {"shift": 0.0}, {"method": "weighted_rtn", "refine_rounds": 0}, {"sym": False}])
def test_a_miniature_holds_what_the_large_problem_holds(fields: dict[str, object], folder: Path) -> None:
    # not a number of the same kind twice: the large one is solved
    job = job_of(folder, **fields)
    job = replace(job, spec=replace(job.spec, group_size=32))
    shapes, tokens = [(128, 256), (256, 256)], 64.0 * 256
    with Held() as live:
        problem = _problem(job, shapes, tokens)
        live.peak = live.now
        solve_stage(job, 0, [problem])
    assert held(job, shapes, tokens, judged=True) == pytest.approx(live.peak, rel=0.05)
    assert torch.is_grad_enabled()
