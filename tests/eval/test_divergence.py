import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmq.errors import LlmqError, SpecError
from llmq_eval.divergence import DivergenceResult, divergence
from llmq_eval.perplexity import PerplexityResult, perplexity
from llmq_eval.windows import Windows


def test_divergence_equals_brute_force(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    original, packed = tiny_llama(0), tiny_llama(1)
    found = divergence(original, packed, windows)
    kls, agreements = [], []
    with torch.no_grad():
        for window in windows:
            p, q = (m(window[None, :-1]).logits[0].double().softmax(-1) for m in (original, packed))
            kls.append((p * (p / q).log()).sum(-1).mean().item())
            agreements.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.window_kls == pytest.approx(kls, rel=1e-5)
    assert found.kl == pytest.approx(sum(kls) / 4, rel=1e-5)
    assert found.window_agreements == pytest.approx(agreements)
    assert found.agreement == pytest.approx(sum(agreements) / 4)


def test_kl_is_that_of_the_referee(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    # the formula of an independent evaluation script, written as it is there
    orig, model = tiny_llama(0), tiny_llama(1)
    kl = 0.0
    with torch.no_grad():
        for w in windows:
            lp, lb = (m(w[None, :-1]).logits[0].float().log_softmax(-1) for m in (model, orig))
            kl += (lb.exp() * (lb - lp)).sum(-1).mean().item()
    assert divergence(orig, model, windows).kl == pytest.approx(kl / 4, rel=1e-6)


def test_both_perplexities_are_those_of_the_models_alone(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    original, packed = tiny_llama(0), tiny_llama(1)
    found = divergence(original, packed, windows)
    assert found.original == perplexity(original, windows)
    assert found.packed == perplexity(packed, windows)
    assert found.ppl_ratio == pytest.approx(found.packed.ppl / found.original.ppl)


def test_a_model_does_not_diverge_from_itself(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    model = tiny_llama(0)
    found = divergence(model, model, windows)
    assert (found.kl, found.agreement, found.ppl_ratio) == (0.0, 1.0, 1.0)
    assert found.kl_interval == (0.0, 0.0)
    assert found.ppl_ratio_interval == (1.0, 1.0)


@pytest.mark.parametrize("seed", range(1, 5))
def test_kl_is_positive_and_has_a_direction(tiny_llama: Callable[..., Any], windows: Windows, seed: int) -> None:
    original, packed = tiny_llama(0), tiny_llama(seed)
    forward, backward = divergence(original, packed, windows), divergence(packed, original, windows)
    assert min(forward.window_kls + backward.window_kls) > 0
    assert forward.kl != pytest.approx(backward.kl, rel=1e-3)


def test_kl_grows_with_the_damage(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    original = tiny_llama(0)
    kls = []
    for noise in (0.001, 0.01, 0.1):
        packed = tiny_llama(0)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in packed.parameters():
                parameter += noise * torch.randn_like(parameter)
        kls.append(divergence(original, packed, windows).kl)
    assert 0 < kls[0] < kls[1] < kls[2]


def hand_made(n: int) -> DivergenceResult:
    before = PerplexityResult(2.0, (1.0, 2.0, 2.0, 3.0)[:n], 4)
    after = PerplexityResult(2.5, (1.5, 2.25, 2.75, 3.5)[:n], 4)
    return DivergenceResult(before, after, (2.0, 4.0, 6.0, 8.0)[:n], (1.0, 0.5, 1.0, 0.5)[:n])


def test_intervals_are_of_paired_windows() -> None:
    found = hand_made(4)
    assert found.kl == 5
    assert found.kl_interval == pytest.approx((5 - 4.10845, 5 + 4.10845), abs=1e-4)
    # sd of (1, .5, 1, .5) is sqrt(1/12); margin 3.1824 * 0.288675 / 2
    assert found.agreement_interval == pytest.approx((0.75 - 0.45934, 0.75 + 0.45934), abs=1e-4)
    # differences .5, .25, .75, .5: mean .5, sd sqrt(1/24); the spread of the windows themselves is far larger
    margin = 3.1824 * math.sqrt(1 / 24) / 2
    expected = (math.exp(0.5 - margin), math.exp(0.5 + margin))
    assert found.ppl_ratio == pytest.approx(math.exp(0.5))
    assert found.ppl_ratio_interval == pytest.approx(expected, abs=1e-4)


def test_one_window_has_no_intervals() -> None:
    found = hand_made(1).to_dict()
    assert all(value is None for name, value in found.items() if name.endswith("_interval"))
    assert json.loads(json.dumps(found))["kl"] == 2


def test_models_of_different_vocabularies_are_refused(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    with pytest.raises(SpecError, match="the original predicts 64 tokens and the packed model 72"):
        divergence(tiny_llama(0), tiny_llama(0, vocab_size=72), windows)


def test_nan_in_the_packed_model_is_an_error(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    packed = tiny_llama(0)
    with torch.no_grad():
        packed.lm_head.weight[3] = math.nan
    with pytest.raises(LlmqError, match="window 0"):
        divergence(tiny_llama(0), packed, windows)
