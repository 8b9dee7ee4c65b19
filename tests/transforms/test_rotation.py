"""Rotations folded into a model: logits stay, weights are those of a naive reference, and what cannot is refused."""

from __future__ import annotations

import pytest
import torch
from rotation_reference import rotated_llama
from torch import Tensor, nn
from transform_cases import CONFIGS, exact_norms_, logits, make, probes, relative
from transformers import PreTrainedModel

from llmq.errors import SpecError
from llmq.families import Structure
from llmq.transforms.folds import apply_scales_
from llmq.transforms.hadamard import Kind, rotation_fixing_mean, rotation_matrix
from llmq.transforms.rotation import residual_rotation, rotate_block_, rotate_outer_
from llmq.transforms.wiring import find_wiring

LEGAL = ["llama", "llama_tied", "llama_mha", "mistral", "qwen2", "qwen3", "gemma", "phi3", "opt", "gpt2"]
REFUSED = {
    "gemma2": "layers.0.post_attention_layernorm: is read by no linear layer directly",
    "gemma3": "layers.0.post_attention_layernorm: is read by no linear layer directly",
    "mixtral": "layers.0.post_attention_layernorm: is read by no linear layer directly",
    "opt_post": "needs one norm outside the blocks, found none",
}
kinds = pytest.mark.parametrize("kind", ["hadamard", "random"])


def test_every_architecture_is_legal_or_refused() -> None:
    assert sorted([*LEGAL, *REFUSED]) == sorted(CONFIGS)


def rotate_(model: PreTrainedModel, structure: Structure, kind: Kind = "hadamard") -> list[str]:
    """Rotate all of `model` as the driver does: what is around the blocks, then block by block. Return the heads."""
    blocks = probes(model, structure)
    q = residual_rotation(model, structure, kind, seed=5)
    rotate_outer_(model, structure, q)
    heads = []
    for index, probe in enumerate(blocks):
        heads += rotate_block_(find_wiring(*probe), q, probe.run, probe.x, kind=kind, seed=index)
    return heads


@kinds
@pytest.mark.parametrize("name", LEGAL)
def test_logits_stay(name: str, kind: Kind) -> None:
    model, structure = make(name)
    before, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    heads = rotate_(model, structure, kind)
    assert relative(logits(model), before) < 1e-5
    assert len(heads) == 2, "one fold of values per block"
    after = model.state_dict()
    turned = [key for key, w in weights.items() if w.dim() == 2 and relative(after[key], w) > 0.3]
    assert len(turned) == sum(w.dim() == 2 for w in weights.values()), "every matrix has changed"


@pytest.mark.parametrize("name", LEGAL)
def test_logits_stay_to_the_precision_of_the_model(name: str) -> None:
    """Nothing of the fold is done in less than float64: in a model of float64, ten digits more stay."""
    model, structure = make(name, torch.float64)
    exact_norms_(model)
    before = logits(model)
    rotate_(model, structure)
    assert relative(logits(model), before) < 1e-12


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rotated_is_refused_by_name(name: str) -> None:
    model, structure = make(name)
    with pytest.raises(SpecError, match=REFUSED[name]):
        rotate_(model, structure)


@kinds
def test_weights_are_those_of_the_reference(kind: Kind) -> None:
    model, structure = make("llama", torch.float64)
    q = residual_rotation(model, structure, kind, seed=5)
    expected = rotated_llama(model, q, [rotation_matrix(12, kind, index) for index in range(2)], head_dim=12)
    rotate_(model, structure, kind)
    for key, value in model.state_dict().items():
        assert torch.allclose(value, expected[key], atol=1e-12), key


def test_weights_are_rounded_once() -> None:
    """A float32 model gets the rotated weights of its float64 self, rounded to float32."""
    model, structure = make("llama")
    q = residual_rotation(model, structure, "hadamard", seed=5)
    exact = rotated_llama(model, q, [rotation_matrix(12, "hadamard", index) for index in range(2)], head_dim=12)
    rotate_(model, structure)
    state = model.state_dict()
    for key in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        # float64 of the two differs in the last digits, so that one in a thousand may lie across a tie
        assert (state[key] != exact[key].float()).float().mean() < 1e-3, key


