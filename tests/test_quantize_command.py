"""``llmq quantize`` from end to end on a tiny model: what it prints, what it writes, and that it does so every time."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command_line import SMALL, assert_fails, llmq
from safetensors.torch import load_file
from tiny_models import make_llama, make_text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmq as package
from llmq.calibration import load_calibration, random_windows, split_held_out
from llmq.checkpoint import CheckpointReader
from llmq.formats.gptq import unpack
from llmq.recipe import Recipe
from llmq.types import QuantSpec

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `model`, `text.txt`, and `packed`: the model quantized by `SMALL`. Nobody writes to them."""
    folder = tmp_path_factory.mktemp("made")
    make_text(folder / "text.txt", 2000)
    make_llama(folder / "model")
    quantize(folder, folder / "packed")
    return folder


def quantize(made: Path, output: Path, *options: object, source: Path | None = None) -> tuple[str, str]:
    """Quantize the model into `output`, expect success, and return stdout and stderr."""
    calibration = ("--calibration", made / "text.txt")
    result = llmq("quantize", source or made / "model", "--output", output, *SMALL, *calibration, *options)
    assert result.exit_code == 0, result.stderr
    return result.stdout, result.stderr


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in `folder` but the report, which holds times."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "report.json"}


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader}


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


# --- what it prints


def test_results_go_to_stdout_and_everything_else_to_stderr(made: Path, tmp_path: Path) -> None:
    stdout, stderr = quantize(made, tmp_path / "out")
    rows = dict(line.split(maxsplit=1) for line in stdout.splitlines() if line[:1].strip())  # long values go on below
    assert set(rows) == {"packed", "size", "relative", "time", "peak", "written"}
    assert re.search(r"14, 5\.\d\d bits per weight", stdout)
    assert re.search(r"group_size +32\n", re.sub(" +\n", "\n", stderr)), "the settings come first"
    for block in (0, 1):
        for projection in PROJECTIONS:
            assert re.search(rf"layers\.{block}\.\w+\.{projection}  weight error 0\.\d+  relative loss", stderr)


def test_json_is_the_report_and_nothing_else(made: Path, tmp_path: Path) -> None:
    stdout, _ = quantize(made, tmp_path / "out", "--json")
    assert json.loads(stdout) == report_of(tmp_path / "out")


def test_default_calibration_is_named_with_what_to_use_instead(made: Path, tmp_path: Path) -> None:
    options = ("--output", tmp_path / "out", *SMALL, "--num-samples", 2)
    result = llmq("quantize", made / "model", *options)
    assert result.exit_code == 0, result.stderr
    assert "general text that ships with llmq; text like what the model will read is better: --calibration FILE" in (
        " ".join(result.stderr.split())
    )
    assert report_of(tmp_path / "out")["calibration"]["source"] == "bundled text"
    assert "ships with llmq" not in quantize(made, tmp_path / "named")[1]


def test_too_few_tokens_are_warned_about(made: Path, tmp_path: Path) -> None:
    _, stderr = quantize(made, tmp_path / "few", "--num-samples", 7)
    assert "warning: 448 calibration tokens for layers of 128 inputs; use at least 512" in " ".join(stderr.split())
    assert "warning" not in quantize(made, tmp_path / "enough")[1]


def test_version_and_help() -> None:
    assert llmq("--version").stdout == f"llmq {package.__version__}\n"
    top = llmq("--help")
    for verb in ("quantize", "recipe", "eval", "inspect", "generate"):
        assert re.search(rf"^  {verb}  +\w", top.stdout, re.MULTILINE)
        shown = llmq(verb, "--help")
        assert shown.exit_code == 0
        assert f"llmq {verb}" in shown.stdout
        assert "--debug" in shown.stdout


def test_help_of_quantize_shows_every_option_with_its_default() -> None:
    shown = " ".join(llmq("quantize", "--help").stdout.split()).replace(" / ", "/")
    names = "bits group-size sym/--asym method order damp-percent calibration num-samples seq-len"
    names += " seed format device dtype ignore recipe force json debug shard-size output"
    for name in names.split():
        assert f"--{name}" in shown
    assert "[default: 128]" in shown
    assert "[default: --sym]" in shown


# --- recipes


def test_recipe_printed_and_read_back_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    options = ("--bits", 3, "--asym", "--order", "natural", "--damp-percent", 0.02)
    options = (*options, "--ignore", "k_proj", "--ignore", "up")
    options = (*SMALL, "--calibration", made / "text.txt", *options)
    printed = llmq("recipe", *options)
    assert printed.exit_code == 0
    assert printed.stderr == ""
    (tmp_path / "recipe.yaml").write_text(printed.stdout)
    assert llmq("recipe", "--recipe", tmp_path / "recipe.yaml").stdout == printed.stdout

    quantize(made, tmp_path / "options", *options)
    result = llmq("quantize", made / "model", "--output", tmp_path / "file", "--recipe", tmp_path / "recipe.yaml")
    assert result.exit_code == 0, result.stderr
    assert files(tmp_path / "options") == files(tmp_path / "file")
    assert report_of(tmp_path / "file")["recipe"] == yaml.safe_load(printed.stdout)


