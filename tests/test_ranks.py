"""Processes that share a run make the bytes that one makes alone, and end together."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import rank_cases
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import K, linear
from rank_cases import content, ended, ending, start, start_ranks
from test_stage_problems import Seen, seen

from llmq import joining
from llmq.checkpoint import STAGING
from llmq.errors import RankError
from llmq.problems import Problem, Twin, measure
from llmq.ranks import ALONE, LANES, Ended, Ranks, lane_of
from llmq.run import Run
from llmq.stream import Stage

T = TypeVar("T")


class Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, world: int, meeting: threading.Barrier, table: list[Any]) -> None:
        super().__init__(rank, world)
        self._meeting = meeting
        self._table = table

    def broadcast(self, value: T, source: int = 0) -> T:
        if self.rank == source:
            self._table[0] = value
        self._meeting.wait(30)
        found: T = value if self.rank == source else copy.deepcopy(self._table[0])
        self._meeting.wait(30)
        return found


def together(world: int, work: Callable[[Ranks], T]) -> list[T]:
    """Return what each of so many ranks makes."""
    meeting, table = threading.Barrier(world), [None]
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: work(Threads(rank, world, meeting, table)), range(world)))


class MySeen:
    """What one rank sees."""

    def __init__(self, whole: Seen, ranks: Ranks) -> None:
        self.whole, self.stream, self.reference, self.ranks = whole, whole.stream, None, ranks

    def batches(self, stage: Stage, twin: Twin | None) -> Any:
        for number, inputs, references in self.whole.batches(stage, twin):
            if self.ranks.owns(number, len(self.stream.batches)):
                yield number, inputs, references


def measured(whole: Seen, ranks: Ranks, weights: dict[str, torch.Tensor]) -> list[Problem]:
    stage = Stage([linear("a", 4), linear("b", 6)], 1)
    return measure(MySeen(whole, ranks), stage, Twin(stage, last=True), weights, ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize("batches", [1, 3, 8, 13])
@pytest.mark.parametrize("guided", [False, True])
def test_sums_do_not_depend_on_how_many_share_them(batches: int, guided: bool) -> None:
    whole = seen([number % 3 == 1 for number in range(batches)])
    whole.inputs[0][0][0, 0] = torch.nan
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(2, 2 * batches, 5, generator=generator) for name in "ab"} if guided else {}
    alone = measured(whole, ALONE, weights)
    for world in (2, 3, 8):
        for found in together(world, lambda ranks: measured(whole, ranks, weights)):
            owners = [number % world for number in range(len(alone))] if len(alone) >= world else [None] * len(alone)
            assert [problem.owner for problem in found] == owners
            for mine, expected in zip(found, alone, strict=True):
                for a, b in ((mine.train, expected.train), (mine.held_out, expected.held_out)):
                    assert (a is None) == (b is None)
                    if a is None or b is None:
                        continue
                    assert torch.equal(a._sum, b._sum)
                    assert a._cross is not None
                    assert b._cross is not None
                    assert torch.equal(a._cross, b._cross)
                    assert (a._weight, a.tokens, a.dropped) == (b._weight, b.tokens, b.dropped)


def test_lanes_add_up_to_the_sum_over_all_tokens() -> None:
    whole = seen([number in (4, 11) for number in range(13)])
    (found,) = measured(whole, ALONE, {})
    for total, held_out in ((found.train, False), (found.held_out, True)):
        assert total is not None
        mine = [n for n in range(13) if (n in (4, 11)) == held_out]
        x = torch.cat([whole.inputs[n][0].reshape(-1, K) for n in mine]).double()
        y = torch.cat([t.reshape(-1, K) for n in mine for t in whole.references[n] if t is not None]).double()
        assert (total.tokens, total.dropped) == (len(x), 0)
        torch.testing.assert_close(total.mean("a").double(), 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(total.cross("a").double(), 2 * (y - x).T @ x / len(x), rtol=1e-4, atol=1e-4)


def test_tokens_that_are_lost_in_several_lanes_are_counted() -> None:
    whole = seen([False] * 13)
    for number in (0, 5, 12):
        whole.inputs[number][0][0, 0, 0] = torch.nan
    (found,) = measured(whole, ALONE, {})
    assert found.train is not None
    assert (found.train.tokens, found.train.dropped) == (127, 3)


@given(st.integers(1, 60), st.integers(1, 10))
def test_every_batch_is_in_one_lane_and_every_lane_is_summed_in_turn(batches: int, world: int) -> None:
    lanes = [lane_of(batch, batches) for batch in range(batches)]
    assert lanes == sorted(lanes)
    assert set(lanes) == set(range(min(LANES, batches)))
    sizes = [lanes.count(lane) for lane in set(lanes)]
    assert max(sizes) - min(sizes) <= 1
    ranks = [Ranks(rank, world) for rank in range(world)]
    order = [batch for one in ranks[0].rounds(batches) for lane in one for batch in lane]
    assert order == list(range(batches))
    for one in ranks[-1].rounds(batches):
        assert len(one) <= world
        for rank, lane in enumerate(one):
            assert all([r.owns(batch, batches) for r in ranks].index(True) == rank for batch in lane)
    assert all(sum(r.owns(batch, batches) for r in ranks) == 1 for batch in range(batches))


def test_ranks_that_would_make_other_bytes_are_refused() -> None:
    def check(ranks: Ranks) -> str:
        run = Run.__new__(Run)
        run.job = type("Job", (), {"ranks": ranks})()
        try:
            run.check_ranks({"recipe": 1, "machine": {"threads": 1 + (ranks.rank == 2)}})
        except RankError as error:
            return str(error)
        return ""

    found = together(3, check)
    assert found[0].startswith("rank 2 differs from rank 0 in machine.threads (1 there, 2 now)")
    assert all(found)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    rank_cases.make_sources(folder)
    return folder


@pytest.fixture(scope="module")
def outputs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the folders of runs by 1, 2 and 3 ranks, and how a run by two that torchrun starts ended.

    Of these two one is killed; the three go on where they were.
    """
    kinds, folder = list(rank_cases.RECIPES), tmp_path_factory.mktemp("out")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rank_cases")
    killed = start(*torchrun, "speak", "killed", source, folder / "3" / "default")
    two = start_ranks(2, "run_all", source, folder / "2", *kinds)
    with ending(killed, *two):
        for kind in kinds:
            rank_cases.run(source, folder / "1" / kind, kind)
        (found,) = ended([killed])
        partial = [path.name for path in (folder / "3" / "default").iterdir()]
        records = (folder / "3" / "default" / STAGING / "journal.jsonl").read_text().count('"kind":"stage"')
        three = start_ranks(3, "run_all", source, folder / "3", *kinds)
        with ending(*three):
            for code, _, err in ended([*two, *three]):
                assert code == 0, err
    return {"folder": folder, "killed": found, "partial": partial, "records": records}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", rank_cases.RECIPES)
