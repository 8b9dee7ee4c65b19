"""Token weights are the squared gradients of the end loss, and Hessians made with them are what they should be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from guidance_reference import output_gradient
from tiny_models import make_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmq.calibration import Calibration
from llmq.errors import CalibrationError, SpecError
from llmq.families import Linear, find_structure
from llmq.guidance import _draw, group_rows, token_weights, winsorize
from llmq.hessian import HessianSum

CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return make_double(tmp_path_factory.mktemp("model"))


def make_double(folder: Path) -> PreTrainedModel:
    """Return a Llama of two blocks in float64 throughout: finite differences want it, and its own norms are not."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(make_llama(folder, **SIZES), dtype=torch.float64)
    for module in list(model.modules()):
        for name, _ in module.named_children():
            if name.endswith("norm"):
                setattr(module, name, nn.RMSNorm(16, eps=1e-6, dtype=torch.float64))
    return model


def make_single(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(make_llama(folder, **SIZES))
    return model


def windows(
    samples: int = 3, length: int = 7, *, mask: Tensor | None = None, loss_mask: Tensor | None = None
) -> Calibration:
    ids = torch.randint(1, 128, (samples, length), generator=torch.Generator().manual_seed(1))
    return Calibration(ids, mask, "windows", "none", loss_mask)


def padded(side: str = "right") -> Calibration:
    mask = torch.ones(3, 7, dtype=torch.bool)
    if side == "right":
        mask[1, 4:], mask[2, 6:] = False, False
    else:
        mask[1, :3], mask[2, :1] = False, False
    return windows(mask=mask)


def linears(model: PreTrainedModel, *names: str) -> list[Linear]:
    """Return the linears of `model` whose name ends in one of `names`; all without names."""
    return [linear for linear in find_structure(model).all_linears if not names or linear.name.endswith(names)]


def expected(model: PreTrainedModel, linear: Linear, calibration: Calibration, groups: int) -> Tensor:
    """Return the weights of `linear` from finite differences, [groups, S, L]."""
    batch = (calibration.input_ids, calibration.attention_mask, calibration.counted)
    samples, length = calibration.input_ids.shape
    found = torch.zeros(groups, samples, length, dtype=torch.float64)
    valid = calibration.attention_mask
    for s in range(samples):
        for t in range(length):
            if valid is None or valid[s, t]:
                gradient = output_gradient(model, linear.module, batch, (s, t))
                start = 0
                for group, size in enumerate(group_rows(len(gradient), groups, "x")):
                    found[group, s, t] = gradient[start : start + size].square().mean()
                    start += size
    return found / found.sum(dim=(1, 2), keepdim=True) * calibration.tokens


# weights are stored in float32 (6e-8); central differences are good to about 1e-9 of the largest gradient, squared
CLOSE = {"rtol": 1e-5, "atol": 1e-7, "check_dtype": False}


@pytest.mark.parametrize("name", ["0.self_attn.k_proj", "0.mlp.down_proj", "1.self_attn.o_proj", "1.mlp.up_proj"])
def test_weights_are_the_mean_squared_gradients_of_the_rows(model: PreTrainedModel, name: str) -> None:
    calibration = windows(2, 5)
    chosen = linears(model, name)
    for groups in (1, 3):
        found = token_weights(model, chosen, calibration, groups=groups)
        assert list(found) == [chosen[0].name]
        assert found[chosen[0].name].dtype == torch.float32
        torch.testing.assert_close(found[chosen[0].name], expected(model, chosen[0], calibration, groups), **CLOSE)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_weighs_nothing_and_changes_nothing(model: PreTrainedModel, side: str) -> None:
    calibration = padded(side)
    assert calibration.attention_mask is not None
    (linear,) = linears(model, "0.self_attn.v_proj")
    found = token_weights(model, [linear], calibration)[linear.name]
    assert (found[0][~calibration.attention_mask] == 0).all()
    torch.testing.assert_close(found, expected(model, linear, calibration, 1), **CLOSE)


def test_a_loss_mask_says_which_predictions_count(model: PreTrainedModel) -> None:
    counts = torch.zeros(2, 6, dtype=torch.bool)
    counts[0, 2:4], counts[1, 4] = True, True
    calibration = windows(2, 6, loss_mask=counts)
    (linear,) = linears(model, "0.self_attn.v_proj")
    found = token_weights(model, [linear], calibration)[linear.name]
    torch.testing.assert_close(found, expected(model, linear, calibration, 1), **CLOSE)
    # tokens behind the last prediction that counts influence nothing; those before it do, through attention
    assert (found[0, 0, 4:] == 0).all()
    assert found[0, 1, 5] == 0
    assert (found[0, 0, :4] > 0).all()


def test_mean_over_valid_tokens_is_one(model: PreTrainedModel) -> None:
    calibration = padded()
    for found in token_weights(model, linears(model), calibration, groups=4).values():
        torch.testing.assert_close(found.sum(dim=(1, 2)) / calibration.tokens, torch.ones(4))
        assert (found >= 0).all()


def test_all_linears_at_once_are_each_alone(model: PreTrainedModel) -> None:
    calibration = windows()
    together = token_weights(model, linears(model), calibration)
    assert list(together) == [linear.name for linear in linears(model)]
    for linear in linears(model)[::5]:
        assert torch.equal(token_weights(model, [linear], calibration)[linear.name], together[linear.name])


@pytest.mark.parametrize("loss", ["nll", "self"])
@pytest.mark.parametrize("batch_tokens", [1, 14, 1000])
def test_batches_do_not_matter(model: PreTrainedModel, loss: Any, batch_tokens: int) -> None:
    calibration = padded()
    whole = token_weights(model, linears(model), calibration, loss=loss)
    found = token_weights(model, linears(model), calibration, loss=loss, batch_tokens=batch_tokens)
    for name, weights in whole.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-5, atol=1e-7)


