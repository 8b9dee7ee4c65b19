"""What a stage is measured with: which tokens each Hessian sums, and which ones judge."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from layer_cases import K, linear, tokens
from torch import Tensor

from llmq.problems import Twin, measure
from llmq.stream import Batch, Stage


@dataclass
class Seen:
    """As much of `Observed` as `measure` reads: inputs and references per batch and call."""

    inputs: list[list[Tensor]]
    references: list[list[Tensor | None]]
    held_out: list[bool]
    stream: Any = field(init=False)

    def __post_init__(self) -> None:
        hidden = type("Hidden", (), {"device": torch.device("cpu")})()
        self.stream, first = type("Stream", (), {"batches": [], "hidden": hidden})(), 0
        for calls, judges in zip(self.inputs, self.held_out, strict=True):
            b, length, _ = calls[0].shape
            ids = torch.zeros(b, length, dtype=torch.int64)
            self.stream.batches.append(
                Batch(ids, None, slice(first, first + b), held_out=judges, text=True, counted=None, calls=[])
            )
            first += b

    def batches(self, stage: Stage, twin: Twin | None) -> Any:
        for number, (inputs, references) in enumerate(zip(self.inputs, self.references, strict=True)):
            yield number, inputs, references if twin else [None] * len(inputs)


def seen(held_out: list[bool], *, calls: int = 1) -> Seen:
    inputs = [[tokens(10, 10 * n + c).view(2, 5, K) for c in range(calls)] for n in range(len(held_out))]
    references: list[list[Tensor | None]] = [[x + 0.1 * x.roll(1, dims=-1) for x in batch] for batch in inputs]
    return Seen(inputs, references, held_out)


def test_a_stage_is_one_problem_whose_tokens_are_either_summed_or_judges() -> None:
    a, b = linear("a", 4), linear("b", 6)
    here = seen([False, False, True], calls=2)
    (found,) = measure(here, Stage([a, b], 2), None, {})  # type: ignore[arg-type]
    assert [(one.name, rows) for one, rows in found.rows] == [("a", slice(0, 4)), ("b", slice(0, 6))]
    assert torch.equal(found.weight(), torch.cat([a.weight, b.weight]))
    assert not found.paired
    assert found.train is not None
    assert found.held_out is not None
    x = torch.cat([t.reshape(-1, K) for batch in here.inputs[:2] for t in batch]).double()
    assert (found.train.tokens, found.held_out.tokens) == (40, 20)
    torch.testing.assert_close(found.train.mean("a").double(), 2 * x.T @ x / 40, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("poisoned", ["held out", "train"])
def test_held_out_tokens_enter_no_hessian_and_no_others_judge(poisoned: str) -> None:
    a, weights = linear("a", 4), {"a": torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0))}
    stage, twin = Stage([a], 1), Twin(Stage([a], 1), last=False)
    for kind, expected in (("plain", 1), ("guided", 2)):
        parts = []
        for factor in (1.0, 1e6):
            here = seen([False, False, True])
            for batch in (2,) if poisoned == "held out" else (0, 1):
                here.inputs[batch][0].mul_(factor)
            parts.append(measure(here, stage, twin, weights if kind == "guided" else {}))  # type: ignore[arg-type]
        assert len(parts[0]) == len(parts[1]) == expected
        for clean, bad in zip(*parts, strict=True):
            sums = [(p.train, p.held_out) if poisoned == "held out" else (p.held_out, p.train) for p in (clean, bad)]
            (kept, moved), (kept_too, moved_too) = sums
            assert kept is not None
            assert kept_too is not None
            assert moved is not None
            assert moved_too is not None
            assert torch.equal(kept.mean("a"), kept_too.mean("a"))
            assert torch.equal(kept.cross("a"), kept_too.cross("a"))
            assert not torch.allclose(moved.mean("a"), moved_too.mean("a"))


def test_without_held_out_windows_there_is_no_judge() -> None:
    (found,) = measure(seen([False, False]), Stage([linear("a", 4)], 1), None, {})  # type: ignore[arg-type]
    assert found.held_out is None


def test_pairs_are_inputs_of_the_same_tokens() -> None:
    a = linear("a", 4)
    here, stage = seen([False, True], calls=2), Stage([a], 2)
    (found,) = measure(here, stage, Twin(stage, last=False), {})  # type: ignore[arg-type]
    assert found.paired
    for total, batch in ((found.train, 0), (found.held_out, 1)):
        assert total is not None
        x = torch.cat([t.reshape(-1, K) for t in here.inputs[batch]]).double()
        y = torch.cat([t.reshape(-1, K) for t in here.references[batch] if t is not None]).double()
        torch.testing.assert_close(total.cross("a").double(), 2 * (y - x).T @ x / 20, rtol=1e-4, atol=1e-4)


def test_groups_of_outputs_have_hessians_of_their_own_tokens() -> None:
    a, b = linear("a", 5), linear("b", 4)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.rand(2, 6, 5, generator=generator) for name in "ab"}
    here = seen([False, True, False])  # the second batch judges: windows 2 and 3
    found = measure(here, Stage([a, b], 1), None, weights)  # type: ignore[arg-type]
    assert [(p.rows[0][0].name, p.rows[0][1]) for p in found] == [
        ("a", slice(0, 3)), ("a", slice(3, 5)), ("b", slice(0, 2)), ("b", slice(2, 4))
    ]  # fmt: skip
    for number, part in enumerate(found):
        g = weights["ab"[number // 2]][number % 2].double()
        for total, batches in ((part.train, (0, 2)), (part.held_out, (1,))):
            assert total is not None
            x = torch.cat([here.inputs[n][0].reshape(-1, K) for n in batches]).double()
            each = torch.cat([g[2 * n : 2 * n + 2].reshape(-1) for n in batches])
            expected = 2 * (x * each[:, None]).T @ x / each.sum()
            torch.testing.assert_close(total.mean("a").double(), expected, rtol=1e-4, atol=1e-4)


def test_weights_that_all_linears_share_make_one_problem() -> None:
    a, b = linear("a", 4), linear("b", 6)
    here, stage = seen([False, False]), Stage([a, b], 1)
    own = torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(0))
    (shared,) = measure(here, stage, None, {"a": own, "b": own})  # type: ignore[arg-type]
    apart = measure(here, stage, None, {"a": own, "b": own.clone()})  # type: ignore[arg-type]
    assert [one.name for one, _ in shared.rows] == ["a", "b"]
    assert [[one.name for one, _ in part.rows] for part in apart] == [["a"], ["b"]]
    assert shared.train is not None
    for part in apart:
        assert part.train is not None
        assert torch.equal(shared.train.mean("a"), part.train.mean("a"))
