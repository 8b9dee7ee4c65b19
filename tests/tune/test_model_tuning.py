"""End-to-end tuning: the divergence it reports is the true one, never rises, and only scales and vectors have moved."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM, PreTrainedModel
from tune_cases import Case, assert_on_grid, gpt2, llama, make_case, padded, windows

from llmq.calibration import split_held_out
from llmq.tune.model import Model, ModelRates, _Task, tune_model
from llmq.tune.tunable import TunableLinear
from llmq.types import QuantizedWeight

RATES = ModelRates(epochs=3, scales=0.01, vectors=0.01)


def to_be_tuned(case: Case, stored_dtype: torch.dtype = torch.float32) -> Model:
    """Return the model of `case` with its linears replaced."""
    layers = {name: TunableLinear(linear, q) for block in case.layers for name, (linear, _, q) in block.items()}
    case.replace_all(layers)
    return Model(case.net, case.structure, layers, stored_dtype)


def starts(case: Case) -> dict[str, QuantizedWeight]:
    return {name: q for block in case.layers for name, (_, _, q) in block.items()}


def dense(case: Case, weights: dict[str, QuantizedWeight], vectors: dict[str, Tensor]) -> PreTrainedModel:
    """Return the original model with these weights and vectors in it."""
    net = copy.deepcopy(case.original)
    with torch.no_grad():
        for name, q in weights.items():
            module = net.get_submodule(name)
            assert isinstance(module.weight, Tensor)
            module.weight.copy_(q.dequantize() if isinstance(module, nn.Linear) else q.dequantize().T)
        for name, vector in vectors.items():
            net.get_parameter(name).copy_(vector)
    return net


@torch.no_grad()
def divergence(case: Case, student: PreTrainedModel, *, held_out: bool = True) -> float:
    """Return the mean over batches of the mean KL(original ‖ student) over valid tokens, by whole forward passes."""
    found = []
    for batch in case.stream.batches:
        if batch.held_out != held_out:
            continue
        valid = torch.ones_like(batch.ids, dtype=torch.bool) if batch.valid is None else batch.valid
        mask = None if batch.valid is None else batch.valid.long()
        p, q = (
            net(input_ids=batch.ids, attention_mask=mask).logits[valid].double().log_softmax(-1)
            for net in (case.original, student)
        )
        found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return sum(found) / len(found)


def vectors_of(net: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters() if p.ndim == 1}


@pytest.mark.parametrize("make", ["llama", "tied", "gpt2"])
def test_the_divergence_falls_and_the_report_is_true(make: str) -> None:
    net = gpt2() if make == "gpt2" else llama(tie_word_embeddings=make == "tied")
    case = make_case(net, calibration=windows(12), held_out=windows(3, seed=1))
    before = divergence(case, dense(case, starts(case), {}))
    model = to_be_tuned(case)
    end = case.end()
    found, report = tune_model(model, case.stream, end, RATES)
    assert (report.what, report.steps) == ("model", 18)
    assert report.kept_step in (6, 12, 18)
    assert report.held_out_before == pytest.approx(before, rel=1e-4)
    after = divergence(case, dense(case, found, {name: p.detach() for name, p in model.vectors.items()}))
    assert report.held_out_after == pytest.approx(after, rel=1e-4)
    assert after < 0.9 * before
    for name, q in starts(case).items():
        assert_on_grid(found[name])
        assert torch.equal(found[name].codes, q.codes)
        assert torch.equal(found[name].zeros, q.zeros)
        assert not torch.equal(found[name].scales, q.scales)
    # what is left in the model is what is returned
    with torch.no_grad():
        for name, layer in model.layers.items():
            torch.testing.assert_close(layer.weight(), found[name].dequantize(), rtol=1e-6, atol=0)
    original = dict(case.original.named_parameters())
    for name, p in case.net.named_parameters():
        if name in model.vectors:
            assert not torch.equal(p, original[name]), f"{name} has not moved"
        elif name in original:
            assert torch.equal(p, original[name]), name


def test_the_teacher_is_the_original_although_norms_are_tuned() -> None:
    """With steps as large as these a teacher that moves along is as far off as the student."""
    case = make_case(bits=8, calibration=windows(2), held_out=windows(2, seed=1))
    model = to_be_tuned(case)
    end = case.end()
    task = _Task(model, case.stream, end)
    before = task.held_out_loss()
    with torch.no_grad():
        for vector in model.vectors.values():
            vector.mul_(1.5)
    tuned = {name: p.detach().clone() for name, p in model.vectors.items()}
    assert task.held_out_loss() == pytest.approx(divergence(case, dense(case, starts(case), tuned)), rel=1e-4)
    assert task.held_out_loss() > 10 * before
    for name, vector in model.vectors.items():
        assert torch.equal(vector, tuned[name]), "put back"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("scales", "vectors"), [(0.3, 0.0), (0.0, 1.0), (1e6, 1e-3), (1e-3, 1e30), (0.05, 0.05)])
def test_no_learning_rate_makes_it_worse(seed: int, scales: float, vectors: float) -> None:
    case = make_case(calibration=windows(4, seed=seed), held_out=windows(2, seed=9))
    model, start, norms = to_be_tuned(case), starts(case), vectors_of(case.original)
    found, report = tune_model(model, case.stream, case.end(), ModelRates(2, scales, vectors), seed)
    assert report.held_out_after <= report.held_out_before
    after = divergence(case, dense(case, found, {name: p.detach() for name, p in model.vectors.items()}))
    assert after == pytest.approx(report.held_out_after, rel=1e-4)
    if report.kept_step == 0:
        assert all(torch.equal(found[name].scales, q.scales) for name, q in start.items())
        assert all(torch.equal(p, norms[name]) for name, p in model.vectors.items())


def test_inputs_that_are_not_finite_leave_the_start() -> None:
    case = make_case(held_out=windows(2, seed=1))
    model = to_be_tuned(case)
    case.stream.hidden[0] = case.stream.hidden[0].clone().fill_(float("nan"))
    found, report = tune_model(model, case.stream, case.end(), RATES)
    assert report.kept_step == 0
    assert math.isfinite(report.held_out_after)
    assert all(torch.equal(found[name].scales, q.scales) for name, q in starts(case).items())


def test_no_epochs_change_nothing() -> None:
    case = make_case(held_out=windows(2, seed=1))
    model = to_be_tuned(case)
    found, report = tune_model(model, case.stream, case.end(), replace(RATES, epochs=0))
    assert (report.steps, report.kept_step) == (0, 0)
    assert report.held_out_before == report.held_out_after > 0
    assert all(torch.equal(found[name].scales, q.scales) for name, q in starts(case).items())
    norms = vectors_of(case.original)
    assert all(torch.equal(p, norms[name]) for name, p in model.vectors.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_are_what_files_of_their_dtype_hold(dtype: torch.dtype) -> None:
    case = make_case(calibration=windows(8), held_out=windows(2, seed=1))
    model = to_be_tuned(case, dtype)
    _, report = tune_model(model, case.stream, case.end(), RATES)
    assert report.kept_step > 0
    original = vectors_of(case.original)
    for name, vector in model.vectors.items():
        assert vector.dtype == torch.float32
        assert torch.equal(vector, vector.to(dtype).float())
        assert not torch.equal(vector, original[name])


def test_small_steps_of_a_model_in_sixteen_bits_add_up() -> None:
    case = make_case(llama().bfloat16(), calibration=windows(32), held_out=windows(4, seed=1))
    model, original = to_be_tuned(case, torch.bfloat16), vectors_of(case.original)
    # 16 steps of 0.1 % are up to 1.6 %; one alone is a quarter of the last bit, or less
    _, report = tune_model(model, case.stream, case.end(), ModelRates(2, scales=0.0, vectors=0.001))
    assert report.kept_step > 0
    assert report.held_out_after < report.held_out_before
    for name, vector in model.vectors.items():
        assert vector.dtype == torch.bfloat16
        assert not torch.equal(vector, original[name])


def test_every_step_sees_where_the_last_one_led(monkeypatch: pytest.MonkeyPatch) -> None:
    case, seen = make_case(calibration=windows(8)), []
    model, loss = to_be_tuned(case), _Task.loss

    def watched(task: _Task, batch: int) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(model.vectors["model.norm.weight"].detach().clone())
        return loss(task, batch)

    monkeypatch.setattr(_Task, "loss", watched)
    tune_model(model, case.stream, case.end(), replace(RATES, epochs=1))
    assert len(seen) == 4
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_the_seed_decides() -> None:
    def tuned(seed: int) -> list[Tensor]:
        case = make_case(calibration=windows(8))
        found, _ = tune_model(to_be_tuned(case), case.stream, case.end(), replace(RATES, epochs=1), seed)
        return [q.scales for q in found.values()]

    first, again, other = tuned(0), tuned(0), tuned(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_held_out_windows_train_nothing() -> None:
    def tuned(seed: int) -> tuple[list[Tensor], float]:
        case = make_case(calibration=windows(8), held_out=windows(2, seed=seed))
        found, report = tune_model(to_be_tuned(case), case.stream, case.end(), replace(RATES, epochs=1))
        assert report.steps == report.kept_step == 4
        return [q.scales for q in found.values()], report.held_out_after

    (a, loss_a), (b, loss_b) = tuned(1), tuned(2)
    assert loss_a != loss_b
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_padding_counts_nothing() -> None:
    def tuned(noise: float) -> tuple[list[Tensor], float]:
        train, held_out = split_held_out(padded(), 0.4, 0)
        case = make_case(calibration=train, held_out=held_out)
        model, end = to_be_tuned(case), case.end()
        for hidden, batch in zip(end, case.stream.batches, strict=True):
            assert batch.valid is not None
            hidden[~batch.valid] += noise
        found, report = tune_model(model, case.stream, end, RATES)
        after = divergence(case, dense(case, found, {name: p.detach() for name, p in model.vectors.items()}))
        assert report.held_out_after == pytest.approx(after, rel=1e-4)
        return [q.scales for q in found.values()], report.held_out_after

    (a, loss_a), (b, loss_b) = tuned(0.0), tuned(100.0)
    assert loss_a == loss_b
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_only_answers_are_predicted_where_they_alone_count() -> None:
    def tuned(noise: float) -> tuple[list[Tensor], float]:
        mask = torch.arange(16).expand(6, 16) % 3 == 0
        train, held_out = split_held_out(replace(windows(6), loss_mask=mask), 0.4, 0)
        case = make_case(calibration=train, held_out=held_out)
        model, end = to_be_tuned(case), case.end()
        for hidden in end:
            hidden[:, 1::3] += noise
        found, report = tune_model(model, case.stream, end, RATES)
        return [q.scales for q in found.values()], report.held_out_after

    (a, loss_a), (b, loss_b) = tuned(0.0), tuned(100.0)
    assert loss_a == loss_b
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_without_held_out_windows_those_trained_on_judge() -> None:
    case = make_case()
    before = divergence(case, dense(case, starts(case), {}), held_out=False)
    _, report = tune_model(to_be_tuned(case), case.stream, case.end(), RATES)
    assert report.held_out_before == pytest.approx(before, rel=1e-4)
    assert report.held_out_after < report.held_out_before


def test_biases_of_the_linears_are_tuned_and_the_heads_are_not() -> None:
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    net = PhiForCausalLM(config).eval()
    case = make_case(net, calibration=windows(8), held_out=windows(2, seed=1))
    original = vectors_of(case.original)
    model = to_be_tuned(case)
    assert original.keys() - model.vectors.keys() == {"lm_head.bias"}
    assert "model.layers.0.self_attn.q_proj.bias" in model.vectors
    assert float(original["model.layers.0.self_attn.q_proj.bias"].abs().max()) == 0  # as they are made
    _, report = tune_model(model, case.stream, case.end(), RATES)
    assert report.kept_step > 0
    for name, vector in model.vectors.items():
        assert not torch.equal(vector, original[name]), name
    assert torch.equal(net.lm_head.bias, original["lm_head.bias"])


def test_gradients_of_earlier_work_do_not_count() -> None:
    def tuned(stale: bool) -> Tensor:
        case = make_case(calibration=windows(4))
        model = to_be_tuned(case)
        if stale:
            for parameter in case.net.parameters():
                parameter.requires_grad_(True)
                parameter.grad = 1e3 * torch.ones_like(parameter)
        tune_model(model, case.stream, case.end(), replace(RATES, epochs=1))
        return model.vectors["model.norm.weight"].detach()

    assert torch.equal(tuned(stale=False), tuned(stale=True))