def test_any_number_of_ranks_makes_the_same_bytes(kind: str, world: int, outputs: dict[str, Any]) -> None:
    folder = outputs["folder"]
    assert content(folder / str(world) / kind) == content(folder / "1" / kind)
    assert not (folder / str(world) / kind / STAGING).exists()


def test_a_killed_rank_is_named_and_ends_the_run_which_can_be_continued(outputs: dict[str, Any]) -> None:
    code, out, err = outputs["killed"]
    assert code == 1
    assert out == ""
    said = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(said) == 1, err
    assert said[0].startswith("error: rank 1 of 2 (process ")
    assert said[0].endswith("was lost; run the same command again: it goes on where it stopped")
    assert "/llmq/" not in err.replace(str(outputs["folder"]), "")  # of tracebacks only torchrun's own
    assert outputs["partial"] == [STAGING]
    assert outputs["records"] in (4, 5)  # the stage at which it was killed is on record or not


def test_an_error_ends_all_ranks_and_is_printed_once(source: Path, tmp_path: Path) -> None:
    taken, output = tmp_path / "taken", tmp_path / "out"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep")
    first, second = ended(start_ranks(2, "speak", "failing", source, taken, output))
    assert (first[0], second[0]) == (1, 1), (first, second)
    said = [line for line in first[2].splitlines() if line.startswith("error:")]
    assert len(said) == 2, first[2]
    assert "exists and is not empty" in said[0]  # which rank 0 alone finds out
    assert said[1] == "error: here and nowhere else"
    assert "Traceback" not in first[2]
    assert second[1:] == ("", "")
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]
    assert [path.name for path in output.iterdir()] == [STAGING]


def test_a_term_while_the_end_is_looked_into_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> RankError:
        os.kill(os.getpid(), signal.SIGTERM)  # by torchrun, which has seen the other rank end, too
        return RankError("rank 1 of 2 was lost")

    changes = {"world_here": lambda: (0, 2), "_open": lambda *_, **__: None, "_close": lambda: None}
    changes |= {"_leave": lambda *_: None, "failure": found}
    for name, change in changes.items():
        monkeypatch.setattr(joining, name, change)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RankError, match="rank 1 of 2 was lost"), joining.joined(torch.device("cpu")):
            raise Ended from RuntimeError("a connection broke")
    finally:
        signal.signal(signal.SIGTERM, before)
