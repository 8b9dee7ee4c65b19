"""``llmq quantize`` with every stage on: what is written, what is reported, and that both are the same every time."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import SMALL, assert_fails, llmq
from safetensors.torch import load_file
from tiny_models import LLAMA, make_llama, make_model, make_text
from torch import Tensor
from transformers import LlamaConfig

import llmq as package
from llmq.nn import QuantLinear

SMALLER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
STAGES = ("--bits", 3, "--asym", "--tune-steps", 4, "--tune-epochs", 3, "--guidance-groups", 2, "--shift", 0.5)


@pytest.fixture(scope="module", autouse=True)
def small_steps() -> Iterator[None]:
    """Let gradient steps see two windows, so that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmq.run.TOKENS_PER_STEP", 128)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a bfloat16 `model`, `text.txt`, and `packed`: the model after all stages."""
    folder = tmp_path_factory.mktemp("made")
    make_text(folder / "text.txt", 2000)
    make_model(folder / "model", LlamaConfig(**{**LLAMA, **SMALLER}), dtype=torch.bfloat16)
    quantize(folder, folder / "packed")
    return folder


def quantize(made: Path, output: Path, *options: object, source: Path | None = None) -> dict:
    """Quantize the model with all stages, expect success, and return the report."""
    options = (*SMALL, *STAGES, "--calibration", made / "text.txt", "--num-samples", 20, *options)
    result = llmq("quantize", source or made / "model", "--output", output, *options)
    assert result.exit_code == 0, result.stderr
    return json.loads((output / "report.json").read_text(encoding="utf-8"))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_result_is_an_ordinary_packed_checkpoint(made: Path) -> None:
    model = package.load(made / "packed")
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
    result = llmq("eval", made / "packed", "--text", made / "text.txt", "--seq-len", 64, "--against", made / "model")
    assert result.exit_code == 0, result.stderr


def test_norms_are_tuned_in_their_dtype_and_all_else_dense_is_as_it_was(made: Path) -> None:
    source, packed = tensors(made / "model"), tensors(made / "packed")
    report = json.loads((made / "packed" / "report.json").read_text(encoding="utf-8"))
    norms = {name for name in source if name.endswith("norm.weight")}
    assert len(norms) == 5
    assert set(report["dense"]["rewritten"]) == norms
    for name, tensor in source.items():
        if name.endswith("_proj.weight"):
            assert name not in packed
            continue
        assert packed[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(packed[name], tensor) == (name not in norms), name


def test_the_report_has_what_was_tuned_and_what_it_brought(made: Path) -> None:
    report = json.loads((made / "packed" / "report.json").read_text(encoding="utf-8"))
    assert [entry["what"] for entry in report["tuning"]] == ["model.layers.0", "model.layers.1", "model"]
    assert [entry["steps"] for entry in report["tuning"]] == [4, 4, 27]  # three times 18 windows in batches of two
    for entry in report["tuning"]:
        assert 0 < entry["held_out_after"] <= entry["held_out_before"]
        assert 0 <= entry["kept_step"] <= entry["steps"]
    assert report["tuning"][-1]["kept_step"] > 0
    assert {"guidance", "tune blocks", "tune model"} <= set(report["seconds"])
    assert len(report["layers"]) == 14
    for layer in report["layers"]:
        assert 0 < layer["held_out_loss"] < 0.2
        assert set(layer["undone"]) <= {"refinement", "shift"}
    recipe = report["recipe"]
    assert (recipe["tune_steps"], recipe["tune_epochs"], recipe["guidance_groups"], recipe["shift"]) == (4, 3, 2, 0.5)


def test_two_runs_give_the_same_bytes_and_every_stage_counts(made: Path, tmp_path: Path) -> None:
    first = tensors(made / "packed")
    quantize(made, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (made / "packed" / name).read_bytes()
    for option in ("--tune-steps", "--tune-epochs", "--guidance-groups", "--shift"):
        quantize(made, tmp_path / option, option, 0)
        other = tensors(tmp_path / option)
        assert other.keys() == first.keys()
        assert not all(torch.equal(other[name], first[name]) for name in first), option


def test_the_divergence_of_the_report_is_that_of_the_files(made: Path) -> None:
    """The packed model, loaded and run on the held-out windows, is as far from the original as the report says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmq.calibration import load_calibration, split_held_out

    report = json.loads((made / "packed" / "report.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    whole = load_calibration(str(made / "text.txt"), tokenizer, num_samples=20, seq_len=64, seed=0)
    held_out = split_held_out(whole, 0.1, 0)[1]
    assert held_out is not None
    original = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.bfloat16)
    packed = package.load(made / "packed")
    with torch.no_grad():
        p, q = (net(held_out.input_ids).logits.double().log_softmax(-1) for net in (original, packed))
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    # both ran in bfloat16, and the packed layers multiply in another order
    assert divergence == pytest.approx(report["tuning"][-1]["held_out_after"], rel=0.02)


def test_layers_that_stay_dense_are_not_tuned(made: Path, tmp_path: Path) -> None:
    quantize(made, tmp_path / "out", "--ignore", "o_proj", "--ignore", r"layers\.1\.")
    source, packed = tensors(made / "model"), tensors(tmp_path / "out")
    kept = [name for name in source if "o_proj" in name or ("layers.1." in name and "_proj" in name)]
    assert len(kept) == 8
    assert all(torch.equal(packed[name], source[name]) for name in kept)


def test_tied_embeddings_stay_tied_and_as_they_were(made: Path, tmp_path: Path) -> None:
    make_llama(tmp_path / "tied", tie_word_embeddings=True, **SMALLER)
    quantize(made, tmp_path / "out", source=tmp_path / "tied")
    source, packed = tensors(tmp_path / "tied"), tensors(tmp_path / "out")
    assert "lm_head.weight" not in source.keys() | packed.keys()
    assert torch.equal(packed["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    model = package.load(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("option", ["--tune-steps", "--tune-epochs"])
def test_tuning_what_needs_no_data_is_refused(option: str, made: Path, tmp_path: Path) -> None:
    options = ("--output", tmp_path / "out", *SMALL, "--method", "rtn", option, 2)
    result = llmq("quantize", made / "model", *options, "--calibration", made / "text.txt")
    assert_fails(result.exit_code, result.stdout, result.stderr, "rtn", expected=2)


# --- answers only


def conversations(path: Path, *, answer: int = 0) -> Path:
    """Write 30 conversations of which prompts are the same for every `answer`, and answers are others for each."""
    prompts, answers = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + answer)

    def words(generator: torch.Generator) -> str:
        return " ".join(f"w{i}" for i in torch.randint(1, 128, (24,), generator=generator).tolist())

    rows = [{"prompt": words(prompts), "response": words(answers)} for _ in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_only_what_predicts_answers_counts(made: Path, tmp_path: Path) -> None:
    data = conversations(tmp_path / "chats.jsonl")
    options = (*SMALL, "--calibration", data, "--num-samples", 30, "--response-only")
    result = llmq("quantize", made / "model", "--output", tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert (report["calibration"]["samples"], report["calibration"]["held_out_samples"]) == (30, 3)
    # 24 words of answer are predicted at 24 places, from the last of the prompt on
    assert {layer["tokens"] for layer in report["layers"]} == {27 * 24}
    package.load(tmp_path / "out")


def test_all_stages_take_answers_only(made: Path, tmp_path: Path) -> None:
    data = conversations(tmp_path / "chats.jsonl")
    report = quantize(made, tmp_path / "out", "--calibration", data, "--num-samples", 30, "--response-only")
    assert len(report["tuning"]) == 3
    shutil.rmtree(tmp_path / "out")
