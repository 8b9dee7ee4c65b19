import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_fails, llmq

from llmq.cli.adapter import adapter_command
from llmq.driver import quantize
from llmq.recipe import Recipe

SMALL = ("--num-samples", 8, "--seq-len", 32)


@pytest.fixture
def packed(dense_folder: Callable[[int], Path], tmp_path: Path) -> Path:
    quantize(dense_folder(0), tmp_path / "packed", Recipe(method="rtn", bits=3, group_size=32, ignore=("[kv]_proj",)))
    return tmp_path / "packed"


def test_it_writes_an_adapter_beside_the_packed_folder(
    invoke: Callable[..., Any], dense_folder: Callable[[int], Path], packed: Path, text_file: Path
) -> None:
    dense = dense_folder(0)
    result = invoke(adapter_command, packed, "--original", dense, "--rank", 4, "--calibration", text_file, *SMALL)
    assert result.exit_code == 0, result.stderr
    output = packed.parent / "packed-adapter-r4"
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 4
    assert "10, rank 4" in result.stdout
    # float32 factors, per block 2 layers of 32 outputs and inputs and 3 of 64 and 32 or 32 and 64
    shapes = [(32, 32)] * 2 + [(64, 32)] * 3
    bits = 32 * 4 * sum(n + k for n, k in shapes) / sum(n * k for n, k in shapes)
    assert f"{bits:.2f} bits per packed weight" in result.stdout
    assert result.stderr.count("loss x 0.") == 10
    assert str(output) in "".join(result.stdout.split())  # long paths are folded


def test_json_has_the_losses_of_every_layer(
    invoke: Callable[..., Any], dense_folder: Callable[[int], Path], packed: Path, text_file: Path, tmp_path: Path
) -> None:
    options = ("--rank", 2, "--calibration", text_file, *SMALL, "--output", tmp_path / "mine", "--json")
    result = invoke(adapter_command, packed, "--original", dense_folder(0), *options)
    found = json.loads(result.stdout)
    assert (found["rank"], found["output"]) == (2, str(tmp_path / "mine"))
    assert len(found["layers"]) == 10
    assert all(0 < layer["loss_after"] < layer["loss_before"] < layer["energy"] for layer in found["layers"])
    assert (tmp_path / "mine" / "adapter_model.safetensors").exists()


def test_windows_depend_on_the_seed_alone(
    invoke: Callable[..., Any], dense_folder: Callable[[int], Path], packed: Path, text_file: Path, tmp_path: Path
) -> None:
    def losses(name: str, seed: int) -> object:
        options = ("--rank", 2, "--calibration", text_file, *SMALL, "--output", tmp_path / name, "--json")
        result = invoke(adapter_command, packed, "--original", dense_folder(0), *options, "--seed", seed)
        return json.loads(result.stdout)["layers"]

    first = losses("a", 1)
    assert losses("b", 1) == first
    assert losses("c", 2) != first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rank", 0), ("--rank 0", "use 1 to 32")),
        (("--rank", 33), ("--rank 33", "model.layers.0.self_attn.q_proj", "use 1 to 32")),
        (("--dtype", "int8"), ("dtype", "int8")),
        (("--device", "tpu"), ("--device tpu",)),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    dense_folder: Callable[[int], Path],
    packed: Path,
    text_file: Path,
    options: tuple[object, ...],
    words: tuple[str, ...],
) -> None:
    common = ("--original", dense_folder(0), "--calibration", text_file, *SMALL)
    result = llmq("adapter", packed, *common, *options)
    assert_fails(result.exit_code, result.stdout, result.stderr, *words, expected=2)
    assert [path.name for path in packed.parent.iterdir()] == ["packed"]


def test_an_output_that_exists_is_found_before_any_work(
    dense_folder: Callable[[int], Path], packed: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    # neither the calibration nor the original would be found
    options = ("--original", tmp_path / "nowhere", "--calibration", "no.txt", "--output", tmp_path / "full")
    result = llmq("adapter", packed, *options)
    assert_fails(result.exit_code, result.stdout, result.stderr, "full", "exists", "--output")


def test_a_dense_folder_is_refused(dense_folder: Callable[[int], Path]) -> None:
    result = llmq("adapter", dense_folder(0), "--original", dense_folder(0), "--rank", 4)
    assert_fails(result.exit_code, result.stdout, result.stderr, "give a packed folder")
