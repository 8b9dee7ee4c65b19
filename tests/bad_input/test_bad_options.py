"""Options, calibration and numbers that cannot be: one line that helps, and nothing that looks finished."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import SMALL, assert_fails, llmq
from damage import Q_PROJ
from tiny_models import make_llama
from transformers import GPT2Config

import llmq as package


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
        (("--method", "magic"), ("method 'magic'", "gptq, gptaq, obq")),
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
        ("beats: 4", ("beats", "fields are method, grid, bits")),
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


def test_too_many_layers_without_a_usable_hessian(
    made: Path, tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]
) -> None:
    monkeypatch.setattr(sys.modules["llmq.solvers.sweep"], "factorize", lambda *_: None)
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