def test_scaling_remains_possible_after_rotation() -> None:
    model, structure = make("qwen3")
    before, blocks = logits(model), probes(model, structure)
    q = residual_rotation(model, structure, "hadamard", 0)
    rotate_outer_(model, structure, q)
    for probe in blocks:
        wiring = find_wiring(*probe)
        rotate_block_(wiring, q, probe.run, probe.x, kind="hadamard", seed=0)
        for fold in wiring.folds:
            apply_scales_(fold, torch.linspace(0.5, 2.0, fold.channels))
    assert relative(logits(model), before) < 1e-5


def test_rotation_after_scaling_is_exact_too() -> None:
    model, structure = make("gpt2")
    before = logits(model)
    for probe in probes(model, structure):
        for fold in find_wiring(*probe).folds:
            apply_scales_(fold, torch.linspace(0.5, 2.0, fold.channels))
    rotate_(model, structure)
    assert relative(logits(model), before) < 1e-5


@kinds
def test_rotation_that_only_fixes_the_mean_goes_to_models_that_need_it(kind: Kind) -> None:
    for name in LEGAL:
        model, structure = make(name)
        q = residual_rotation(model, structure, kind, 3)
        expected = rotation_fixing_mean(48, 3) if name in ("opt", "gpt2") else rotation_matrix(48, kind, 3)
        assert torch.equal(q, expected), name


def test_a_rotation_that_changes_the_mean_is_refused_where_it_matters() -> None:
    model, structure = make("opt")
    probe = probes(model, structure)[0]
    q = rotation_matrix(48, "hadamard", 0)
    with pytest.raises(SpecError, match=r"decoder.final_layer_norm: subtracts the mean"):
        rotate_outer_(model, structure, q)
    with pytest.raises(SpecError, match="self_attn_layer_norm: subtracts the mean"):
        rotate_block_(find_wiring(*probe), q, probe.run, probe.x, kind="hadamard", seed=0)


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama_tied", True), ("gemma", True), ("gpt2", True)])
def test_a_tied_head_gets_its_own_weight(name: str, tied: bool) -> None:
    model, structure = make(name)
    assert rotate_outer_(model, structure, residual_rotation(model, structure, "hadamard", 0)) == tied
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert not model.config.tie_word_embeddings


def test_a_tied_head_that_was_never_loaded() -> None:
    """The driver loads tensors by name, and a tied head has none in the files."""
    model, structure = make("llama_tied")
    expected, blocks = logits(model), probes(model, structure)
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight, device="meta"), requires_grad=False)
    q = residual_rotation(model, structure, "hadamard", 0)
    assert rotate_outer_(model, structure, q)
    for probe in blocks:
        rotate_block_(find_wiring(*probe), q, probe.run, probe.x, kind="hadamard", seed=0)
    assert relative(logits(model), expected) < 1e-5


def test_blocks_may_be_absent_while_the_rest_is_rotated() -> None:
    model, structure = make("llama")
    q = residual_rotation(model, structure, "hadamard", 0)
    for block in structure.blocks:
        block.to("meta")
    rotate_outer_(model, structure, q)


def test_an_unknown_module_outside_the_blocks_is_refused() -> None:
    model, structure = make("llama")
    model.model.project = nn.Linear(48, 48)
    q = residual_rotation(model, structure, "hadamard", 0)
    with pytest.raises(SpecError, match=r"model.project: a Linear outside the blocks"):
        rotate_outer_(model, structure, q)


def test_an_embedding_of_another_width_is_refused() -> None:
    model, structure = make("llama")
    model.model.types = nn.Embedding(3, 24)
    with pytest.raises(SpecError, match=r"model.types: a Embedding outside the blocks"):
        rotate_outer_(model, structure, residual_rotation(model, structure, "hadamard", 0))


def test_several_norms_outside_the_blocks_are_refused() -> None:
    model, structure = make("llama")
    model.model.first = nn.RMSNorm(48)
    with pytest.raises(SpecError, match=r"one norm outside the blocks, found model.norm, model.first"):
        residual_rotation(model, structure, "hadamard", 0)


