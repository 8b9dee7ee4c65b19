"""What is made of a loader's answer: exact, as good as its dtype, or a fault."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import WORDS, make_llama, make_tokenizer
from torch import Tensor
from transformers import AutoModelForMaskedLM, BertConfig
from verify_cases import pack

from llmq.checkpoint import CheckpointReader
from llmq.errors import CheckpointError, SpecError
from llmq.packed import PackedCheckpoint
from llmq.preflight import model_config
from llmq.verify.calling import Loader, Outcome
from llmq.verify.certificate import Answered, judged, verify
from llmq.verify.comparing import EXACT, Comparison
from llmq.verify.prompts import fixed_prompts
from llmq.verify.reference import logits, reference_model


@pytest.fixture(scope="module")
def ids(packed: Path) -> Tensor:
    return fixed_prompts(packed, model_config(CheckpointReader(packed))).ids


@pytest.fixture(scope="module")
def expected(packed: Path, ids: Tensor) -> Tensor:
    return logits(reference_model(PackedCheckpoint(packed)), ids)


def answer(packed: Path, ids: Tensor, expected: Tensor, outcome: Outcome) -> Answered:
    return judged(Loader("llmq"), outcome, PackedCheckpoint(packed), ids, expected, {"float32": 0.0})


def test_bfloat16_is_rounded_and_not_at_fault(packed: Path, ids: Tensor, expected: Tensor) -> None:
    there = logits(reference_model(PackedCheckpoint(packed), torch.bfloat16), ids)
    found = answer(packed, ids, expected, Outcome(logits=there, dtype="bfloat16"))
    assert found.comparison is not None
    assert found.comparison.relative == found.rounding
    assert found.rounding > EXACT
    assert (found.verdict, found.fault) == ("rounded", None)
    said = answer(packed, ids, expected, Outcome(logits=there, dtype="float32"))  # the same, without that excuse
    assert said.verdict == "differs"
    assert said.fault is not None
    assert said.fault.startswith("loader llmq: logits differ by up to ")


@pytest.mark.parametrize(
    ("relative", "rounding", "verdict"),
    [
        (EXACT, 0.0, "exact"),
        (EXACT * 1.01, 0.0, "differs"),
        (0.02, 0.01, "rounded"),
        (0.0201, 0.01, "differs"),
        (0.0001, 0.01, "exact"),
        (None, 0.01, "not finite"),
    ],
)
def test_where_the_lines_are(relative: float | None, rounding: float, verdict: str) -> None:
    numbers = Comparison(relative is not None, relative, relative, relative, 0.0, 1.0, 4)
    found = Answered("vllm", Outcome(), numbers, rounding)
    assert found.verdict == verdict
    assert (found.fault is None) == (verdict in ("exact", "rounded"))


def test_a_refusal_is_a_result(packed: Path, ids: Tensor, expected: Tensor) -> None:
    found = answer(packed, ids, expected, Outcome(refused="no", versions={"vllm": "1"}))
    assert (found.verdict, found.fault) == ("refused", None)
    assert found.to_dict() == {"loader": "llmq", "versions": {"vllm": "1"}, "loaded": False, "refused": "no"}
    broken = answer(packed, ids, expected, Outcome(logits=expected.new_full(expected.shape, float("nan"))))
    assert broken.fault == "loader llmq: some logits are not finite"


def test_a_certificate_tells_everything(dense: Path, packed: Path, ids: Tensor) -> None:
    told: list[str] = []
    found = verify(packed, dense, [], progress=told.append)
    assert told == ["account of tensors", "reference", "original"]
    assert found.faults == []
    reader = PackedCheckpoint(packed)
    content = found.certificate()
    assert content["original"] == dense.name
    assert [list(map(int, row.split())) for row in content["reference"]["prompts"]["ids"]] == ids.tolist()
    sizes = content["sizes"]
    inside = [key for layer in reader.layers.values() for key in layer.keys.values()]
    assert sizes["packed_bytes"] == sum(reader.info(key).nbytes for key in inside)
    assert sizes["packed_weights"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert sizes["bits_per_packed_weight"] == 8 * sizes["packed_bytes"] / sizes["packed_weights"]
    assert sizes["bits_per_packed_weight"] == 8 * sizes["bytes_per_packed_weight"]
    assert sizes["tensor_bytes"] == sum(reader.info(key).nbytes for key in reader)
    original = CheckpointReader(dense)
    assert sizes["original_tensor_bytes"] == sum(original.info(key).nbytes for key in original)
    broken = replace(found, account=replace(found.account, missing=["x"]))
    assert broken.faults == ["tensor x of the original is missing"]


def test_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(SpecError, match="llmq verify works on predictions of the next token"):
        verify(pack(tmp_path / "dense", tmp_path / "packed"), tmp_path / "dense", [])


def test_another_vocabulary_is_another_model(packed: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", vocab_size=192)
    with pytest.raises(CheckpointError, match="--against names the model that was quantized"):
        verify(packed, other, [])
