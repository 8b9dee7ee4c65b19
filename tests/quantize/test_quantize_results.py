"""What ``llmq quantize`` makes of a tiny model: what is packed and what is not, and a report that is true."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_line import SMALL, assert_fails, llmq
from quantize_runs import quantize, report_of, tensors_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmq.calibration import load_calibration, random_windows, split_held_out
from llmq.checkpoint import CheckpointReader
from llmq.formats.gptq import unpack
from llmq.recipe import Recipe
from llmq.types import QuantSpec

# --- what is packed and what is not


def test_everything_arrives_packed_or_as_it_was(made: Path) -> None:
    source, packed = tensors_of(made / "model"), tensors_of(made / "packed")
    config = CheckpointReader(made / "packed").config
    linears = {name.removesuffix(".weight") for name in source if name.endswith("proj.weight")}
    assert len(linears) == 14
    parts = {f"{name}.{part}" for name in linears for part in ("qweight", "qzeros", "scales", "g_idx")}
    dense = {name for name in source if name.removesuffix(".weight") not in linears}
    assert "lm_head.weight" in dense
    assert set(packed) == parts | dense
    assert all(torch.equal(packed[name], source[name]) for name in dense)
    assert config.pop("quantization_config") == json.loads((made / "packed" / "quantize_config.json").read_text())
    assert config == CheckpointReader(made / "model").config


def test_packed_weights_are_near_the_original_ones(made: Path) -> None:
    source, packed = tensors_of(made / "model"), tensors_of(made / "packed")
    spec = QuantSpec(4, 32, symmetric=True, format="gptq")
    errors = {layer["name"]: layer["weight_error"] for layer in report_of(made / "packed")["layers"]}
    for name, error in errors.items():
        local = {part: packed[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        weight = source[f"{name}.weight"]
        difference = (unpack(local, spec).dequantize() - weight).norm() / weight.norm()
        assert float(difference) == pytest.approx(error, rel=1e-5)
        assert error < 0.2


def test_ignored_layers_stay_dense_and_are_listed(made: Path, tmp_path: Path) -> None:
    quantize(made, tmp_path / "out", "--ignore", r"layers\.0\..*k_proj", "--ignore", "down_proj$")
    ignored = ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    source, packed = tensors_of(made / "model"), tensors_of(tmp_path / "out")
    for name in ignored:
        assert torch.equal(packed[f"{name}.weight"], source[f"{name}.weight"])
        assert f"{name}.qweight" not in packed
    report = report_of(tmp_path / "out")
    assert sorted(report["dense"]["ignored_linears"]) == ignored
    assert len(report["layers"]) == 11
    assert report["dense"]["tensors"] == len(source) - 11  # those inside the blocks included
    dynamic = CheckpointReader(tmp_path / "out").config["quantization_config"]["dynamic"]
    assert all(key.startswith("-:") and value == {} for key, value in dynamic.items())
    for name in (name.removesuffix(".weight") for name in source):
        excluded = any(re.match(key[2:], name) for key in dynamic)
        assert excluded == (name in [*ignored, "lm_head"]), name


def test_rtn_needs_neither_tokenizer_nor_calibration(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    result = llmq("quantize", tmp_path / "bare", "--output", tmp_path / "out", "--group-size", 32, "--method", "rtn")
    assert result.exit_code == 0, result.stderr
    assert "ships with llmq" not in result.stderr
    report = report_of(tmp_path / "out")
    assert report["calibration"] is None
    assert all(layer["tokens"] == 0 and layer["loss"] is None for layer in report["layers"])
    assert "damp_percent" not in CheckpointReader(tmp_path / "out").config["quantization_config"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("grid", ["--sym", "--asym"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_bytes_in_the_report_are_those_on_the_disk(
    bits: int, grid: str, group_size: int, made: Path, tmp_path: Path
) -> None:
    quantize(made, tmp_path / "out", "--bits", bits, grid, "--group-size", group_size, "--method", "rtn")
    sizes = {name: tensor.nbytes for name, tensor in tensors_of(tmp_path / "out").items()}
    report = report_of(tmp_path / "out")
    assert report["bytes"]["output_tensors"] == sum(sizes.values())
    assert report["bytes"]["packed"] == sum(size for name, size in sizes.items() if "proj." in name)
    assert report["bytes"]["source_tensors"] == sum(t.nbytes for t in tensors_of(made / "model").values())


# --- the report


def test_report_says_how_it_came_about(made: Path) -> None:
    report = report_of(made / "packed")
    assert {"python", "llmq", "torch", "transformers", "safetensors"} <= set(report["versions"])
    assert report["source"] == str(made / "model")
    assert report["recipe"]["seed"] == 0
    assert report["recipe"]["group_size"] == 32
    calibration = report["calibration"]
    assert (calibration["samples"], calibration["seq_len"], calibration["tokens"]) == (8, 64, 512)
    assert (calibration["held_out_samples"], calibration["random_samples"]) == (1, 1)
    assert re.fullmatch("[0-9a-f]{64}", calibration["fingerprint"])
    assert {"calibration", "check", "load", "forward", "solve", "write"} <= set(report["seconds"])
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert report["peak_memory_bytes"]["host"] > 10**7


def test_report_has_every_layer(made: Path) -> None:
    layers = report_of(made / "packed")["layers"]
    source = tensors_of(made / "model")
    assert len(layers) == 14
    for layer in layers:
        assert [layer["out_features"], layer["in_features"]] == list(source[f"{layer['name']}.weight"].shape)
        assert f"layers.{layer['block']}." in layer["name"]
        assert (layer["tokens"], layer["dropped_tokens"]) == (512, 0)  # of eight windows one is held out, one random
        assert layer["loss"] > 0
        assert 0 < layer["relative_loss"] < 0.03
        assert 0 < layer["held_out_loss"] < 0.05
        # tokens are few, so that held-out ones choose
        assert any(layer["damp_percent"] == pytest.approx(factor * Recipe().damp_percent) for factor in (1, 3, 10))
        assert layer["remedies"] == []


def test_losses_are_those_on_what_the_quantized_layers_before_let_through(made: Path, tmp_path: Path) -> None:
    quantize(made, tmp_path / "out", "--bits", 3)
    model = AutoModelForCausalLM.from_pretrained(made / "model")
    original, packed = tensors_of(made / "model"), tensors_of(tmp_path / "out")
    layers = report_of(tmp_path / "out")["layers"]
    spec = QuantSpec(3, 32, symmetric=True, format="gptq")
    inputs: dict[str, Tensor] = {}
    for layer in layers:
        name = layer["name"]
        local = {part: packed[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        module = model.get_submodule(name)
        module.weight.data = unpack(local, spec).dequantize()
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)}))
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    whole = load_calibration(str(made / "text.txt"), tokenizer, num_samples=8, seq_len=64, seed=0)
    train, held_out = split_held_out(whole, 0.1, seed=0)
    assert held_out is not None
    random = random_windows(whole, 0.125, 128, seed=0)
    assert random is not None
    fitted = torch.cat([train.input_ids, random.input_ids])
    for part, field, tokens in ((fitted, "relative_loss", 512), (held_out.input_ids, "held_out_loss", 64)):
        with torch.no_grad():
            model(part)
        for layer in layers:
            weight, x = original[f"{layer['name']}.weight"], inputs[layer["name"]].T
            assert x.shape[1] == tokens
            loss = float(((weight - model.get_submodule(layer["name"]).weight.data) @ x).square().sum())
            assert layer[field] == pytest.approx(loss / float((weight @ x).square().sum()), rel=1e-3), layer["name"]
            if part is fitted:
                assert layer["loss"] == pytest.approx(2 * loss / tokens, rel=1e-3), layer["name"]


def test_gptq_loses_less_than_rounding_to_nearest(made: Path, tmp_path: Path) -> None:
    options = ("--method", "weighted_rtn", "--scale-search", "none", "--refine-rounds", 0)  # rtn reports no loss
    quantize(made, tmp_path / "rtn", *options)
    gptq, rtn = (report_of(folder)["layers"] for folder in (made / "packed", tmp_path / "rtn"))
    first = {layer["name"]: layer["relative_loss"] for layer in rtn}
    assert sum(layer["relative_loss"] for layer in gptq) < 0.8 * sum(first.values())


def test_unusable_hessians_end_the_run_unless_the_recipe_allows_them(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["llmq.solvers.sweep"]
    real = module.factorize
    monkeypatch.setattr(module, "factorize", lambda h, *rest: real(h, *rest) if h.shape[0] == 64 else None)  # down_proj
    options = (*SMALL, "--calibration", made / "text.txt")
    result = llmq("quantize", made / "model", "--output", tmp_path / "out", *options)
    words = ("2 of 14 layers", "model.layers.0.mlp.down_proj", "max_fallback")
    assert_fails(result.exit_code, result.stdout, result.stderr, *words)
    assert not (tmp_path / "out").exists()

    (tmp_path / "recipe.yaml").write_text("max_fallback: 0.15\n")
    _, stderr = quantize(made, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml")
    assert "warning: 2 layers had no usable Hessian" in " ".join(stderr.split())
    lost = {layer["name"]: layer["remedies"] for layer in report_of(tmp_path / "out")["layers"] if layer["remedies"]}
    assert lost == {f"model.layers.{block}.mlp.down_proj": ["coordinate descent, no factorization"] for block in (0, 1)}


def test_stronger_damping_is_reported(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["llmq.hessian"]
    real = module._upper_factor_
    monkeypatch.setattr(module, "_upper_factor_", lambda h: real(h) if h.dtype == torch.float64 else None)
    quantize(made, tmp_path / "out", "--held-out", 0, "--damp-percent", 0.01)
    for layer in report_of(tmp_path / "out")["layers"]:
        assert layer["remedies"] == ["float64 factorization, damping 0.01"]
