"""What models pass to their blocks: blocks called as recorded do what they do within the model, in every family."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from family_cases import FAMILIES, Family
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmq import calls as recording
from llmq.errors import SpecError
from llmq.families import Structure, find_structure, is_causal
from llmq.stream import Batch, logits

IDS = torch.randint(1, 100, (3, 16), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(16) < torch.tensor([16, 5, 11])[:, None]


def random_model(family: Family) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = family.auto.from_config(family.config, dtype=torch.float32).eval()
        for p in model.parameters():  # biases and norms that are all 0 or 1 hide mistakes
            if p.ndim == 1:
                p.data.add_(torch.randn_like(p), alpha=0.1)
    return model


def outputs_of(model: PreTrainedModel, structure: Structure, run: Callable[[], Any]) -> list[Tensor]:
    """Return what each block returns while the model runs."""
    seen: list[Tensor] = []
    hooks = [
        b.register_forward_hook(lambda *a: seen.append(a[2][0] if isinstance(a[2], tuple) else a[2]))
        for b in structure.blocks
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, MASK, MASK.flip(1)], ids=["whole", "padded", "padded_on_the_left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_called_as_recorded_do_what_they_do_in_the_model(name: str, mask: Tensor | None) -> None:
    family, model = FAMILIES[name], random_model(FAMILIES[name])
    structure = find_structure(model)
    expected = outputs_of(model, structure, lambda: family.logits(model, IDS, None if mask is None else mask.long()))
    hidden, calls = recording.record(model, structure, IDS, mask)
    valid = torch.ones_like(MASK) if mask is None else mask
    for index, (block, call, out) in enumerate(zip(structure.blocks, calls, expected, strict=True)):
        hidden = call.run(block, hidden)
        assert torch.equal(hidden[..., : out.shape[-1]][valid], out[valid])  # the same operations on the same numbers
        if index in structure.ends:
            hidden = recording.joined(model, structure, index, hidden, IDS, mask)
    if is_causal(family.config):
        batch = Batch(IDS, mask, slice(0, 3), held_out=False, text=True, counted=None, calls=calls)
        whole = family.logits(model, IDS, None if mask is None else mask.long())
        assert torch.equal(logits(model, structure, batch, hidden)[valid], whole[valid])


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_gets_what_the_encoder_returns_now(name: str) -> None:
    """Between recording and running, the encoder's weights change, as they do when it is quantized."""
    family, model = FAMILIES[name], random_model(FAMILIES[name])
    structure = find_structure(model)
    hidden, calls = recording.record(model, structure, IDS, MASK)
    for block in structure.blocks[: structure.starts[1]]:
        for linears in (m for m in block.modules() if isinstance(m, nn.Linear)):
            linears.weight.add_(torch.randn_like(linears.weight), alpha=0.1)
    expected = outputs_of(model, structure, lambda: family.logits(model, IDS, MASK.long()))
    for index, (block, call) in enumerate(zip(structure.blocks, calls, strict=True)):
        hidden = call.run(block, hidden)
        if index in structure.ends:
            hidden = recording.joined(model, structure, index, hidden, IDS, MASK)
    assert torch.equal(hidden[..., :64][MASK], expected[-1][MASK])
    assert calls[-1].memory == 64


class Block(nn.Module):
    """A block that returns its hidden states, alone or with company."""

    def __init__(self, company: int = 0) -> None:
        super().__init__()
        self.linear, self.company = nn.Linear(8, 8), company

    def forward(self, hidden: Tensor, bias: Tensor | None = None) -> Any:
        hidden = hidden + self.linear(hidden) + (0 if bias is None else bias)
        return (hidden, *[None] * self.company) if self.company else hidden


class Bare(nn.Module):
    """As much of a model as recording needs, its blocks run by `order`."""

    def __init__(self, order: Callable[[nn.ModuleList, Tensor], Tensor], company: int = 0) -> None:
        super().__init__()
        self.embed, self.config, self.order = nn.Embedding(128, 8), PretrainedConfig(), order
        self.layers = nn.ModuleList([Block(company) for _ in range(2)])

    @property
    def base_model(self) -> nn.Module:
        return self

    def get_decoder(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, use_cache: bool) -> Tensor:
        return self.order(self.layers, self.embed(input_ids))


def in_order(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden)
    return hidden


def first_of_tuple(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden)[0]
    return hidden


