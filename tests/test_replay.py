"""Parts of a block that are final are run once for each batch, and what they returned stands in for them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import FAMILIES
from torch import Tensor, nn
from transformers import PretrainedConfig

from llmq import preflight
from llmq.calibration import Calibration
from llmq.driver import quantize
from llmq.families import Linear, Structure
from llmq.loading import Loader
from llmq.problems import Observed, Twin, measure
from llmq.recipe import Recipe
from llmq.stream import Stage, Stream

CPU = torch.device("cpu")
IDS = torch.randint(1, 100, (9, 32), generator=torch.Generator().manual_seed(0))
RECIPE = Recipe(group_size=32, refine_rounds=0, scale_search="none")
WINDOWS = Calibration(IDS, None, "random tokens", "none")


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Return what switches replays in all streams."""
    start = Stream.start.__func__  # type: ignore[attr-defined]

    def to(replays: bool) -> None:
        def started(cls: type[Stream], *args: Any, **options: Any) -> Stream:
            assert options["replays"], "on by default"
            stream: Stream = start(cls, *args, **options | {"replays": replays, "batch_tokens": 96})
            return stream

        monkeypatch.setattr(Stream, "start", classmethod(started))

    return to


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "t5", "jamba"])
def test_bytes_do_not_depend_on_it(name: str, switch: Callable[[bool], None], tmp_path: Path) -> None:
    source = FAMILIES[name].make(tmp_path / "dense")
    found = []
    for replays in (True, False):
        switch(replays)
        quantize(source, tmp_path / str(replays), RECIPE, calibration=WINDOWS)
        found.append((tmp_path / str(replays) / "model.safetensors").read_bytes())
    assert found[0] == found[1]


# --- one block


def started(folder: Path, *, replays: bool = True) -> tuple[Stream, Loader]:
    loader = Loader(preflight.prepare(folder, Recipe(group_size=32)), CPU)
    loader.outer()
    structure = loader.job.structure
    return Stream.start(loader.job.model, structure, WINDOWS, CPU, batch_tokens=96, replays=replays), loader


class Counter:
    """Counts the calls of modules that do their work, by name, from outside of `forward`."""

    def __init__(self, block: nn.Module, names: list[str]) -> None:
        self.calls = dict.fromkeys(names, 0)
        for name in names:
            # a submodule that a replayed module does not run
            inner = next(m for m in block.get_submodule(name).modules() if not list(m.children()))
            inner.register_forward_pre_hook(lambda *_, name=name: self.count(name))

    def count(self, name: str) -> None:
        self.calls[name] += 1


def worked_on(stream: Stream, block: nn.Module, linears: list[Linear], original: nn.Module | None) -> list[Tensor]:
    """Walk through a block as the driver does, its linears changing stage by stage; return all Hessians."""
    stages = stream.stages(block, 0, linears)
    reference = None if original is None else stream.fork()
    seen = Observed(stream, block, 0, reference, original)
    local = {module: name for name, module in block.named_modules()}
    found = []
    for number, stage in enumerate(stages):
        twin = None
        if original is not None:
            first = stage.linears[0]
            module = original.get_submodule(local[first.module])
            last = number == len(stages) - 1
            twin = Twin(Stage([Linear(first.name, module, first.transposed)], stage.calls), last)
        (problem,) = measure(seen, stage, twin, {})
        assert problem.train is not None
        found.append(problem.train.mean("x"))
        if twin is not None:
            found.append(problem.train.cross("x"))
        for linear in stage.linears:
            linear.weight.mul_(1.01)
    stream.advance(block, 0)
    states = [*stream.hidden, *([] if reference is None else reference.hidden)]
    return [*found, *states]


@pytest.mark.parametrize("paired", [False, True])
def test_attention_of_llama_runs_three_times_instead_of_seven(paired: bool, tmp_path: Path) -> None:
    folder = FAMILIES["llama"].make(tmp_path / "m")
    found, calls = [], []
    for replays in (True, False):
        stream, loader = started(folder, replays=replays)
        block, linears = loader.block(0), loader.job.structure.linears[0]
        original = copy.deepcopy(block) if paired else None
        counters = [Counter(part, ["self_attn", "mlp"]) for part in (block, original) if part is not None]
        found.append(worked_on(stream, block, linears, original))
        calls.append([counter.calls["self_attn"] for counter in counters])
        if paired:  # a pass that goes on to the end of attention goes no further; one more for a comparison
            assert counters[1].calls["mlp"] == 6 + replays
        assert stream._replay is None
        assert stream.replays == replays
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    # three batches; their first linear runs in all passes but the one for its own inputs; once more to observe stages,
    # and once more where the first replay, or the first pass that goes on to the end of a part, is compared
    once = 3
    assert calls[1] == [4 * once + 1 + once, *([4 * once] if paired else [])]
    assert calls[0] == [2 * once + 1 + once + 1, *([1 * once + once + 2] if paired else [])]