def test_command_line_wins_over_the_recipe_which_wins_over_defaults(made: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("bits: 3\nsym: false\nmethod: rtn\n")
    quantize(made, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", "--bits", 8)
    recipe = report_of(tmp_path / "out")["recipe"]
    assert (recipe["bits"], recipe["sym"], recipe["method"], recipe["damp_percent"]) == (
        8,
        False,
        "rtn",
        Recipe().damp_percent,
    )
    config = CheckpointReader(tmp_path / "out").config["quantization_config"]
    assert (config["bits"], config["sym"], config["checkpoint_format"]) == (8, False, "gptq_v2")


# --- the same every time


def test_two_runs_give_the_same_bytes_and_another_seed_does_not(made: Path, tmp_path: Path) -> None:
    quantize(made, tmp_path / "again")
    assert files(tmp_path / "again") == files(made / "packed")
    quantize(made, tmp_path / "seed", "--seed", 1)
    other, first = files(tmp_path / "seed"), files(made / "packed")
    assert {name for name in first if other[name] != first[name]} == {"model.safetensors"}


def test_only_times_and_memory_differ_between_reports(made: Path, tmp_path: Path) -> None:
    quantize(made, tmp_path / "again")
    first, again = report_of(made / "packed"), report_of(tmp_path / "again")
    assert {key for key in first if first[key] != again[key]} <= {"seconds", "peak_memory_bytes"}


def test_where_the_model_lies_does_not_matter(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "model", tmp_path / "elsewhere")
    quantize(made, tmp_path / "out", source=tmp_path / "elsewhere")
    assert files(tmp_path / "out") == files(made / "packed")


# --- files


def test_sharded_input_gives_the_same_tensors(made: Path, tmp_path: Path) -> None:
    make_llama(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    quantize(made, tmp_path / "out", source=tmp_path / "sharded")
    assert_same_tensors(tmp_path / "out", made / "packed")


def test_sharded_output_has_a_right_index(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(made, out, "--shard-size", "30kB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(shards) > 2
    held = {name: load_file(out / name) for name in shards}
    assert index["weight_map"] == {key: name for name in shards for key in held[name]}
    sizes = {name: sum(t.nbytes for t in shard.values()) for name, shard in held.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(sizes[name] <= 30_000 or len(held[name]) == 1 for name in shards)
    assert_same_tensors(out, made / "packed")


def test_side_files_are_copied_or_named(made: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(made / "model", source)
    copied = {"chat_template.jinja": "{{ x }}", "special.model": "\0pieces", "README.md": "# größer"}
    for name, text in copied.items():
        (source / name).write_text(text, encoding="utf-8")
    foreign = ("consolidated.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "report.json", "x.gguf")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index_of(source)}))
    for name in foreign:
        (source / name).write_text("other weights")
    (source / "onnx").mkdir()
    _, stderr = quantize(made, out, source=source)
    copied_too = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    for name in {*copied, *copied_too}:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    made_here = {"config.json", "quantize_config.json", "report.json", "model.safetensors"}
    assert {file.name for file in out.iterdir()} == {*copied, *copied_too, *made_here}
    assert report_of(out)["files"] == {
        "copied": sorted({*copied, *copied_too}),
        "left_out": sorted([*foreign, "onnx"]),
    }
    assert f"not copied: {', '.join(sorted([*foreign, 'onnx']))}" in " ".join(stderr.split())


def index_of(folder: Path) -> dict[str, str]:
    return dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")


def test_force_replaces_the_checkpoint(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(made, out, "--shard-size", "30kB", "--bits", 8)
    quantize(made, out, "--force")
    assert files(out) == files(made / "packed")


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
        assert excluded == (name in ignored), name


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
    monkeypatch.setattr(module, "factorize", lambda h, damp: real(h, damp) if h.shape[0] == 64 else None)  # down_proj
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
    real = module._upper_factor
    monkeypatch.setattr(module, "_upper_factor", lambda h: real(h) if h.dtype == torch.float64 else None)
    quantize(made, tmp_path / "out", "--held-out", 0, "--damp-percent", 0.01)
    for layer in report_of(tmp_path / "out")["layers"]:
        assert layer["remedies"] == ["float64 factorization, damping 0.01"]
