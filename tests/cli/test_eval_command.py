import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmq.cli.eval import eval_command
from llmq.errors import CheckpointError, LlmqError, SpecError


def brute_force(folder: Path, text: Path, seq_len: int, count: int) -> torch.Tensor:
    """Return log probabilities, float64 [windows, seq_len, V], of a dense model on evenly spread windows."""
    ids = torch.tensor([int(word[1:]) for word in text.read_text(encoding="utf-8").split()])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stride = (len(ids) - 1) // count
    windows = torch.stack([ids[i * stride : i * stride + seq_len + 1] for i in range(count)])
    with torch.no_grad():
        logp = torch.stack([model(w[None, :-1]).logits[0].double().log_softmax(-1) for w in windows])
    return torch.cat([logp, windows[:, 1:, None].double()], dim=-1)


def nll(found: torch.Tensor) -> float:
    return -found[..., :-1].gather(-1, found[..., -1:].long()).mean().item()


def test_json_has_perplexities_divergence_and_protocol(
    invoke: Callable[..., Any], dense_folder: Callable[[int], Path], text_file: Path
) -> None:
    original, packed = dense_folder(0), dense_folder(1)
    arguments = ("--text", text_file, "--seq-len", 40, "--windows", 5, "--spread", "--json")
    found = json.loads(invoke(eval_command, packed, "--against", original, *arguments).stdout)
    before, after = (brute_force(folder, text_file, 40, 5) for folder in (original, packed))
    p, q = before[..., :-1], after[..., :-1]
    assert found["original"]["ppl"] == pytest.approx(math.exp(nll(before)), rel=1e-5)
    assert found["packed"]["ppl"] == pytest.approx(math.exp(nll(after)), rel=1e-5)
    assert found["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert found["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found["kl_interval"][0] < found["kl"] < found["kl_interval"][1]
    size = (packed / "model.safetensors").stat().st_size
    assert found["size"] == {"original": size, "packed": size, "ratio": 1.0}
    protocol = found["protocol"]
    assert protocol.pop("versions").keys() >= {"llmq", "torch", "transformers"}
    assert protocol == {
        "text": str(text_file),
        "text_tokens": 501,
        "tokens_scored": 200,
        "windows": 5,
        "seq_len": 40,
        "stride": 100,
        "bos": False,
        "dtype": "float32",
        "device": "cpu",
    }


def test_without_original_only_perplexity_is_measured(
    invoke: Callable[..., Any], dense_folder: Callable[[int], Path], text_file: Path
) -> None:
    folder = dense_folder(0)
    found = json.loads(invoke(eval_command, folder, "--text", text_file, "--seq-len", 50, "--json").stdout)
    assert found["ppl"] == pytest.approx(math.exp(nll(brute_force(folder, text_file, 50, 10))), rel=1e-5)
    assert "kl" not in found


def test_a_model_against_itself_shows_no_loss(
    invoke: Callable[..., Any], dense_folder: Callable[[int], Path], text_file: Path
) -> None:
    folder = dense_folder(0)
    arguments = ("--text", text_file, "--against", folder, "--seq-len", 40, "--windows", 3, "--spread")
    result = invoke(eval_command, folder, *arguments)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "KL per token, nats 0.00000 (0.00000 to 0.00000)" in lines
    assert "top-1 agreement 1.0000 (1.0000 to 1.0000)" in lines
    assert any(line.startswith("perplexity ") and line.endswith("x 1.0000 (1.0000 to 1.0000)") for line in lines)
    assert any(line.startswith("weights on disk ") and line.endswith("1.00 times smaller") for line in lines)
    assert "scored 120 tokens: 3 windows of 40" in lines
    assert "stride 166 tokens" in lines
    assert "computed in float32 on cpu" in lines


def test_the_tokenizer_is_that_of_the_original(
    invoke: Callable[..., Any],
    dense_folder: Callable[[int], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((dense_folder(1) / name).read_bytes())
    arguments = ("--text", text_file, "--seq-len", 50, "--windows", 1, "--json")
    assert invoke(eval_command, tmp_path, "--against", dense_folder(0), *arguments).exit_code == 0
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        invoke(eval_command, tmp_path, *arguments)


def test_one_window_has_no_interval(
    invoke: Callable[..., Any], dense_folder: Callable[[int], Path], text_file: Path
) -> None:
    arguments = ("--text", text_file, "--seq-len", 50, "--windows", 1, "--json")
    found = json.loads(invoke(eval_command, dense_folder(1), "--against", dense_folder(0), *arguments).stdout)
    assert found["kl_interval"] is None
    assert found["ppl_ratio_interval"] is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--text", "missing.txt"), SpecError, r"missing\.txt: cannot be read"),
        (("--seq-len", 501), SpecError, "501 tokens are too few for one window of 501, which needs 502"),
        (("--dtype", "int4"), SpecError, "--dtype int4: expected one of float32, float16, bfloat16"),
        (("--device", "abacus"), SpecError, "--device abacus: no such device"),
        (("--device", "cuda:99"), SpecError, "--device cuda:99: torch sees"),
        (("--against", "./missing"), CheckpointError, "missing: no such folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_arguments_are_refused(
    invoke: Callable[..., Any],
    dense_folder: Callable[[int], Path],
    text_file: Path,
    arguments: tuple[object, ...],
    error: type[LlmqError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        invoke(eval_command, dense_folder(0), "--text", text_file, *arguments)


def test_a_folder_without_config_is_refused(invoke: Callable[..., Any], text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        invoke(eval_command, tmp_path, "--text", text_file)


def test_text_is_required(invoke: Callable[..., Any], dense_folder: Callable[[int], Path]) -> None:
    result = invoke(eval_command, dense_folder(0))
    assert result.exit_code == 2
    assert "--text" in result.stderr