def test_checkpointing_keeps_only_inputs_of_blocks_and_changes_no_value(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith("mlp"):
            module.register_forward_pre_hook(lambda m, a, name=name: calls.append(name))
    try:
        found = token_weights(model, linears(model), windows())
    finally:
        for module in model.modules():
            module._forward_pre_hooks.clear()
    assert sorted(calls) == sorted(["model.layers.0.mlp", "model.layers.1.mlp"] * 2)  # once more on the way back

    def direct(forward: Any, *args: Any, use_reentrant: bool, preserve_rng_state: bool, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    monkeypatch.setattr("llmq.guidance.checkpoint", direct)
    for name, weights in token_weights(model, linears(model), windows()).items():
        assert torch.equal(weights, found[name])


def test_the_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    ids = windows().input_ids
    model.lm_head.weight.requires_grad_(False)
    try:
        with torch.no_grad():
            before = model(input_ids=ids).logits
            token_weights(model, linears(model), windows())
            assert torch.equal(model(input_ids=ids).logits, before)
        assert not model.lm_head.weight.requires_grad
    finally:
        model.lm_head.weight.requires_grad_(True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(linear.module._forward_hooks for linear in linears(model))


def test_an_error_leaves_the_model_as_it_was_too(model: PreTrainedModel) -> None:
    outside = Linear("elsewhere", nn.Linear(16, 4), transposed=False)
    with pytest.raises(SpecError, match=r"elsewhere: the loss does not depend on it; leave it out with --ignore"):
        token_weights(model, [outside], windows())
    assert not any("forward" in vars(module) for module in model.modules())
    assert not outside.module._forward_hooks


class Twice(nn.Module):
    """An MLP that sends every token through the same linear twice."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.inner(x).sin())
        return out


def test_several_calls_of_one_linear_add_up(tmp_path: Path) -> None:
    model = make_double(tmp_path / "m")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.model.layers[0].mlp = Twice(nn.Linear(16, 16, dtype=torch.float64))
    calibration = windows(1, 4)
    (linear,) = linears(model, "mlp.inner")
    batch = (calibration.input_ids, None, calibration.counted)
    squares = [
        sum(output_gradient(model, linear.module, batch, (0, t), call).square().mean() for call in (0, 1))
        for t in range(4)
    ]
    wanted = torch.stack([torch.as_tensor(square) for square in squares])
    found = token_weights(model, [linear], calibration)[linear.name]
    torch.testing.assert_close(found[0, 0], wanted / wanted.mean(), **CLOSE)


class Routed(nn.Module):
    """An MLP that lets only every other token through its linear."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = x.clone()
        out[:, ::2] = self.inner(x[:, ::2])
        return out


def test_a_linear_that_sees_only_some_tokens_is_refused(tmp_path: Path) -> None:
    model = make_single(tmp_path / "m")
    model.model.layers[1].mlp = Routed(nn.Linear(16, 16))
    with pytest.raises(SpecError, match=r"layers\.1\.mlp\.inner: gets 12 tokens of 21; .* leave it out"):
        token_weights(model, linears(model, "mlp.inner"), windows())


def test_rows_that_do_not_matter_weigh_all_tokens_alike(tmp_path: Path) -> None:
    model = make_single(tmp_path / "m")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, :12] = 0
    calibration = padded()
    (linear,) = linears(model, "0.mlp.up_proj")
    found = token_weights(model, [linear], calibration, groups=2)[linear.name]
    assert calibration.attention_mask is not None
    assert torch.equal(found[0], calibration.attention_mask.float())
    assert found[1].max() > 1.1


def test_gradients_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model = make_single(tmp_path / "m")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("inf")
    with pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.up_proj: gradients of the end loss are NaN or infin"):
        token_weights(model, linears(model, "0.mlp.up_proj"), windows())


@pytest.mark.parametrize("groups", [0, 5])
def test_senseless_groups_are_refused(model: PreTrainedModel, groups: int) -> None:
    with pytest.raises(SpecError, match=rf"q_proj: {groups} groups of 16 output rows; use 1 to 4"):
        token_weights(model, linears(model), windows(), groups=groups)


def test_no_prediction_that_counts_is_an_error(model: PreTrainedModel) -> None:
    with pytest.raises(CalibrationError, match="no token has a next one to predict"):
        token_weights(model, linears(model), windows(3, 1))


@pytest.mark.parametrize(("n", "groups"), [(8, 1), (8, 4), (10, 4), (3, 3), (7, 2)])
def test_groups_of_rows_are_contiguous_and_even(n: int, groups: int) -> None:
    sizes = group_rows(n, groups, "x")
    assert (len(sizes), sum(sizes)) == (groups, n)
    assert max(sizes) - min(sizes) <= 1


# ----------------------------------------------------------------------------------------------------------------------


def test_drawn_tokens_follow_the_prediction() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = _draw(probabilities.log().expand(4, 5000, 4), seed=0)
    shares = drawn.flatten().bincount(minlength=4) / drawn.numel()
    # 20 000 draws: a standard deviation is at most 0.0036
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=0.015)
    assert shares[1] == 0
    assert not torch.equal(drawn[0], drawn[1])


def test_drawn_tokens_belong_to_their_window() -> None:
    logits = torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_draw(logits, seed=3)[2:], _draw(logits[2:], seed=5))


