"""Activations on their way through the blocks: masks, stages, repeated calls, early ends."""

from pathlib import Path

import pytest
import torch
from tiny_models import make_llama
from torch import Tensor, nn

from llmq import driver, preflight
from llmq.calibration import Calibration, from_token_lists
from llmq.errors import SpecError
from llmq.families import Linear, Structure
from llmq.recipe import Recipe
from llmq.stream import Stream

CPU = torch.device("cpu")


def started(folder: Path, calibration: Calibration) -> tuple[Stream, driver._Run]:
    run = driver._Run(preflight.prepare(folder, Recipe(group_size=32)), CPU, lambda _: None)
    run.calibration = calibration
    stream = run.start_stream()
    assert stream is not None
    return stream, run


def hessians(folder: Path, calibration: Calibration) -> dict[str, tuple[Tensor, int]]:
    """Return H and tokens of every stage of the unquantized model, by the name of its first linear."""
    stream, run = started(folder, calibration)
    found = {}
    for index in range(2):
        block = run.load_block(index)
        for stage in stream.stages(block, index, run.job.structure.linears[index]):
            total = stream.hessian(block, index, stage)
            found[stage.linears[0].name] = (total.mean("x"), total.tokens)
        stream.advance(block, index)
    return found


def test_padded_batch_gives_the_hessians_of_its_samples(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m")
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(1, 128, (n,), generator=generator).tolist() for n in (32, 5, 17, 1)]
    together = hessians(folder, from_token_lists(samples, pad_token_id=0, source="x"))
    singles = [hessians(folder, from_token_lists([s], pad_token_id=0, source="x")) for s in samples]
    for name, (h, tokens) in together.items():
        assert tokens == 55
        expected = sum(one[name][0] * one[name][1] for one in singles) / 55
        # float32 sums in another order over two blocks; a padding token would move H by 1/55
        assert torch.linalg.norm(h - expected) <= 1e-4 * torch.linalg.norm(expected)


def test_a_short_last_batch_weighs_its_tokens_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_llama(tmp_path / "m")
    ids = torch.randint(1, 128, (5, 16), generator=torch.Generator().manual_seed(0))
    whole = hessians(folder, Calibration(ids, None, "x", "y"))
    monkeypatch.setattr("llmq.stream.TOKENS_PER_BATCH", 32)  # batches of 2, 2 and 1 windows
    split = hessians(folder, Calibration(ids, None, "x", "y"))
    for name, (h, tokens) in whole.items():
        assert split[name][1] == tokens == 80
        assert torch.linalg.norm(h - split[name][0]) <= 1e-4 * torch.linalg.norm(h)


def test_hessians_are_of_the_inputs_that_the_layers_see(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_llama(tmp_path / "m")
    ids = torch.randint(1, 128, (3, 16), generator=torch.Generator().manual_seed(0))
    found = hessians(folder, Calibration(ids, None, "x", "y"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name in found:
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    model(ids)
    assert len(found) == 8
    for name, (h, _) in found.items():
        x = seen[name].reshape(48, -1).double()
        expected = 2 * x.T @ x / 48
        assert torch.linalg.norm(h - expected) <= 1e-4 * torch.linalg.norm(expected)


class Looped(nn.Module):
    """A block that calls one linear twice and never another."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.twice(torch.tanh(self.twice(hidden)))
        return output


class Wrapped(nn.Module):
    """As much of a model as the stream needs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(16, 8), nn.ModuleList([Looped()])

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_a_linear_called_twice_accumulates_both_calls() -> None:
    torch.manual_seed(0)
    model = Wrapped()
    block = model.layers[0]
    assert isinstance(block, Looped)
    structure = Structure("layers", [block], [[]], [])
    ids = torch.randint(16, (2, 5))
    stream = Stream.start(model, structure, Calibration(ids, None, "x", "y"), CPU)
    (stage,) = stream.stages(block, 0, [Linear("twice", block.twice, transposed=False)])
    assert stage.calls == 2
    total = stream.hessian(block, 0, stage)
    x = model.embed(ids).reshape(10, 8)
    both = torch.cat([x, torch.tanh(block.twice(x))])
    assert total.tokens == 20
    torch.testing.assert_close(total.mean("x"), 2 * both.T @ both / 20)


def test_a_linear_that_never_runs_is_named() -> None:
    model = Wrapped()
    block = model.layers[0]
    assert isinstance(block, Looped)
    structure = Structure("layers", [block], [[]], [])
    stream = Stream.start(model, structure, Calibration(torch.zeros(1, 4).long(), None, "x", "y"), CPU)
    with pytest.raises(SpecError, match=r"layers\.0\.never: never used .* --ignore"):
        stream.stages(block, 0, [Linear("layers.0.never", block.never, transposed=False)])


def test_equal_arguments_are_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.stream.TOKENS_PER_BATCH", 16)
    ids = torch.randint(1, 128, (3, 16), generator=torch.Generator().manual_seed(0))
    stream, _ = started(make_llama(tmp_path / "m"), Calibration(ids, None, "x", "y"))
    tables = [call.kwargs["position_embeddings"] for calls in stream._calls for call in calls]
    assert len(tables) == 6
    assert len({cos.data_ptr() for cos, _ in tables}) == 1
