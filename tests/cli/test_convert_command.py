import json
from pathlib import Path

import pytest
from command_line import assert_fails, llmq
from tiny_models import make_llama

from llmq.driver import quantize
from llmq.recipe import Recipe


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    quantize(make_llama(folder / "dense"), folder / "gptq", Recipe(method="rtn", group_size=32))
    return folder / "gptq"


def test_a_folder_goes_into_another_format(packed: Path, tmp_path: Path) -> None:
    result = llmq("convert", packed, "--format", "awq", "--output", tmp_path / "awq", "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["format"] == "awq"
    assert said["layers"] == 14
    assert said["rounded"] == {}
    shown = llmq("inspect", tmp_path / "awq").stdout
    assert "4 bits" in shown
    assert "awq" in shown


def test_weights_become_ordinary_ones(packed: Path, tmp_path: Path) -> None:
    result = llmq("convert", packed, "--dequantize", "--output", tmp_path / "dense")
    assert result.exit_code == 0, result.stderr
    assert "rounded to the model's dtype" in result.stdout
    assert "nothing is quantized" in llmq("inspect", tmp_path / "dense").stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give either --format or --dequantize"),
        (("--format", "awq", "--dequantize"), "give either --format or --dequantize"),
        (("--format", "exl3"), "unknown format 'exl3'; there are gptq"),
        (("--format", "awq", "--shard-size", "much"), "--shard-size much: "),
    ],
)
def test_bad_options_are_errors(packed: Path, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    result = llmq("convert", packed, "--output", tmp_path / "out", *options)
    assert_fails(result.exit_code, result.stdout, result.stderr, words, expected=2)
    assert not (tmp_path / "out").exists()


def test_a_dense_folder_is_refused(packed: Path, tmp_path: Path) -> None:
    result = llmq("convert", packed.parent / "dense", "--format", "awq", "--output", tmp_path / "out")
    assert_fails(result.exit_code, result.stdout, result.stderr, "nothing is packed")
    assert not (tmp_path / "out").exists()