@pytest.mark.parametrize("after_too", [False, True])
def test_a_norm_before_the_blocks_is_no_final_norm(after_too: bool) -> None:
    model, structure = make("llama")
    norm = model.model.first = model.model.norm
    model.model.embed_tokens.register_forward_hook(lambda _, __, out: norm(out))
    if not after_too:
        model.model.norm = nn.Identity()
    with pytest.raises(SpecError, match="does not come after"):
        rotate_outer_(model, structure, residual_rotation(model, structure, "hadamard", 0))


def test_a_head_that_is_no_linear_is_refused() -> None:
    model, structure = make("llama")
    model.lm_head = nn.Identity()
    with pytest.raises(SpecError, match="no linear head"):
        rotate_outer_(model, structure, torch.eye(48, dtype=torch.float64))


def test_outer_parts_that_do_not_commute_are_noticed() -> None:
    model, structure = make("llama")
    model.model.embed_tokens.register_forward_hook(lambda _, __, out: out.tanh())
    with pytest.raises(SpecError, match="the parts around the blocks: rotation changes"):
        rotate_outer_(model, structure, residual_rotation(model, structure, "hadamard", 0))


def test_a_block_that_does_not_commute_is_noticed() -> None:
    model, structure = make("llama")
    probe = probes(model, structure)[0]

    def run(x: Tensor) -> Tensor:
        return probe.run(x) + 0.01 * x.abs()

    wiring, q = find_wiring(probe.block, probe.linears, run, probe.x), rotation_matrix(48, "hadamard", 0)
    with pytest.raises(SpecError, match=r"layers.0.input_layernorm, .*: rotation changes what is computed"):
        rotate_block_(wiring, q, run, probe.x, kind="hadamard", seed=0)


def test_a_large_residual_stream_hides_no_damage() -> None:
    model, structure = make("llama")
    probe = probes(model, structure)[0]
    wiring = find_wiring(probe.block, probe.linears, probe.run, 1e6 * probe.x)
    wiring.writers.pop()
    q = rotation_matrix(48, "hadamard", 0)
    with pytest.raises(SpecError, match="rotation changes what is computed"):
        rotate_block_(wiring, q, probe.run, 1e6 * probe.x, kind="hadamard", seed=0)


def test_a_bias_without_a_gain_and_without_a_place_is_refused() -> None:
    model, structure = make("gpt2")  # its head has no bias that could take the final norm's
    model.transformer.ln_f.weight.data[3] = 0.0
    with pytest.raises(SpecError, match="ln_f: has a channel of gain 0 with a bias"):
        rotate_outer_(model, structure, residual_rotation(model, structure, "hadamard", 0))


def test_a_gain_of_zero_without_a_bias_is_fine() -> None:
    model, structure = make("gpt2")
    for norm in (model.transformer.ln_f, model.transformer.h[0].ln_1):
        norm.weight.data[3] = 0.0
    model.transformer.ln_f.bias.data[3] = 0.0
    before = logits(model)
    rotate_(model, structure)
    assert relative(logits(model), before) < 1e-5


def kurtosis(w: Tensor) -> float:
    """Return E w⁴ / (E w²)²: 3 for a normal distribution."""
    return float(w.pow(4).mean() / w.square().mean().square())


@kinds
def test_planted_outliers_are_spread(kind: Kind) -> None:
    model, structure = make("llama")
    for index, probe in enumerate(probes(model, structure)):
        for fold in find_wiring(*probe).folds:
            c = torch.ones(fold.channels)
            c[index :: fold.channels // 3] = 30.0
            apply_scales_(fold, c)
    names = ["q_proj", "gate_proj", "o_proj"]  # what R1 and R2 reach: down_proj's inputs they do not
    watched = {k: v for k, v in model.state_dict().items() if any(name in k for name in names)}
    before = max(kurtosis(w) for w in watched.values())
    rotate_(model, structure, kind)
    after = max(kurtosis(w) for k, w in model.state_dict().items() if k in watched)
    assert before > 20
    assert after < before / 3
