"""Mixtures of experts quantized, packed, loaded, compared, saved again; and the ledger of their experts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import llmq as command
from moe_cases import CONFIGS, EXPERTS, FILE_NAMES, dequantized, make_moe, model_of, windows
from safetensors.torch import load_file, save_file
from tiny_models import make_text, make_tokenizer
from transformers import AutoModelForCausalLM

import llmq
from llmq.calibration import Calibration
from llmq.driver import quantize
from llmq.errors import CheckpointError, SpecError
from llmq.moe import banks_of
from llmq.nn import QuantLinear
from llmq.recipe import make_recipe
from llmq.report import STARVED, BankReport, Report

SMALL: dict[str, Any] = {"group_size": 32, "refine_rounds": 0, "scale_search": "none"}  # the fast part of default


def run(folder: Path, source: Path, calibration: Calibration | None = None, **fields: Any) -> Report:
    return quantize(source, folder, make_recipe({**SMALL, **fields}), calibration=calibration or windows())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def is_nearest(source: Path, module: torch.nn.Module, name: str) -> bool:
    """Return whether the codes of a linear of GPT-OSS are those nearest to its weight."""
    content = tensors(source)
    bank, _, rest = name.partition(".experts.")
    if rest:
        expert, _, local = rest.partition(".")
        fused = content[f"{bank}.experts.{'down_proj' if local == 'down_proj' else 'gate_up_proj'}"][int(expert)].T
        weight = {"down_proj": fused, "gate_proj": fused[::2], "up_proj": fused[1::2]}[local]
    else:
        weight = content[f"{name}.weight"]
    assert isinstance(module, QuantLinear)
    q = module.quantized_weight()
    scale, zero = (t.repeat_interleave(q.group_size, dim=1) for t in (q.scales, q.zeros))
    return torch.equal((weight / scale + zero).round().clamp(0, 15), q.codes.float())


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_experts_equal_their_dequantized_selves(name: str, tmp_path: Path) -> None:
    source = make_moe(tmp_path / "dense", name)
    report = run(tmp_path / "packed", source)
    made = json.loads((tmp_path / "packed/config.json").read_text(encoding="utf-8"))["quantization_config"]
    bank, gate, up, down = FILE_NAMES[name]
    tree = bank.replace("block_sparse_moe", "mlp")
    assert [f"{tree}.{e}.{p}" for e in range(EXPERTS) for p in (gate, up)] in made["modules_in_block_to_quantize"]
    assert [f"{tree}.{e}.{down}" for e in range(EXPERTS)] in made["modules_in_block_to_quantize"]
    # layers of four times fewer weights than tokens: far better than chance
    assert all(layer.relative_loss is not None and layer.relative_loss < 0.06 for layer in report.layers)
    stored = tensors(tmp_path / "packed")
    router = "router" if name == "gpt_oss" else "gate"
    assert torch.equal(
        stored[f"model.layers.1.{bank.removesuffix('experts')}{router}.weight"],
        tensors(source)[f"model.layers.1.{bank.removesuffix('experts')}{router}.weight"],
    )
    assert f"model.layers.1.mlp.{router}" in report.dense["ignored_linears"]
    packed = llmq.load(tmp_path / "packed")
    assert sum(isinstance(m, QuantLinear) for m in packed.modules()) == len(report.layers)
    expected = dequantized(source, packed)
    ids = torch.randint(1, 128, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # the same weights; gate and up are one product there and two here
        torch.testing.assert_close(packed(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(packed(ids).logits, model_of(name)(ids).logits, rtol=1e-2, atol=1e-2)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        assert torch.equal(again(ids).logits, packed(ids).logits)
    packed.save_pretrained(tmp_path / "again")
    assert same(stored, tensors(tmp_path / "again"))


def test_fused_and_separate_files_give_the_same_bytes(tmp_path: Path) -> None:
    source = make_moe(tmp_path / "dense", "qwen3_moe")
    run(tmp_path / "a", source)
    separate, fused = tensors(source), {}
    for block in range(2):
        path = f"model.layers.{block}.mlp.experts"
        gate, up, down = (
            torch.stack([separate.pop(f"{path}.{e}.{p}.weight") for e in range(EXPERTS)])
            for p in ("gate_proj", "up_proj", "down_proj")
        )
        fused |= {f"{path}.gate_up_proj": torch.cat([gate, up], dim=1), f"{path}.down_proj": down}
    save_file({**separate, **fused}, source / "model.safetensors", metadata={"format": "pt"})
    run(tmp_path / "b", source)
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


def test_a_tiny_set_of_every_method(tmp_path: Path) -> None:
    source = make_moe(tmp_path / "dense", "gpt_oss")
    report = run(tmp_path / "a", source, method="rtn")
    assert report.experts == []
    fields = {"guidance_groups": 2, "tune_steps": 2, "tune_epochs": 1}
    report = run(tmp_path / "b", source, **fields)
    assert len(report.tuning) == 3
    packed = llmq.load(tmp_path / "b")
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        found, expected = packed(ids).logits, dequantized(source, packed)
        for name, parameter in packed.named_parameters():  # norms and biases are tuned, too
            if name in dict(expected.named_parameters()):
                expected.get_parameter(name).data.copy_(parameter)
        for name, bank in banks_of(packed).items():
            for part in bank.parts():
                if part.name.endswith("bias"):
                    target = expected.get_submodule(name).get_parameter(part.parameter).data[part.expert]
                    part.of(target).copy_(bank.get_parameter(part.name))
        torch.testing.assert_close(found, expected(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_ledger_names_experts_without_tokens(tmp_path: Path) -> None:
    source = make_moe(tmp_path / "dense", "gpt_oss", never=2)
    report = run(tmp_path / "packed", source)
    for block, bank in enumerate(report.experts):
        assert (bank.name, bank.block) == (f"model.layers.{block}.mlp.experts", block)
        assert bank.tokens[2] == 0
        train = sum(int(report.calibration[key]) for key in ("samples", "random_samples")) * 32  # type: ignore[index]
        assert sum(bank.tokens) == 2 * (train - int(report.calibration["held_out_samples"]) * 32)  # type: ignore[index]
        assert bank.rounded == [2]
        assert 2 in bank.shrunk, "gate and up lean on what others see"
    stored = json.loads((tmp_path / "packed/report.json").read_text(encoding="utf-8"))["experts"]
    assert [BankReport(**entry) for entry in stored] == report.experts
    starved = {layer.name for layer in report.layers if STARVED in layer.remedies}
    assert starved == {f"model.layers.{block}.mlp.experts.2.down_proj" for block in range(2)}
    packed = llmq.load(tmp_path / "packed")
    nearest = {
        layer.name for layer in report.layers if is_nearest(source, packed.get_submodule(layer.name), layer.name)
    }
    assert nearest == starved
    everybody = run(tmp_path / "all", source, all_experts=True)
    assert [(bank.rounded, bank.shrunk) for bank in everybody.experts] == [([], []), ([], [])]
    assert everybody.experts[0] == BankReport("model.layers.0.mlp.experts", 0, report.experts[0].tokens, [], [])
    assert not same(tensors(tmp_path / "packed"), tensors(tmp_path / "all"))


def test_the_command_says_how_experts_were_covered(tmp_path: Path) -> None:
    source = make_moe(tmp_path / "dense", "gpt_oss", never=2)
    make_tokenizer().save_pretrained(source)
    options = (
        "--group-size",
        32,
        "--seq-len",
        16,
        "--num-samples",
        20,
        "--calibration",
        make_text(tmp_path / "text.txt", 400),
    )
    result = command("quantize", source, "--output", tmp_path / "a", *options)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"8 in 2 banks, 0 to \d+ tokens each; 8 lean on", result.stdout.replace("\n", " "))
    assert "2 rounded to nearest" in " ".join(result.stdout.split())
    assert "warning: 8 of 8 experts got fewer tokens than they need" in " ".join(result.stderr.split())
    result = command("quantize", source, "--output", tmp_path / "b", "--all-experts", *options)
    assert result.exit_code == 0, result.stderr
    assert "experts got fewer tokens" not in " ".join(result.stderr.split())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("local", ["qweight", "scales", "bias"])
def test_a_missing_tensor_of_an_expert_is_an_error(name: str, local: str, tmp_path: Path) -> None:
    if (name, local) == ("mixtral", "bias"):
        pytest.skip("its experts have no biases")
    run(tmp_path / "packed", make_moe(tmp_path / "dense", name), method="rtn")
    bank, _, up, _ = FILE_NAMES[name]
    content, key = tensors(tmp_path / "packed"), f"model.layers.1.{bank}.3.{up}.{local}"
    del content[key]
    save_file(content, tmp_path / "packed/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1\.\w+\.experts\.3\.\w+.* is missing|belongs to no linear|is there, but"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_a_whole_expert_missing_is_an_error(tmp_path: Path) -> None:
    run(tmp_path / "packed", make_moe(tmp_path / "dense", "qwen3_moe"), method="rtn")
    content = {k: v for k, v in tensors(tmp_path / "packed").items() if ".experts.3." not in k}
    save_file(content, tmp_path / "packed/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.3\.\w+\.weight is missing \(6 in all\)"):
        llmq.load(tmp_path / "packed")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("pattern", [r"experts\.", r"layers\.0.*experts\.", r"experts\.3\."])
def test_experts_that_are_ignored_stay_dense(name: str, pattern: str, tmp_path: Path) -> None:
    source = make_moe(tmp_path / "dense", name)
    report = run(tmp_path / "packed", source, method="rtn", ignore=(pattern,))
    packed = llmq.load(tmp_path / "packed")
    assert sum(isinstance(m, QuantLinear) for m in packed.modules()) == len(report.layers)
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dequantized(source, packed)(ids).logits, rtol=1e-4, atol=1e-4)
    packed.save_pretrained(tmp_path / "again")
    assert same(tensors(tmp_path / "packed"), tensors(tmp_path / "again"))
    made = json.loads((tmp_path / "packed/config.json").read_text(encoding="utf-8"))["quantization_config"]
    ends = ("", f".0.{FILE_NAMES[name][2]}", f".3.{FILE_NAMES[name][3]}")
    names = [f"model.layers.{b}.mlp.experts{end}" for b in range(2) for end in ends]
    excluded = [any(re.match(key[2:], name) for key in made["dynamic"]) for name in names]
    expected = {r"experts\.": [True] * 6, r"experts\.3\.": [False, False, True] * 2}
    assert excluded == expected.get(pattern, [True] * 3 + [False] * 3)


def test_experts_in_an_unknown_layout_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_moe(tmp_path / "dense", "gpt_oss")
    monkeypatch.setattr("llmq.moe._is_fused", lambda _: False)
    with pytest.raises(SpecError, match=r"model\.layers\.0\.mlp\.experts: GptOssExperts keeps 4 matrices"):
        run(tmp_path / "packed", source, method="rtn")
    report = run(tmp_path / "packed", source, method="rtn", ignore=(r"mlp\.experts",))
    assert len(report.layers) == 8
    assert list(report.dense["ignored_linears"]) == [f"model.layers.{block}.mlp.experts" for block in range(2)]


def test_a_run_interrupted_between_the_stages_of_a_bank_ends_in_the_same_bytes(tmp_path: Path) -> None:
    source = make_moe(tmp_path / "dense", "qwen3_moe")
    run(tmp_path / "a", source)

    class KilledError(Exception):
        pass

    def kill(event: Any) -> None:
        if event.layer is not None and event.layer.name.endswith("1.mlp.experts.3.up_proj"):
            raise KilledError

    with pytest.raises(KilledError):
        quantize(source, tmp_path / "b", make_recipe(SMALL), calibration=windows(), progress=kill)
    report = run(tmp_path / "b", source)
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert len(report.experts) == 2
