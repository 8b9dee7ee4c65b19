"""Activations on their way through the blocks: masks, stages, repeated calls, early ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_llama, make_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, PretrainedConfig, PreTrainedModel

from llmq import preflight
from llmq.calibration import Calibration, from_token_lists, split_held_out
from llmq.errors import SpecError
from llmq.families import Linear, Structure
from llmq.loading import Loader
from llmq.problems import Observed, measure
from llmq.recipe import Recipe
from llmq.stream import Stream, logits

CPU = torch.device("cpu")


def started(folder: Path, calibration: Calibration, **options: Any) -> tuple[Stream, Loader]:
    loader = Loader(preflight.prepare(folder, Recipe(group_size=32)), CPU)
    loader.outer()
    return Stream.start(loader.job.model, loader.job.structure, calibration, CPU, **options), loader


def hessians(folder: Path, calibration: Calibration) -> dict[str, tuple[Tensor, int]]:
    """Return H and tokens of every stage of the unquantized model, by the name of its first linear."""
    stream, loader = started(folder, calibration)
    found = {}
    for index in range(2):
        block = loader.block(index)
        for stage in stream.stages(block, index, loader.job.structure.linears[index]):
            (problem,) = measure(Observed(stream, block, index), stage, None, {})
            assert problem.train is not None
            found[stage.linears[0].name] = (problem.train.mean("x"), problem.train.tokens)
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
        self.config = PretrainedConfig()

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
    structure = Structure(["layers.0"], [block], [[]], {})
    ids = torch.randint(16, (2, 5))
    stream = Stream.start(model, structure, Calibration(ids, None, "x", "y"), CPU)
    (stage,) = stream.stages(block, 0, [Linear("twice", block.twice, transposed=False)])
    assert stage.calls == 2
    (problem,) = measure(Observed(stream, block, 0), stage, None, {})
    total = problem.train
    assert total is not None
    x = model.embed(ids).reshape(10, 8)
    both = torch.cat([x, torch.tanh(block.twice(x))])
    assert total.tokens == 20
    torch.testing.assert_close(total.mean("x"), 2 * both.T @ both / 20)


def test_a_linear_that_never_runs_is_named() -> None:
    model = Wrapped()
    block = model.layers[0]
    assert isinstance(block, Looped)
    structure = Structure(["layers.0"], [block], [[]], {})
    stream = Stream.start(model, structure, Calibration(torch.zeros(1, 4).long(), None, "x", "y"), CPU)
    with pytest.raises(SpecError, match=r"layers\.0\.never: never used .* --ignore"):
        stream.stages(block, 0, [Linear("layers.0.never", block.never, transposed=False)])


def test_equal_arguments_are_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.stream.TOKENS_PER_BATCH", 16)
    ids = torch.randint(1, 128, (3, 16), generator=torch.Generator().manual_seed(0))
    stream, _ = started(make_llama(tmp_path / "m"), Calibration(ids, None, "x", "y"))
    tables = [call.kwargs["position_embeddings"] for batch in stream.batches for call in batch.calls]
    assert len(tables) == 6
    assert len({cos.data_ptr() for cos, _ in tables}) == 1


# --- forks, inputs, outputs, logits


def gemma2(folder: Path) -> Path:
    """Write a model that caps its logits, scales its embeddings, and whose blocks have two kinds of masks."""
    config = Gemma2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, final_logit_softcapping=3.0, query_pre_attn_scalar=16,
        initializer_range=0.3, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return make_model(folder, config)


def whole_model(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def two_parts() -> tuple[Calibration, Calibration]:
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(1, 128, (n,), generator=generator).tolist() for n in (16, 5, 11, 16, 9, 12, 7)]
    return split_held_out(from_token_lists(samples, pad_token_id=0, source="x"), 0.3, 0)  # type: ignore[return-value]


def test_batches_say_which_windows_they_are_and_whether_they_judge(tmp_path: Path) -> None:
    train, held_out = two_parts()
    stream, _ = started(make_llama(tmp_path / "m"), train, held_out=held_out, batch_tokens=32)
    assert [(b.windows, b.held_out) for b in stream.batches] == [
        (slice(0, 2), False), (slice(2, 4), False), (slice(4, 5), False), (slice(5, 7), True)
    ]  # fmt: skip
    assert train.attention_mask is not None
    assert held_out.attention_mask is not None
    ids, masks = (
        torch.cat([train.input_ids, held_out.input_ids]),
        torch.cat([train.attention_mask, held_out.attention_mask]),
    )
    for batch, hidden in zip(stream.batches, stream.hidden, strict=True):
        assert torch.equal(batch.ids, ids[batch.windows])
        assert batch.valid is not None
        assert torch.equal(batch.valid, masks[batch.windows])
        assert hidden.shape == (*batch.ids.shape, 64)


def test_a_fork_moves_on_its_own(tmp_path: Path) -> None:
    stream, loader = started(make_llama(tmp_path / "m"), two_parts()[0], batch_tokens=32)
    block, start = loader.block(0), [t.clone() for t in stream.hidden]
    fork = stream.fork()
    fork.advance(block, 0)
    assert all(torch.equal(a, b) for a, b in zip(stream.hidden, start, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(fork.hidden, start, strict=True))
    ahead = [t.clone() for t in fork.hidden]
    stream.advance(block, 0)
    assert all(torch.equal(a, b) for a, b in zip(stream.hidden, ahead, strict=True))
    stream.advance(loader.block(1), 1)
    assert all(torch.equal(a, b) for a, b in zip(fork.hidden, ahead, strict=True))


@pytest.mark.parametrize("make", [make_llama, gemma2])
def test_inputs_are_those_of_a_whole_forward_pass(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder, (train, held_out) = make(tmp_path / "m"), two_parts()
    stream, loader = started(folder, train, held_out=held_out, batch_tokens=32)
    model, seen = whole_model(folder), {}
    for linear in loader.job.linears:
        module = model.get_submodule(linear.name)
        module.register_forward_pre_hook(lambda _, args, name=linear.name: seen.update({name: args[0]}))
    for index in range(2):
        block = loader.block(index)
        for stage in stream.stages(block, index, loader.job.structure.linears[index]):
            for number, batch in enumerate(stream.batches):
                assert batch.valid is not None
                model(input_ids=batch.ids, attention_mask=batch.valid.long())
                (x,) = stream.inputs(block, index, stage, number)
                assert not x.requires_grad
                for linear in stage.linears:
                    torch.testing.assert_close(x[batch.valid], seen[linear.name][batch.valid])
        stream.advance(block, index)


@pytest.mark.parametrize("make", [make_llama, gemma2])
def test_logits_of_the_last_output_are_those_of_the_whole_model(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder, (train, held_out) = make(tmp_path / "m"), two_parts()
    stream, loader = started(folder, train, held_out=held_out, batch_tokens=32)
    structure = loader.job.structure
    for index in range(2):
        stream.advance(loader.block(index), index)
    model = whole_model(folder)
    for batch, hidden in zip(stream.batches, stream.hidden, strict=True):
        assert batch.valid is not None
        expected = model(input_ids=batch.ids, attention_mask=batch.valid.long()).logits
        found = logits(loader.job.model, structure, batch, hidden)
        torch.testing.assert_close(found[batch.valid], expected[batch.valid], rtol=1e-4, atol=1e-4)
        if make is gemma2:
            assert found.abs().max() < 3
            assert found.abs().max() > 2.5, "the cap does something"
        assert not any("forward" in vars(block) for block in structure.blocks)
    tracked = stream.hidden[0].clone().requires_grad_()
    logits(loader.job.model, structure, stream.batches[0], tracked).sum().backward()
    assert tracked.grad is not None
    assert tracked.grad.abs().max() > 0


def test_gradients_pass_a_block(tmp_path: Path) -> None:
    stream, loader = started(make_llama(tmp_path / "m"), two_parts()[0], batch_tokens=32)
    block, generator = loader.block(0), torch.Generator().manual_seed(0)
    hidden = stream.hidden[1].clone().requires_grad_()
    weight, step = torch.randn(2, *hidden.shape, generator=generator)
    valid = stream.batches[1].valid
    assert valid is not None
    weight, step = weight * valid[..., None], 1e-4 * step * valid[..., None]  # padding is all zeros: norms jump there
    out = stream.through(block, 0, 1, hidden)
    (slope,) = torch.autograd.grad((out * weight).sum(), hidden)
    with torch.no_grad():
        ahead, behind = (stream.through(block, 0, 1, hidden + sign * step) for sign in (1, -1))
    # what is left is a third derivative, and float32 of outputs that differ in their last four digits
    assert float(((ahead - behind) * weight).sum() / 2) == pytest.approx(float((slope * step).sum()), rel=1e-2)
    stream.advance(block, 0)
    torch.testing.assert_close(stream.hidden[1], out.detach())
    assert not stream.hidden[1].requires_grad


def test_a_passing_look_at_the_inputs_moves_the_batch(tmp_path: Path) -> None:
    train, held_out = two_parts()
    stream, loader = started(make_llama(tmp_path / "m"), train, held_out=held_out, batch_tokens=32)
    block = loader.block(0)
    fork, stage = stream.fork(), stream.stages(block, 0, loader.job.structure.linears[0])[-1]
    for number in range(len(stream.batches)):
        start = stream.hidden[number]
        (expected,), (found,) = (
            stream.inputs(block, 0, stage, number),
            fork.inputs(block, 0, stage, number, passing=True),
        )
        assert torch.equal(found, expected)
        assert stream.hidden[number] is start
    stream.advance(block, 0)
    assert all(torch.equal(a, b) for a, b in zip(stream.hidden, fork.hidden, strict=True))


def test_random_windows_come_between_text_and_judges(tmp_path: Path) -> None:
    ids = torch.randint(1, 128, (6, 16), generator=torch.Generator().manual_seed(0))
    text, random, judges = (Calibration(part, None, "x", "y") for part in ids.split(2))
    stream, _ = started(make_llama(tmp_path / "m"), text, random=random, held_out=judges, batch_tokens=32)
    assert [(b.windows, b.text, b.held_out) for b in stream.batches] == [
        (slice(0, 2), True, False), (slice(2, 4), False, False), (slice(4, 6), True, True)
    ]  # fmt: skip
    assert torch.equal(torch.cat([b.ids for b in stream.batches]), ids)