class Tangled(nn.Module):
    """A block of which every part is a trap.

    `twice` runs twice, and `mixed` in between: its linear is of the first stage, what it adds changes with `twice`.
    `pair` returns two tensors. What `spoiled` returns is written to. `wide` returns more than enters the block.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in ("late", "early", "mixed", "twice", "pair", "spoiled", "plain", "wide", "end"):
            part = Part(pair=name == "pair", wide=name == "wide")
            self.add_module(name, part if name != "end" else nn.Linear(8, 8, bias=False))

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.plain(hidden)
        x = x + self.late(torch.tanh(x))
        y = self.twice(x)
        x = x + self.mixed(hidden, y) + self.twice(torch.tanh(y))
        x = x + sum(self.pair(x))
        spoiled = self.spoiled(x)
        spoiled += x
        x = spoiled + self.early(torch.sin(x)) + self.wide(x)[..., :8]
        out: Tensor = self.end(x)
        return out


class Part(nn.Module):
    """A linear in a module."""

    def __init__(self, *, pair: bool, wide: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16 if wide else 8, bias=False)
        self.pair = pair

    def forward(self, x: Tensor, more: Tensor | float = 0.0) -> Any:
        y = torch.tanh(self.linear(x)) + more
        return (y, 2 * y) if self.pair else y


class Wrapped(nn.Module):
    """As much of a model as the stream needs."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(100, 8), nn.ModuleList([block])
        self.config = PretrainedConfig()

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def tangled(block: nn.Module, *, replays: bool) -> tuple[Stream, list[Linear]]:
    torch.manual_seed(0)
    model = Wrapped(block)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    linears = [Linear(n, m, transposed=False) for n, m in block.named_modules() if isinstance(m, nn.Linear)]
    structure = Structure(["layers.0"], [block], [linears], {})
    return Stream.start(model, structure, WINDOWS, CPU, batch_tokens=96, replays=replays), linears


@pytest.mark.parametrize("paired", [False, True])
def test_what_cannot_be_replayed_is_not(paired: bool) -> None:
    found, counters = [], []
    for replays in (True, False):
        block = Tangled()
        stream, linears = tangled(block, replays=replays)
        original = copy.deepcopy(block) if paired else None
        counters.append(Counter(block, ["plain", "late", "mixed", "twice", "pair", "spoiled", "wide"]).calls)
        found.append(worked_on(stream, block, linears, original))
        assert stream.replays == replays, "no comparison has failed"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    fewer = {name for name, count in counters[0].items() if count < counters[1][name]}
    assert fewer == {"plain", "late", "mixed"}


def test_weights_that_are_written_to_again_end_a_replay(tmp_path: Path) -> None:
    stream, loader = started(FAMILIES["llama"].make(tmp_path / "m"))
    block, linears = loader.block(0), loader.job.structure.linears[0]
    stages = stream.stages(block, 0, linears)
    for stage in stages:
        for number in range(len(stream.batches)):
            stream.inputs(block, 0, stage, number)
    assert stream.kept_bytes == sum(state.nbytes for state in stream.hidden)
    linears[0].weight.mul_(1.5)  # as tuning does
    expected = [stream.through(block, 0, number, stream.hidden[number]) for number in range(len(stream.batches))]
    stream.advance(block, 0)
    assert all(torch.equal(a, b) for a, b in zip(expected, stream.hidden, strict=True))
    assert stream.kept_bytes == 0


def test_inputs_within_a_part_can_be_asked_for_again(tmp_path: Path) -> None:
    stream, loader = started(FAMILIES["llama"].make(tmp_path / "m"))
    block = loader.block(0)
    stage = stream.stages(block, 0, loader.job.structure.linears[0])[1]
    fork = stream.fork()
    fork.follow(stream, block)
    found = [fork.inputs(block, 0, stage, 0) for _ in range(2)]
    assert fork.kept_bytes == stream.hidden[0].nbytes
    assert torch.equal(found[0][0], found[1][0])
    fork.inputs(block, 0, stage, 1)
    fork.inputs(block, 0, stage, 0, passing=True)
    assert fork.kept_bytes == stream.hidden[1].nbytes, "of a batch that has passed nothing is kept"


class Moody(nn.Module):
    """A block with a part that returns something else each time: what replays are compared for."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.end, self.calls = Part(pair=False, wide=False), nn.Linear(8, 8, bias=False), 0
        self.part.register_forward_hook(self.change)

    def change(self, _: nn.Module, __: Any, out: Tensor) -> Tensor:
        self.calls += 1
        return out + self.calls

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.end(self.part(hidden)))
        return out


def test_a_replay_that_shows_other_numbers_is_the_last_one() -> None:
    block = Moody()
    stream, linears = tangled(block, replays=True)
    stages = stream.stages(block, 0, linears)
    assert stream._replay is not None
    for number in range(len(stream.batches)):
        stream.inputs(block, 0, stages[1], number)
    stream.advance(block, 0)
    assert not stream.replays
