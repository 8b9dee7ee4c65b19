"""What feeds what: found on every architecture, and refused where something else has a say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transform_cases import CONFIGS, Probe, logits, make, probes, relative
from transformers.pytorch_utils import Conv1D

from llmq.errors import SpecError
from llmq.families import Linear
from llmq.transforms.folds import Norm, apply_scales_
from llmq.transforms.wiring import Wiring, find_wiring, refuse_shared

QKV = "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
ATTENTION = [f"input_layernorm[0:48] -> {QKV}", "self_attn.v_proj[0:24] -> self_attn.o_proj"]
MLP = ["post_attention_layernorm[0:48] -> mlp.gate_proj, mlp.up_proj", "mlp.up_proj[0:72] -> mlp.down_proj"]
GEMMA = [ATTENTION[0], "self_attn.v_proj[0:32] -> self_attn.o_proj"]
AFTER = ["post_attention_layernorm", "post_feedforward_layernorm"]
PRE_FEEDFORWARD = ["pre_feedforward_layernorm[0:48] -> mlp.gate_proj, mlp.up_proj", MLP[1]]
OPT = ["self_attn.v_proj[0:48] -> self_attn.out_proj", "fc1[0:72] -> fc2"]
KVQ = "self_attn.k_proj, self_attn.v_proj, self_attn.q_proj"

# the folds with the producer's channels, and what is refused
EXPECTED: dict[str, tuple[list[str], list[str]]] = {
    "llama": (ATTENTION + MLP, []),
    "llama_tied": (ATTENTION + MLP, []),
    "llama_mha": ([ATTENTION[0], "self_attn.v_proj[0:48] -> self_attn.o_proj", *MLP], []),
    "mistral": (ATTENTION + MLP, []),
    "qwen2": (ATTENTION + MLP, []),
    "qwen3": (GEMMA + MLP, []),
    "gemma": (GEMMA + MLP, []),
    "gemma2": (GEMMA + PRE_FEEDFORWARD, AFTER),
    "gemma3": (GEMMA + PRE_FEEDFORWARD, AFTER),
    "phi3": (
        [
            "input_layernorm[0:48] -> self_attn.qkv_proj",
            "self_attn.qkv_proj[72:96] -> self_attn.o_proj",
            "post_attention_layernorm[0:48] -> mlp.gate_up_proj",
            "mlp.gate_up_proj[72:144] -> mlp.down_proj",
        ],
        [],
    ),
    "mixtral": (ATTENTION, ["post_attention_layernorm"]),  # a router reads it, and experts that are no linears
    "opt": ([f"self_attn_layer_norm[0:48] -> {KVQ}", "final_layer_norm[0:48] -> fc1", *OPT], []),
    "opt_post": (OPT, ["self_attn_layer_norm", "final_layer_norm", KVQ]),  # the residual stream reads them as well
    "gpt2": (
        [
            "ln_1[0:48] -> attn.c_attn",
            "attn.c_attn[96:144] -> attn.c_proj",
            "ln_2[0:48] -> mlp.c_fc",
        ],
        ["mlp.c_proj"],  # GELU is not homogeneous
    ),
}


def described(wiring: Wiring, prefix: str) -> tuple[list[str], list[str]]:
    folds = [
        f"{f.producer.name}[{f.start}:{f.start + f.channels}]{f.name.removeprefix(f.producer.name)}"
        for f in wiring.folds
    ]
    return [f.replace(prefix, "") for f in folds], [r.name.replace(prefix, "") for r in wiring.refused]


@pytest.mark.parametrize("name", CONFIGS)
def test_folds_of_every_architecture(name: str) -> None:
    model, structure = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for index, probe in enumerate(probes(model, structure)):
        wiring = find_wiring(*probe)
        folds, refused = described(wiring, structure.prefixes[index])
        assert sorted(folds) == sorted(EXPECTED[name][0])
        assert sorted(refused) == sorted(EXPECTED[name][1])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_scaling_every_fold_keeps_the_logits(name: str) -> None:
    model, structure = make(name)
    expected = logits(model)
    generator = torch.Generator().manual_seed(0)
    for probe in probes(model, structure):
        for fold in find_wiring(*probe).folds:
            before = [consumer.weight.clone() for consumer in fold.consumers]
            apply_scales_(fold, torch.exp(torch.randn(fold.channels, generator=generator)))
            for consumer, old in zip(fold.consumers, before, strict=True):
                assert relative(consumer.weight, old) > 0.1
    assert relative(logits(model), expected) < 1e-5


def test_norms_are_told_apart() -> None:
    kinds = {}
    for name in ("llama", "gemma", "opt"):
        norms = [f.producer for f in find_wiring(*probes(*make(name))[0]).folds if isinstance(f.producer, Norm)]
        kinds[name] = {(norm.plus_one, norm.centers) for norm in norms}
    assert kinds == {"llama": {(False, False)}, "gemma": {(True, False)}, "opt": {(False, True)}}


def test_heads_of_values_are_known_and_those_of_the_mlp_are_none() -> None:
    found = {f.producer.name: f.head_dim for f in find_wiring(*probes(*make("phi3"))[0]).folds}
    assert found["model.layers.0.self_attn.qkv_proj"] == 12
    assert found["model.layers.0.mlp.gate_up_proj"] is None


def test_query_heads_of_one_group_share_their_channels() -> None:
    fold = next(f for f in find_wiring(*probes(*make("llama"))[0]).folds if f.head_dim)
    # 4 heads of 12 over 2 key-value heads: outputs 0-11 and 12-23 come from values 0-11, the others from 12-23
    first, second = list(range(12)), list(range(12, 24))
    assert fold.source.tolist() == first + first + second + second


def test_writers_are_what_adds_to_the_residual_stream() -> None:
    wiring = find_wiring(*probes(*make("qwen3"))[1])
    assert [w.name for w in wiring.writers] == ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]


class Toy(nn.Module):
    """A residual block of width 8, built to order."""

    def __init__(self, forward: Callable[[Toy, Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.norm = nn.RMSNorm(8)
            self.up, self.down, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def toy(forward: Callable[[Toy, Tensor], Tensor], *, leave_out: str = "", size: float = 1.0) -> Probe:
    block = Toy(forward).requires_grad_(False)
    names = [name for name in ("up", "down", "other") if name != leave_out]
    linears = [Linear(f"blocks.0.{name}", getattr(block, name), transposed=False) for name in names]
    x = size * torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    return Probe(block, linears, block, x)


def names_of(probe: Probe) -> set[str]:
    return {fold.name.replace("blocks.0.", "") for fold in find_wiring(*probe).folds}


PLAIN = {"norm -> up", "up -> down"}
TOYS: dict[str, tuple[Callable[[Toy, Tensor], Tensor], set[str]]] = {
    "plain": (lambda m, x: x + m.down(m.up(m.norm(x)).relu()), PLAIN),
    "the norm is read by something else": (
        lambda m, x: x + m.down(m.up(y := m.norm(x)).relu()) + y.tanh(),
        {"up -> down"},
    ),
    "the norm decides as a router would": (
        lambda m, x: x + m.down(m.up(y := m.norm(x)).relu()) * y.sum(-1, keepdim=True).sigmoid(),
        {"up -> down"},
    ),
    "the producer is read by something else": (
        lambda m, x: x + m.down((y := m.up(m.norm(x))).relu()) + y,
        {"norm -> up"},
    ),
    "squared": (lambda m, x: x + m.down(m.up(m.norm(x)).relu().square()), {"norm -> up"}),
    "two producers, multiplied": (
        lambda m, x: x + m.down(m.up(m.norm(x)) * m.other(x.tanh()).sigmoid()),
        PLAIN,
    ),
    "mixed channels": (lambda m, x: x + m.down(m.up(m.norm(x)).flip(-1)), {"norm -> up"}),
    "the norm runs twice": (lambda m, x: x + m.down(m.up(m.norm(x))) + m.norm(2 * x), {"up -> down"}),
    "the consumer runs twice": (lambda m, x: x + m.down(m.up(m.norm(x))) + m.down(x), {"norm -> up"}),
    "the producer runs twice": (lambda m, x: x + m.down(m.up(m.norm(x))) + m.up(x), {"norm -> up"}),
    "two stages read one tensor in other shapes": (
        lambda m, x: x + m.down(m.up(y := m.norm(x)).relu()) + m.other(y.view(6, 8)).view(2, 3, 8),
        {"norm -> up, other", "up -> down"},
    ),
}


@pytest.mark.parametrize("name", TOYS)
def test_folds_of_a_toy(name: str) -> None:
    forward, expected = TOYS[name]
    # in the case of the producer that runs twice, up reads two tensors: neither of its sides can be folded
    if name == "the producer runs twice":
        expected = set()
    assert names_of(toy(forward)) == expected


@pytest.mark.parametrize("name", ["the norm is read by something else", "squared"])
def test_only_norms_of_the_residual_stream_stand_in_the_way_of_rotation(name: str) -> None:
    refused = find_wiring(*toy(TOYS[name][0])).refused
    assert [(r.name, r.residual_norm) for r in refused] == [
        ("blocks.0.down", False) if name == "squared" else ("blocks.0.norm", True)
    ]


def test_a_linear_that_is_not_given_counts_as_an_unknown_reader() -> None:
    both = TOYS["two stages read one tensor in other shapes"][0]
    assert names_of(toy(both, leave_out="other")) == {"up -> down"}


def test_a_large_residual_stream_hides_nothing() -> None:
    gelu = toy(lambda m, x: x + m.down(torch.nn.functional.gelu(m.up(m.norm(x)))), size=2000.0)
    assert names_of(gelu) == {"norm -> up"}


def test_a_tensor_with_two_parts_is_not_scaled() -> None:
    probe = toy(TOYS["plain"][0])
    probe.block.down.weight = probe.block.up.weight
    assert names_of(probe) == set()


def test_a_norm_of_another_kind_is_refused() -> None:
    class Exponential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, (8,)) * self.weight.exp()

    probe = toy(TOYS["plain"][0])
    probe.block.norm = Exponential()
    assert names_of(probe) == {"up -> down"}


def test_a_norm_of_one_plus_weight_may_have_a_bias() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-0.3, 0.3, 8), requires_grad=False)
            self.bias = nn.Parameter(torch.linspace(0.5, 1.0, 8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, (8,)) * (1 + self.weight) + self.bias

    probe = toy(TOYS["plain"][0])
    probe.block.norm = Shifted()
    assert names_of(probe) == PLAIN


def test_a_norm_with_a_gate_is_no_norm() -> None:
    class Gated(nn.RMSNorm):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * gate.sigmoid()

    probe = toy(lambda m, x: x + m.down(m.up(m.norm(x, gate=x)).relu()))
    probe.block.norm = Gated(8)
    assert names_of(probe) == {"up -> down"}


def test_a_norm_without_weight_feeds_nothing() -> None:
    probe = toy(TOYS["plain"][0])
    probe.block.norm = nn.LayerNorm(8, elementwise_affine=False)
    assert names_of(probe) == {"up -> down"}


def test_a_fused_layer_keeps_its_weight_as_it_likes() -> None:
    """GPT-2's [K, N] weights: the rows of a fused producer are columns in memory."""
    probe = probes(*make("gpt2"))[0]
    fold = next(f for f in find_wiring(*probe).folds if f.head_dim)
    assert isinstance(fold.producer.module, Conv1D)
    before = fold.producer.module.weight.clone()
    apply_scales_(fold, torch.full((48,), 2.0))
    assert torch.equal(fold.producer.module.weight[:, :96], before[:, :96])
    assert torch.equal(fold.producer.module.weight[:, 96:], before[:, 96:] / 2)


def test_blocks_that_share_a_parameter_are_refused() -> None:
    blocks = [Toy(TOYS["plain"][0]) for _ in range(3)]
    refuse_shared(blocks)
    blocks[2].up.weight = blocks[0].down.weight
    with pytest.raises(SpecError, match=r"blocks 0 and 2 share one parameter \(down.weight, up.weight\)"):
        refuse_shared(blocks)
