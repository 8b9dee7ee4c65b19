"""``llmq quantize`` from end to end on a tiny model: what it prints, what it writes, and that it does so every time."""

import json
import re
import shutil
from pathlib import Path

import torch
import yaml
from command_line import SMALL, llmq
from quantize_runs import files, quantize, report_of, tensors_of
from safetensors.torch import load_file
from tiny_models import make_llama

import llmq as package
from llmq.checkpoint import CheckpointReader
from llmq.recipe import Recipe

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
    assert {name for name in first if other[name] != first[name]} == {"README.md", "model.safetensors"}


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
    copied = {"chat_template.jinja": "{{ x }}", "special.model": "\0pieces", "NOTES.md": "# größer"}
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
    made_here = {"config.json", "quantize_config.json", "report.json", "README.md", "model.safetensors"}
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
