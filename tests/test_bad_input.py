"""What a person can do wrong, or meet: each ends in one line that helps, and in nothing that looks finished."""

import errno
import json
import os
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import SMALL, assert_fails, assert_nothing_finished, llmq, start
from safetensors.torch import load_file, save_file
from tiny_models import make_llama, make_text
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel

import llmq as package
from llmq.checkpoint import STAGING
from llmq.recipe import Recipe

INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN_PROJ = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `model`, `sharded` and `text.txt` of 2000 tokens; nobody writes to them."""
    folder = tmp_path_factory.mktemp("made")
    make_llama(folder / "model")
    make_llama(folder / "sharded", max_shard_size="100KB")
    make_text(folder / "text.txt", 2000)
    return folder


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the model, to be damaged."""
    return Path(shutil.copytree(made / "model", tmp_path / "model"))


@pytest.fixture
def sharded(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the model in several files, to be damaged."""
    return Path(shutil.copytree(made / "sharded", tmp_path / "sharded"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


@pytest.fixture
def fails(made: Path, output: Path) -> Callable[..., None]:
    """Return a function that quantizes, expects a certain failure, and nothing left of it."""

    def run(source: Path | str, *options: object, words: tuple[str, ...], code: int = 1) -> None:
        before = output.exists()
        options = (*SMALL, "--calibration", made / "text.txt", *options)
        result = llmq("quantize", source, "--output", output, *options)
        assert_fails(result.exit_code, result.stdout, result.stderr, *words, expected=code)
        assert before or not output.exists()

    return run


def change_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], object]) -> None:
    """Apply `change`, in place, to tensor `name` of an unsharded checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Apply `change`, in place, to the weight map of a sharded checkpoint."""
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# --- the source folder


def test_missing_folder(tmp_path: Path, fails: Callable[..., None]) -> None:
    fails(tmp_path / "nowhere", words=("nowhere", "no such folder", "hub id"))


def test_model_is_a_file(made: Path, fails: Callable[..., None]) -> None:
    fails(made / "model" / "model.safetensors", words=("model.safetensors", "no such folder"))


def test_name_too_long_for_the_system(fails: Callable[..., None]) -> None:
    fails("m" * 300, words=("File name too long",))


def test_hub_id_while_offline(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("some-org/some-model", words=("some-org/some-model", "no such folder here", "hub", "pass the folder"))


def test_no_config(model: Path, fails: Callable[..., None]) -> None:
    (model / "config.json").unlink()
    fails(model, words=(str(model), "not a checkpoint", "config.json"))


@pytest.mark.parametrize("text", ["", "{", "[]", "\0"], ids=["empty", "truncated", "a list", "binary"])
def test_config_that_is_no_object(text: str, model: Path, fails: Callable[..., None]) -> None:
    (model / "config.json").write_text(text)
    fails(model, words=("config.json", "JSON"))


def test_config_with_a_wrong_value(model: Path, fails: Callable[..., None]) -> None:
    change_config(model, hidden_size="large")
    fails(model, words=("config.json", "hidden_size"), code=2)


def test_config_with_other_sizes_than_the_weights(model: Path, fails: Callable[..., None]) -> None:
    change_config(model, intermediate_size=256)
    fails(model, words=("mlp", "[128, 64]", "[256, 64]", "config.json"))


@pytest.mark.parametrize("kept", [0, 5, 100, -1], ids=["empty", "in its size", "in its header", "in its data"])
def test_truncated_safetensors(kept: int, model: Path, fails: Callable[..., None]) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    fails(model, words=("model.safetensors", "truncated or corrupt", "download it again"))


def test_corrupt_safetensors(model: Path, fails: Callable[..., None]) -> None:
    file = model / "model.safetensors"
    file.write_bytes(b"<html>Not found, see other page</html>" * 100)
    fails(model, words=("model.safetensors", "truncated or corrupt"))


def test_truncated_shard(sharded: Path, fails: Callable[..., None]) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    fails(sharded, words=(shard.name, "truncated or corrupt"))


def test_no_safetensors_but_other_weights(model: Path, fails: Callable[..., None]) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    fails(model, words=("no .safetensors", "pytorch_model.bin", "save_pretrained"))


def test_index_names_a_missing_shard(sharded: Path, fails: Callable[..., None]) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    fails(sharded, words=(INDEX, shard.name, "missing"))


def test_index_places_a_tensor_in_the_wrong_shard(sharded: Path, fails: Callable[..., None]) -> None:
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))
    name = "model.norm.weight"
    change_index(sharded, lambda m: m.update({name: next(shard for shard in shards if shard != m[name])}))
    fails(sharded, words=(INDEX, name))


def test_index_names_a_tensor_that_no_shard_has(sharded: Path, fails: Callable[..., None]) -> None:
    change_index(sharded, lambda m: m.update({"model.extra": m["model.norm.weight"]}))
    fails(sharded, words=(INDEX, "model.extra"))


@pytest.mark.parametrize("above", [True, False], ids=["relative", "absolute"])
def test_index_leads_out_of_the_folder(above: bool, made: Path, sharded: Path, fails: Callable[..., None]) -> None:
    shutil.copy(made / "model" / "model.safetensors", sharded.parent / "outside.safetensors")
    path = "../outside.safetensors" if above else str(sharded.parent / "outside.safetensors")
    change_index(sharded, lambda m: m.update({"model.norm.weight": path}))
    fails(sharded, words=(INDEX, "outside.safetensors", "not a plain file name"))


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}], ids=["empty", "list", "number"])
def test_index_without_a_weight_map(index: dict[str, object], sharded: Path, fails: Callable[..., None]) -> None:
    (sharded / INDEX).write_text(json.dumps(index))
    fails(sharded, words=(INDEX, "weight_map"))


def test_tensor_missing_from_every_file(model: Path, fails: Callable[..., None]) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors[f"{DOWN_PROJ}.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    fails(model, words=(DOWN_PROJ, "missing", "incomplete"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "minus inf"])
@pytest.mark.parametrize(
    "name",
    [f"{DOWN_PROJ}.weight", "model.embed_tokens.weight", "model.norm.weight"],
    ids=["packed", "embedding", "norm"],
)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_weight_that_is_not_finite(
    value: float, name: str, method: str, model: Path, fails: Callable[..., None]
) -> None:
    change_tensor(model, name, lambda w: w.view(-1)[3].fill_(value))
    fails(model, "--method", method, words=(name, "1 of", "NaN or infinite", "damaged"))


def test_scale_beyond_float16(model: Path, fails: Callable[..., None]) -> None:
    change_tensor(model, f"{DOWN_PROJ}.weight", lambda w: w[3, 5].fill_(1e6))
    fails(model, words=(DOWN_PROJ, "scale", "125000", "float16", "65280", "--ignore"))


def test_groups_of_opposite_extremes_have_scales_within_float16(made: Path, model: Path, output: Path) -> None:
    def change(w: Tensor) -> None:
        w[3, 5], w[3, 40] = 9e5, -9e5  # as one group they would need a scale of 120000

    change_tensor(model, f"{DOWN_PROJ}.weight", change)
    result = llmq("quantize", model, "--output", output, *SMALL, "--method", "rtn", "--asym")
    assert result.exit_code == 0, result.stderr


def test_weights_of_a_dtype_that_is_no_weight(model: Path, fails: Callable[..., None]) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[f"{DOWN_PROJ}.weight"] = tensors[f"{DOWN_PROJ}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    fails(model, words=(DOWN_PROJ, "float8_e4m3fn", "bfloat16"))


def test_already_quantized(made: Path, tmp_path: Path, fails: Callable[..., None]) -> None:
    packed = tmp_path / "packed"
    assert llmq("quantize", made / "model", "--output", packed, *SMALL, "--method", "rtn").exit_code == 0
    fails(packed, words=(str(packed), "already quantized", "gptq", "original weights"), code=2)
    change_config(packed, quantization_config=None)  # the tensors tell too
    fails(packed, words=("already quantized", "qweight"), code=2)


# --- the architecture


def test_unknown_model_type(model: Path, fails: Callable[..., None]) -> None:
    change_config(model, model_type="llama9")
    fails(model, words=("config.json", "transformers", "'llama9'"), code=2)


def test_configuration_that_brings_its_own_code(model: Path, fails: Callable[..., None]) -> None:
    change_config(
        model, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    )
    (model / "mine.py").write_text("raise SystemExit('this code must never run')")
    fails(model, words=("config.json", "'mine'"), code=2)


def test_model_that_is_no_causal_language_model(model: Path, fails: Callable[..., None]) -> None:
    change_config(model, model_type="vit", architectures=["ViTModel"])
    fails(model, words=("'vit'", "causal language model"), code=2)


class BlocklessConfig(PreTrainedConfig):
    model_type = "blockless"
    vocab_size = 128
    hidden_size = 64


class Blockless(PreTrainedModel):
    """A language model of one linear layer, without blocks."""

    config_class = BlocklessConfig

    def __init__(self, config: BlocklessConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.middle = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()


@pytest.fixture
def blockless() -> Iterator[None]:
    """Make transformers know `Blockless` for the duration of one test."""
    AutoConfig.register("blockless", BlocklessConfig)
    AutoModelForCausalLM.register(BlocklessConfig, Blockless)
    yield
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING._extra_content.pop("blockless")
    AutoModelForCausalLM._model_mapping._extra_content.pop(BlocklessConfig)


@pytest.mark.usefixtures("blockless")
def test_architecture_without_blocks(model: Path, fails: Callable[..., None]) -> None:
    change_config(model, model_type="blockless", architectures=["Blockless"])
    fails(model, words=("Blockless", "no transformer blocks", "ModuleList", "torch.nn.Linear", "Conv1D"), code=2)


# --- sizes and options


def test_group_size_that_does_not_divide(made: Path, fails: Callable[..., None]) -> None:
    words = (Q_PROJ, "group_size 128", "in_features 64", "--group-size 64, 32, -1", "--ignore")
    fails(made / "model", "--group-size", 128, words=words, code=2)


def test_group_size_that_divides_in_part_of_the_layers(made: Path, fails: Callable[..., None]) -> None:
    fails(made / "model", "--group-size", 96, words=(Q_PROJ, "group_size 96", "in_features 64"), code=2)


@pytest.mark.parametrize("size", [0, -2])
def test_group_size_that_is_none(size: int, made: Path, fails: Callable[..., None]) -> None:
    fails(made / "model", "--group-size", size, words=(f"group_size is {size}", "-1"), code=2)


@pytest.mark.parametrize(("size", "name"), [(72, "out_features 72"), (2 * 64 + 8, "out_features 136")])
def test_outputs_not_a_multiple_of_32(size: int, name: str, tmp_path: Path, fails: Callable[..., None]) -> None:
    folder = make_llama(tmp_path / "odd", intermediate_size=size)
    fails(folder, words=("gate_proj", name, "multiple of 32", "--ignore"), code=2)


def test_inputs_not_a_multiple_of_32(tmp_path: Path, fails: Callable[..., None]) -> None:
    folder = make_llama(tmp_path / "odd", intermediate_size=72)
    words = ("down_proj", "in_features 72", "multiple of 32", "--ignore")
    fails(folder, "--ignore", "gate|up", "--group-size", 8, words=words, code=2)


def test_layer_of_odd_size_can_be_ignored(made: Path, tmp_path: Path, output: Path) -> None:
    folder = make_llama(tmp_path / "odd", intermediate_size=72)
    result = llmq("quantize", folder, "--output", output, *SMALL, "--method", "rtn", "--ignore", "mlp")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", 5), ("2, 3, 4, 8", "not 5")),
        (("--bits", 0), ("2, 3, 4, 8", "not 0")),
        (("--bits", 5, "--method", "rtn"), ("2, 3, 4, 8", "not 5")),
        (("--format", "zip"), ("format 'zip'", "gptq, gptq_v2")),
        (("--method", "magic"), ("method 'magic'", "gptq, rtn")),
        (("--dtype", "float8"), ("dtype", "bfloat16", "float8")),
        (("--device", "gpu"), ("--device gpu", "cpu, cuda")),
        (("--device", "cuda:99"), ("--device cuda:99", "--device cpu")),
        (("--device", "meta"), ("--device meta", "cpu or cuda")),
        (("--ignore", "("), ("ignore", "regular expression")),
        (("--ignore", "."), ("--ignore", "all 14", "nothing is left")),
        (("--damp-percent", 0), ("damp_percent", "greater than 0")),
        (("--num-samples", 0), ("num_samples", "greater than or equal to 1")),
        (("--seq-len", 1), ("seq_len", "greater than or equal to 2")),
        (("--seed", -1), ("seed", "greater than or equal to 0")),
        (("--shard-size", "big"), ("shard_size", "500MB")),
        (("--bits", "four"), ("--bits", "valid integer")),
        (("--colour", "red"), ("--colour",)),
    ],
    ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") else "",
)
def test_option_that_cannot_be(
    options: tuple[object, ...], words: tuple[str, ...], made: Path, fails: Callable[..., None]
) -> None:
    fails(made / "model", *options, words=words, code=2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bits: [", ("cannot be read",)),
        ("- bits", ("holds list", "bits: 4")),
        ("", ("holds NoneType",)),
        ("\0", ("cannot be read",)),
        ("bits: four", ("bits", "integer", "'four'")),
        ("beats: 4", ("beats", "fields are method, bits")),
        ("4: bits", ("4",)),
        ("max_fallback: 2", ("max_fallback", "less than or equal to 1")),
        ("ignore: ['(']", ("ignore", "regular expression")),
    ],
    ids=["broken", "list", "empty", "binary", "type", "unknown field", "number as name", "range", "regex"],
)
def test_bad_recipe_file(
    text: str, words: tuple[str, ...], made: Path, tmp_path: Path, fails: Callable[..., None]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    fails(made / "model", "--recipe", file, words=("recipe", *words), code=2)


def test_missing_recipe_file(made: Path, tmp_path: Path, fails: Callable[..., None]) -> None:
    fails(made / "model", "--recipe", tmp_path / "none.yaml", words=("none.yaml", "cannot be read"), code=2)


# --- calibration


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("empty", "0 bytes")),
        (b" \n\n ", ("empty",)),
        (b"w1 w2\0 w3", ("binary", "byte 5")),
        (b"\x89PNG\r\n", ("not UTF-8", "0x89")),
        (b"w1 " * 500, ("too short", "has 500 tokens", "8 windows of 63 need 504", "--num-samples to 7")),
    ],
    ids=["empty", "blank", "binary", "latin-1", "too short"],
)
def test_calibration_text(
    content: bytes, words: tuple[str, ...], made: Path, tmp_path: Path, fails: Callable[..., None]
) -> None:
    file = tmp_path / "calibration.txt"
    file.write_bytes(content)
    fails(made / "model", "--calibration", file, words=("calibration.txt", *words))


def test_calibration_file_is_missing(made: Path, tmp_path: Path, fails: Callable[..., None]) -> None:
    fails(made / "model", "--calibration", tmp_path / "none.txt", words=("none.txt", "does not exist", "--calibration"))


def test_calibration_windows_longer_than_the_model_allows(made: Path, fails: Callable[..., None]) -> None:
    options = ("--seq-len", 300, "--num-samples", 2)
    fails(made / "model", *options, words=("300 tokens", "256 positions", "--seq-len 256"))


def test_tokenizer_of_another_model(tmp_path: Path, fails: Callable[..., None]) -> None:
    folder = make_llama(tmp_path / "small", vocab_size=96)
    fails(folder, words=("tokenizer gives token 12", "96 tokens", "another model"))


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_no_usable_tokenizer(damage: str, model: Path, fails: Callable[..., None]) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    if damage == "broken":
        (model / "tokenizer.json").write_text('{"version": "1.0"}')
    fails(model, words=("no usable tokenizer", "--method rtn"), code=2)


# --- the output folder


def test_output_exists(made: Path, output: Path, fails: Callable[..., None]) -> None:
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    fails(made / "model", words=(str(output), "not empty", "--output", "--force"))
    assert contents(output) == {"notes.txt": b"mine"}


def test_output_is_looked_at_before_any_work(output: Path, fails: Callable[..., None]) -> None:
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    fails("some-org/some-model", words=("not empty",))


def test_output_is_a_file(made: Path, output: Path, fails: Callable[..., None]) -> None:
    output.write_text("mine")
    fails(made / "model", "--force", words=(str(output), "not a folder"))
    assert output.read_text() == "mine"


def test_output_below_a_file(made: Path, tmp_path: Path, fails: Callable[..., None]) -> None:
    (tmp_path / "file").write_text("mine")
    target = tmp_path / "file" / "output"
    fails(made / "model", "--output", target, words=(str(target), "cannot be written", "--output"))


def test_output_is_the_source(model: Path, fails: Callable[..., None]) -> None:
    before = contents(model)
    fails(model, "--output", model, "--force", words=("original weights", "--output"))
    assert contents(model) == before
    assert not (model / STAGING).exists()


def test_disk_known_to_be_too_small(made: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    fails(made / "model", words=("the disk is full", "needs 0.00 GB", "are free", "--output"))


LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from llmq.cli.app import main
main()
"""


def test_disk_that_fills_up_while_writing_keeps_the_old_checkpoint(made: Path, output: Path) -> None:
    assert llmq("quantize", made / "model", "--output", output, *SMALL, "--method", "rtn").exit_code == 0
    before = contents(output)
    process = start(LIMITED, "quantize", made / "model", "--output", output, *SMALL, "--method", "rtn", "--force")
    stdout, stderr = process.communicate(timeout=120)
    words = (str(output), "cannot be written", "the disk is full", "--output")
    assert_fails(process.returncode, stdout, stderr, *words)
    assert contents(output) == before


def test_disk_that_refuses_to_be_written(made: Path, fails: Callable[..., None]) -> None:
    target = Path("/sys/llmq-output")  # not even root may make a folder there
    fails(made / "model", "--output", target, words=(str(target), "cannot be written", "read-only", "--output"))
    assert not target.exists()


@pytest.mark.parametrize(("number", "advice"), [(errno.EROFS, "read-only"), (errno.ENOSPC, "the disk is full")])
@pytest.mark.parametrize("call", ["save_file", "os.replace", "shutil.copyfile", "os.fsync"])
def test_every_write_can_fail(
    call: str, number: int, advice: str, made: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(f"llmq.checkpoint.{call}", refuse)
    fails(made / "model", words=("cannot be written", os.strerror(number), advice))


# --- interruptions


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_interrupt_in_the_middle(made: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]) -> None:
    monkeypatch.setattr("llmq.stream.Stream.advance", raise_interrupt)
    fails(made / "model", "--shard-size", "20kB", words=("interrupted", "removed"))


def test_interrupt_from_the_progress_callback_removes_the_output(made: Path, output: Path) -> None:
    recipe = Recipe(method="rtn", group_size=32, shard_size="20kB")
    seen = []

    def progress(event: Any) -> None:
        if event.done == 9:
            seen.extend((output / STAGING).iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        package.quantize(made / "model", output, recipe, progress=progress)
    assert seen, "something had been written by then"
    assert not output.exists()


WAITS = """
import time
from llmq.cli.app import main
from llmq.stream import Stream

def advance(*_):
    print("first block done", flush=True)
    time.sleep(300)

Stream.advance = advance
main()
"""


def start_and_stop(stop: signal.Signals, made: Path, output: Path, *options: object) -> tuple[int, str, str]:
    """Send `stop` to a run that has finished its first block; return exit code, stdout and stderr."""
    options = (*SMALL, "--calibration", made / "text.txt", "--shard-size", "20kB", *options)
    process = start(WAITS, "quantize", made / "model", "--output", output, *options)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "first block done\n"
        process.send_signal(stop)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def test_interrupt_from_the_keyboard_keeps_the_old_checkpoint(made: Path, output: Path) -> None:
    assert llmq("quantize", made / "model", "--output", output, *SMALL, "--method", "rtn").exit_code == 0
    before = contents(output)
    code, stdout, stderr = start_and_stop(signal.SIGINT, made, output, "--force")
    assert_fails(code, stdout, stderr, "interrupted", "removed")
    assert contents(output) == before


def test_kill_leaves_a_marked_folder_that_the_next_run_cleans(made: Path, output: Path) -> None:
    code, _, _ = start_and_stop(signal.SIGKILL, made, output)
    assert code == -signal.SIGKILL
    assert [path.name for path in output.iterdir()] == [STAGING]
    assert STAGING.endswith(".llmq-partial")
    assert list((output / STAGING).glob("*.safetensors"))
    assert_nothing_finished(output)

    for command in (("inspect", output), ("eval", output, "--text", made / "text.txt"), ("generate", output, "w1")):
        result = llmq(*command)
        words = (str(output), "not a checkpoint", "config.json", "unfinished run")
        assert_fails(result.exit_code, result.stdout, result.stderr, *words)

    result = llmq("quantize", made / "model", "--output", output, *SMALL, "--method", "rtn")
    assert result.exit_code == 0, result.stderr
    assert not (output / STAGING).exists()
    assert (output / "config.json").is_file()


# --- numbers that no solver can use


def test_too_many_layers_without_a_usable_hessian(
    made: Path, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]
) -> None:
    monkeypatch.setattr(sys.modules["llmq.solvers.gptq"], "factorize", lambda h, damp_percent: None)
    fails(made / "model", words=("14 of 14", "Hessian", "max_fallback"))


def test_error_of_several_lines_is_printed_on_one(
    made: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]
) -> None:
    def resolve(_: object) -> None:
        raise package.CheckpointError("first line\n   second line")

    monkeypatch.setattr("llmq.preflight.resolve", resolve)
    fails(made / "model", words=("error: first line second line",))


def test_debug_shows_the_traceback(tmp_path: Path, output: Path) -> None:
    with pytest.raises(package.CheckpointError):
        llmq("quantize", tmp_path / "nowhere" / "at" / "all", "--output", output, "--debug")


def test_learned_positions_bound_the_windows(tmp_path: Path, fails: Callable[..., None]) -> None:
    from tiny_models import make_model

    config = GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    folder = make_model(tmp_path / "gpt2", config)
    fails(folder, words=("64 tokens", "32 positions", "--seq-len 32"))


def test_recipe_command_refuses_what_quantize_refuses(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"bits": "many"}))
    result = llmq("recipe", "--recipe", file)
    assert_fails(result.exit_code, result.stdout, result.stderr, "bits", "'many'", expected=2)