def unpacked(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden, _, _ = layer(hidden)
    return hidden


def unpacked_too_far(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden, _, _, _ = layer(hidden)
    return hidden


def passed_on(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    bias = None
    for layer in layers:
        hidden, _, bias = layer(hidden, bias)
    return hidden


def passed_on_by_name(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    bias = None
    for layer in layers:
        hidden, bias, _ = layer(hidden, bias=bias)
    return hidden


def twice(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    return in_order(layers, in_order(layers, hidden))


def once(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    return layers[0](hidden)  # type: ignore[no-any-return]


def scaled(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    return layers[1](layers[0](hidden) * 2)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("order", "company", "message"),
    [
        (first_of_tuple, 0, r"layers\.1 does not get what .*\[16, 8\] against \[3, 16, 8\].*unchanged.*families\.md"),
        (unpacked_too_far, 0, r"forward pass fails .* after 1 of 2 .*unpack.*families\.md"),
        (passed_on, 2, r"layers\.1 gets what the block before it returns beside .*shared=True.*families\.md"),
        (passed_on_by_name, 2, r"layers\.1 gets what the block before it returns beside"),
        (twice, 0, r"calls more of the 2 blocks from layers\.0 to layers\.1; .*once, in order"),
        (once, 0, r"calls 1 of the 2 blocks"),
        (scaled, 0, r"layers\.1 does not get what the block before it returned"),
    ],
)
def test_models_that_do_more_than_call_their_blocks_are_refused(
    order: Callable[[nn.ModuleList, Tensor], Tensor], company: int, message: str
) -> None:
    model: Any = Bare(order, company)
    with pytest.raises(SpecError, match=f"^Bare: .*{message}"):
        recording.record(model, find_structure(model), IDS, None)


class Deaf(nn.Module):
    """An encoder and a decoder that does not attend to it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.config = Bare(in_order), Bare(in_order), PretrainedConfig()
        self.config.is_encoder_decoder = True

    @property
    def base_model(self) -> nn.Module:
        return self

    def get_encoder(self) -> nn.Module:
        return self.encoder

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, **_: Any) -> Any:
        return self.encoder(input_ids, None, False), self.decoder(decoder_input_ids, None, False)


def test_a_decoder_that_does_not_attend_to_the_encoder_is_refused() -> None:
    model: Any = Deaf()
    with pytest.raises(SpecError, match=r"^Deaf: decoder\.layers\.0 does not get what the stack .*families\.md"):
        recording.record(model, find_structure(model), IDS, None)


def test_a_single_window_that_lost_its_batch_dimension_is_noticed() -> None:
    model: Any = Bare(first_of_tuple)
    with pytest.raises(SpecError, match=r"\[16, 8\] against \[1, 16, 8\]"):
        recording.record(model, find_structure(model), IDS[:1], None)


@pytest.mark.parametrize(("order", "company"), [(in_order, 0), (first_of_tuple, 1), (unpacked, 2)])
def test_blocks_may_return_their_hidden_states_alone_or_in_a_tuple(
    order: Callable[[nn.ModuleList, Tensor], Tensor], company: int
) -> None:
    model: Any = Bare(order, company)
    first, calls = recording.record(model, find_structure(model), IDS, None)
    assert torch.equal(first, model.embed(IDS))
    assert [(call.args, call.kwargs) for call in calls] == [((), {})] * 2


def test_a_failure_within_the_model_keeps_its_cause() -> None:
    def broken(*_: Any) -> Tensor:
        raise KeyError("no such thing")

    model: Any = Bare(broken)
    with pytest.raises(SpecError, match=r"after 0 of 2 .*no such thing") as caught:
        recording.record(model, find_structure(model), IDS, None)
    assert isinstance(caught.value.__cause__, KeyError)


def test_tensors_are_shared_where_they_are_equal() -> None:
    def call(value: float) -> recording.Call:
        return recording.Call((torch.full((2,), value), None), {"pair": (torch.ones(3), torch.full((1,), value))}, 5)

    old, same, other = call(1), call(1), call(2)
    shared, kept = same.sharing(old), other.sharing(old)
    assert shared.args[0] is old.args[0]
    assert shared.kwargs["pair"][1] is old.kwargs["pair"][1]
    assert kept.args[0] is other.args[0]
    assert kept.kwargs["pair"][0] is old.kwargs["pair"][0]
    assert kept.kwargs["pair"][1] is other.kwargs["pair"][1]
    assert shared.memory == kept.memory == 5


def test_forward_is_restored() -> None:
    model: Any = Bare(in_order)
    structure = find_structure(model)
    recording.record(model, structure, IDS, None)
    assert not any("forward" in vars(block) for block in structure.blocks)
    assert partial(model, IDS, None, False)().shape == (3, 16, 8)
