import math
from dataclasses import replace
from pathlib import Path

import pytest
from plan_cases import SLOW, job_of
from tiny_models import make_llama

from llmq.budget import Budget
from llmq.layers import solve_stage
from llmq.planning.counting import Counting, Work
from llmq.planning.miniature import _problem, adding, packing_growth, solver_growth
from llmq.planning.outline import Outline, outline
from llmq.planning.seconds import TimeModel
from llmq.preflight import Job

WINDOWS, LENGTH = 8, 64
QUICK = {"refine_rounds": 0, "scale_search": "none"}
# a machine that spends time on products only, a second on each flop
NEVER = {"float32": {4: math.inf}, "float64": {4: math.inf}}
BOTH = {"float32": {4: 1.0}, "float64": {4: 1.0}}
PRODUCTS = replace(
    SLOW, products=BOTH, factors=NEVER, solves=NEVER, near=math.inf, far=math.inf, call=0.0, write=math.inf, sync=0.0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


def flops(work: Work) -> float:
    return sum(work.products.values())


def modelled(job: Job) -> tuple[TimeModel, Outline]:
    planned = outline(job, WINDOWS, LENGTH)
    return TimeModel(job, planned, WINDOWS, LENGTH, PRODUCTS), planned


def upper(k: int) -> int:
    """Return how many entries of a symmetric sum are computed: eight strips of rows, each from its diagonal on."""
    width = -(-k // 8)
    return sum(min(width, k - start) * (k - start) for start in range(0, k, width))


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_each_stream_passes_up_to_each_stage_and_once_to_the_end(shift: float, folder: Path) -> None:
    job = replace(job_of(folder, shift=shift, **QUICK), budget=Budget(replays=False))
    model, planned = modelled(job)
    (kind,) = planned.blocks
    before = [flops(stage.before) for stage in kind.stages]
    hessians = sum(flops(adding(job, WINDOWS * LENGTH, stage.inputs)) for stage in kind.stages)
    crosses = [s.inputs**2 if shift else 0 for s in kind.stages]
    assert hessians == sum(
        2 * WINDOWS * LENGTH * (s.inputs**2 * upper(256) / 256**2 + cross)
        for s, cross in zip(kind.stages, crosses, strict=True)
    )
    expected = sum(before) + flops(kind.forward) + hessians
    if shift:  # the original's last stage goes on to the end
        expected += sum(before) - before[-1] + flops(kind.forward)
    assert model.phases()["forward"] == pytest.approx(2 * expected)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_attention_runs_three_times_instead_of_seven_where_it_is_replayed(shift: float, folder: Path) -> None:
    jobs = [replace(job_of(folder, shift=shift, **QUICK), budget=Budget(replays=replays)) for replays in (True, False)]
    models = [modelled(job) for job in jobs]
    (kind,) = models[0][1].blocks
    saved = [model.phases()["forward"] / 2 for model, _ in models]
    attention = flops(kind.stages[2].before) / 1  # up to the stage behind it
    less = 2 + (2 if shift else 0)  # here: below down and at the end; there: for both stages of the MLP
    # there, attention goes on to its end when the inputs of its last linear are wanted
    (o,) = kind.stages[1].shapes
    more = 2 * WINDOWS * LENGTH * o[0] * o[1] if shift else 0
    assert saved[1] - saved[0] == pytest.approx(less * attention - more)


def test_rows_solved_apart_take_as_many_products_as_together(folder: Path) -> None:
    job = job_of(folder, shift=0.0, **QUICK)
    whole, parts = (modelled(replace(job, budget=Budget(solver_rows=rows)))[0].phases()["solve"] for rows in (None, 48))
    assert parts == pytest.approx(whole)


@pytest.mark.parametrize("fields", [{}, {"method": "weighted_rtn"}, {"shift": 0.0, "sym": False}])
def test_counts_of_other_sizes_follow_from_those_of_three(fields: dict[str, object], folder: Path) -> None:
    job = job_of(folder, **fields)
    problem = _problem(job, [(96, 320)], 64 * 320)
    with Counting() as counting:
        for layer in solve_stage(job, 0, [problem]):
            layer.weight.dequantize()
    found, counted = solver_growth(job, few_tokens=False).at(96, 320), counting.work
    assert flops(found) == pytest.approx(flops(counted), rel=0.1)
    assert sum(found.factors.values()) == pytest.approx(sum(counted.factors.values()), rel=0.02)
    assert sum(found.solves.values()) == pytest.approx(sum(counted.solves.values()), rel=0.02)
    assert found.near + found.far == pytest.approx(counted.near + counted.far, rel=0.15)
    assert found.calls == pytest.approx(counted.calls, rel=0.1)


def test_packing_grows_with_the_weight(folder: Path) -> None:
    growth = packing_growth(job_of(folder))
    one, four = growth.at(1024, 1024), growth.at(4096, 1024)
    assert four.near + four.far == pytest.approx(4 * (one.near + one.far), rel=0.05)
    assert not one.products