def test_the_drawn_loss_depends_on_the_seed_only(model: PreTrainedModel) -> None:
    (linear,) = linears(model, "1.mlp.up_proj")
    first, again, other, nll = (
        token_weights(model, [linear], windows(), loss=loss, seed=seed)[linear.name]
        for loss, seed in (("self", 0), ("self", 0), ("self", 9), ("nll", 0))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, nll)


# ----------------------------------------------------------------------------------------------------------------------


def hessian(x: Tensor, weights: Tensor | None) -> Tensor:
    total = HessianSum(x.shape[-1], CPU)
    total.add_(x, weights=weights)
    return total.mean("x")


def test_weighted_hessians_are_positive_semidefinite_and_plain_at_weight_one(model: PreTrainedModel) -> None:
    chosen = linears(model, "0.mlp.gate_proj")
    calibration = windows(4, 16)
    weights = token_weights(model, chosen, calibration, groups=4)[chosen[0].name]
    x = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))
    for group in weights:
        h = hessian(x, group)
        values = torch.linalg.eigvalsh(h.double())
        assert torch.equal(h, h.T)
        # 64 tokens are summed in float32: each entry is off by at most 64 roundings of the largest
        assert values[0] >= -64 * 2.0**-24 * values[-1]
    assert torch.equal(hessian(x, torch.ones(4, 16)), hessian(x, None))


def test_the_heaviest_tokens_are_limited_to_a_quantile() -> None:
    weight = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 90.0, 0.0]], [[6.0, 6.0, 6.0], [6.0, 6.0, 0.0]]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = winsorize({"x": weight}, 0.8, mask)["x"]
    assert torch.equal(found[0], torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 0.0]]) / 2.8)
    assert torch.equal(found[1], mask.float())
    # the quantile is one of the tokens that count: with the sixth in, it would be 2
    assert torch.equal(winsorize({"x": weight}, 0.5, mask)["x"][0, 0], torch.tensor([1.0, 2.0, 3.0]) / 2.4)
    assert winsorize({"x": weight}, 0.8, None)["x"][0].max() == torch.tensor(6 * 4 / 14)


def test_a_quantile_of_one_limits_nothing(model: PreTrainedModel) -> None:
    calibration = padded()
    weights = token_weights(model, linears(model), calibration, groups=2)
    for name, found in winsorize(weights, 1.0, calibration.attention_mask).items():
        torch.testing.assert_close(found, weights[name])
    for found in winsorize(weights, 0.7, calibration.attention_mask).values():
        torch.testing.assert_close(found.sum(dim=(1, 2)) / calibration.tokens, torch.ones(2))


def test_the_few_tokens_that_matter_are_not_limited_to_nothing() -> None:
    weight = torch.tensor([[[0.0, 0.0, 0.0, 4.0]]])
    assert torch.equal(winsorize({"x": weight}, 0.5, None)["x"], weight)


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_senseless_quantiles_are_refused(share: float) -> None:
    with pytest.raises(SpecError, match="use a number above 0 and up to 1"):
        winsorize({}, share, None)
