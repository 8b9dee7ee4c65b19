import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmq.errors import LlmqError, SpecError
from llmq_eval.perplexity import PerplexityResult, perplexity
from llmq_eval.windows import Windows, cut_windows


def naive_nlls(model: Any, windows: Windows) -> list[float]:
    """Return the mean NLL of each window, token by token in float64."""
    found = []
    for window in windows:
        logits = model(window[None, :-1]).logits[0].double()
        logp = [math.log(torch.softmax(row, 0)[token]) for row, token in zip(logits, window[1:], strict=True)]
        found.append(-sum(logp) / len(logp))
    return found


def test_perplexity_equals_brute_force(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    model = tiny_llama(0)
    found = perplexity(model, windows)
    with torch.no_grad():
        expected = naive_nlls(model, windows)
    assert found.window_nlls == pytest.approx(expected, rel=1e-6)
    assert found.nll == pytest.approx(sum(expected) / 4, rel=1e-6)
    assert found.ppl == pytest.approx(math.exp(sum(expected) / 4), rel=1e-5)
    assert found.tokens == 600


def test_perplexity_is_that_of_the_referee(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    # the formula of an independent evaluation script, written as it is there
    m, ids, seq = tiny_llama(1), windows.ids, windows.seq_len
    n = min(4, (len(ids) - 1) // seq)
    step = (len(ids) - 1) // n
    nll = 0.0
    with torch.no_grad():
        for i in range(n):
            w = ids[i * step : i * step + seq + 1]
            lp = m(w[None, :-1]).logits[0].float().log_softmax(-1)
            nll -= lp.gather(1, w[1:, None]).mean().item()
    assert perplexity(m, windows).ppl == pytest.approx(math.exp(nll / n), rel=1e-6)


def test_uniform_predictions_have_the_vocabulary_as_perplexity(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    windows = cut_windows(torch.arange(64), seq_len=21)
    assert perplexity(model, windows).ppl == pytest.approx(64, rel=1e-6)


def test_interval_is_of_the_windows() -> None:
    result = PerplexityResult(nll=5.0, window_nlls=(2.0, 4.0, 6.0, 8.0), tokens=4)
    low, high = result.ppl_interval or (math.nan, math.nan)
    assert low == pytest.approx(math.exp(5 - 4.10845), rel=1e-4)
    assert high == pytest.approx(math.exp(5 + 4.10845), rel=1e-4)
    assert json.loads(json.dumps(result.to_dict())) == {
        "ppl": math.exp(5),
        "ppl_interval": [low, high],
        "nll": 5.0,
        "tokens": 4,
    }
    assert PerplexityResult(nll=5.0, window_nlls=(5.0,), tokens=4).ppl_interval is None


def test_hopeless_predictions_do_not_overflow() -> None:
    result = PerplexityResult(nll=1000.0, window_nlls=(1000.0,), tokens=1)
    assert result.ppl == math.inf
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["ppl"] is None


def test_nan_is_an_error_with_the_window(tiny_llama: Callable[..., Any], windows: Windows) -> None:
    model = tiny_llama(0)
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(LlmqError, match="window 0: the model's log likelihood is nan"):
        perplexity(model, windows)


def test_tokens_of_another_model_are_refused(tiny_llama: Callable[..., Any]) -> None:
    windows = cut_windows(torch.full((9,), 64), seq_len=8)
    with pytest.raises(SpecError, match="token 64 is outside the model's vocabulary of 64"):
        perplexity(tiny_llama(0), windows)


def test_windows_longer_than_the_context_are_refused(tiny_llama: Callable[..., Any]) -> None:
    windows = cut_windows(torch.zeros(300, dtype=torch.int64), seq_len=257)
    with pytest.raises(SpecError, match="reads at most 256 tokens; lower --seq-len from 257"):
        perplexity(tiny_llama(0), windows)


def test_one_window_at_a_time(windows: Windows) -> None:
    shapes = []

    class Model:
        device = torch.device("cpu")
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            shapes.append(tuple(input_ids.shape))
            assert not use_cache
            assert not torch.is_grad_enabled()
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 64))

    perplexity(Model(), windows)  # type: ignore[arg-type]
    assert shapes == [(1, 150)] * 4


SCRIPT = Path(__file__).parents[2] / "eval" / "llmq_eval" / "perplexity.py"


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def folder(tiny_llama: Callable[..., Any], tmp_path: Path) -> Path:
    """Return the folder of a dense model whose tokenizer writes token 17 for "w17"."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    tiny_llama(0).save_pretrained(tmp_path)
    return tmp_path


def test_the_script_prints_what_the_function_returns(
    folder: Path,
    tiny_llama: Callable[..., Any],
    windows: Windows,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in windows.ids.tolist()), encoding="utf-8")
    arguments = (folder, "--text", text, "--seq-len", 150, "--windows", 4, "--spread")
    assert run_script(monkeypatch, *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    expected = perplexity(tiny_llama(0), windows)
    assert found["ppl"] == pytest.approx(expected.ppl, rel=1e-6)
    assert found["protocol"]["windows"] == 4
    assert run_script(monkeypatch, *arguments) == 0
    line = f"perplexity {expected.ppl:.4f} (4 windows of 150, stride 174)"
    assert capsys.readouterr().out.strip() == line


def test_the_script_ends_with_one_line_on_bad_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(monkeypatch, folder, "--text", folder / "missing.txt") == 2
    assert run_script(monkeypatch, folder / "missing", "--text", folder / "missing.txt") == 1
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(shown) == 2
    assert "cannot be read" in shown[0]
    assert "no such folder" in shown[1]
