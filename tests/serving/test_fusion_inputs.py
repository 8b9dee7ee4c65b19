"""Which layers share an input is seen in every family, and nothing is left behind in the model that was looked at."""

from collections.abc import Iterator

import pytest
import torch
from family_cases import FAMILIES
from tiny_models import LLAMA
from torch import Tensor, nn
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedModel, Qwen2MoeConfig

from llmq import shared_inputs
from llmq.families import find_structure, skeleton
from llmq.moe import unfuse_
from llmq.shared_inputs import sharing


def model_of(config: object) -> PreTrainedModel:
    model = skeleton(config, torch.float32)
    unfuse_(model)
    return model


def seen(model: PreTrainedModel) -> list[tuple[str, ...]]:
    return sharing(model, [linear.name for linear in find_structure(model).all_linears])


def siblings(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Yield those of `names` that are in one module, several of them, in order."""
    by_parent: dict[str, list[str]] = {}
    for name in names:
        by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    yield from (tuple(sorted(group)) for group in by_parent.values() if len(group) > 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_siblings_of_every_stage_are_found(name: str) -> None:
    """What a block's stages are is known of every family; its blocks may have some of them only."""
    family = FAMILIES[name]
    model = model_of(family.config)
    known = {module for module, _ in model.named_modules()}
    expected = {
        tuple(f"{block}.{local}" for local in group)
        for block in find_structure(model).names
        for stage in family.stages
        for group in siblings(stage)
        if all(f"{block}.{local}" in known for local in group)
    }
    found = seen(model)
    assert {tuple(sorted(group)) for group in found} == expected
    assert len(found) == len(expected)


def test_groups_are_in_the_order_of_calls() -> None:
    model = model_of(LlamaConfig(**LLAMA))
    names = [linear.name for linear in find_structure(model).all_linears]
    assert sharing(model, reversed(names))[0][0].endswith(("q_proj", "gate_proj"))
    assert set(sharing(model, reversed(names))) == set(sharing(model, names))
    assert sharing(model, [name for name in names if "q_proj" not in name])[0] == (
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
    )
    assert sharing(model, []) == sharing(model, names[:1]) == []


def test_experts_are_left_out_and_what_stands_beside_them_is_not() -> None:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    moe = Qwen2MoeConfig(**small, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32)
    locals_ = {tuple(name.rpartition(".")[2] for name in group) for group in seen(model_of(moe))}
    assert locals_ == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    assert not any("experts.0" in name for group in seen(model_of(moe)) for name in group)
    latent = DeepseekV3Config(
        **small, intermediate_size=96, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, v_head_dim=16,
        qk_nope_head_dim=16,
    )  # fmt: skip
    found = seen(model_of(latent))
    assert ("model.layers.1.self_attn.q_a_proj", "model.layers.1.self_attn.kv_a_proj_with_mqa") in found
    assert ("model.layers.1.mlp.shared_experts.gate_proj", "model.layers.1.mlp.shared_experts.up_proj") in found


def state(model: nn.Module) -> list[object]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]
    return [*map(id, (*model.parameters(), *model.buffers())), *hooks]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(LlamaConfig(**LLAMA))
    before = state(model)
    if fails:

        def broken(*_: object, **__: object) -> None:
            raise NotImplementedError("without weights")

        monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", broken)
    found = {tuple(name.rpartition(".")[2] for name in group) for group in seen(model)}
    attention, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    assert found == ({attention} if fails else {attention, mlp})
    assert state(model) == before
    assert all(parameter.is_meta for parameter in model.parameters())


class Odd(nn.Module):
    """Calls layers in ways that make no group."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x.clone()) + self.c(x)  # of these, a and c share
        x.add_(1)
        return self.d(x) + self.e(x) + self.e(x) + y


def test_only_one_unchanged_tensor_given_once_is_the_same_input() -> None:
    model = model_of(LlamaConfig(**{**LLAMA, "hidden_size": 8, "num_key_value_heads": 4}))
    with torch.device("meta"):
        model.model.layers[0].mlp = Odd()
    names = [f"model.layers.0.mlp.{local}" for local in "abcde"]
    assert sharing(model, names) == [(names[0], names[2])]


def test_modules_that_differ_are_looked_at_apart() -> None:
    """A block whose attention takes keys and values of another block has layers that it does not call."""

    class Sharing(nn.Module):
        def __init__(self, is_shared: bool) -> None:
            super().__init__()
            self.is_shared = is_shared
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) if self.is_shared else self.q(x) + self.k(x)

    model = model_of(LlamaConfig(**{**LLAMA, "hidden_size": 8, "num_hidden_layers": 4, "num_key_value_heads": 4}))
    with torch.device("meta"):
        for number, layer in enumerate(model.model.layers):
            layer.mlp = Sharing(number in (0, 2))
    names = [f"model.layers.{number}.mlp.{local}" for number in range(4) for local in "qk"]
    assert sharing(model, names) == [(names[2], names[3]), (names[6], names[7])]


def test_large_stacks_of_matrices_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(LlamaConfig(**LLAMA))
    with torch.device("meta"):
        model.model.norm.stack = nn.Parameter(torch.empty(2, 4, 8))
    for limit, device in ((64, "meta"), (65, "cpu")):
        monkeypatch.setattr(shared_inputs, "_LARGE", limit)
        with shared_inputs._hollow(model):
            assert model.model.norm.stack.device.type == device
            assert model.model.norm.weight.device.type == "cpu"
