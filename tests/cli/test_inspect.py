import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq.cli.inspect import inspect_command
from llmq.errors import CheckpointError

LAYERS = 3


def packed_linear(name: str, n: int, k: int, bits: int, group_size: int) -> dict[str, torch.Tensor]:
    return {
        f"{name}.qweight": torch.zeros(k * bits // 32, n, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(k // group_size, n * bits // 32, dtype=torch.int32),
        f"{name}.scales": torch.zeros(k // group_size, n, dtype=torch.float16),
        f"{name}.g_idx": torch.arange(k, dtype=torch.int32) // group_size,
    }


@pytest.fixture
def make_packed(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a packed folder of zeros; `quantization` changes its quantization_config."""

    def make(bits: int = 4, **quantization: Any) -> Path:
        tensors = {
            "model.embed_tokens.weight": torch.zeros(100, 64, dtype=torch.bfloat16),
            "model.norm.weight": torch.zeros(64, dtype=torch.bfloat16),
        }
        for i in range(LAYERS):
            tensors |= packed_linear(f"model.layers.{i}.mlp.down_proj", 64, 128, bits, 32)
            tensors |= packed_linear(f"model.layers.{i}.self_attn.q_proj", 64, 64, bits, 32)
            tensors[f"model.layers.{i}.self_attn.q_proj.bias"] = torch.zeros(64, dtype=torch.bfloat16)
            tensors[f"model.layers.{i}.input_layernorm.weight"] = torch.zeros(64, dtype=torch.bfloat16)
        config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": 32,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
        } | quantization
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        content = {"model_type": "llama", "quantization_config": config}
        (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return make


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_bytes_count_codes_scales_zeros_and_indices(
    invoke: Callable[..., Any], make_packed: Callable[..., Path], bits: int
) -> None:
    found = json.loads(invoke(inspect_command, make_packed(bits), "--json").stdout)
    packed = found["packed"]
    weights = LAYERS * 64 * (128 + 64)
    groups = weights // 32
    # codes, zeros, float16 scales, int32 indices of 128 + 64 inputs in each block
    size = (weights * bits + groups * bits + groups * 16 + LAYERS * 192 * 32) // 8
    assert packed["kinds"] == [{"grid": "uniform", "bits": bits, "group_size": 32, "sym": True, "layers": 2 * LAYERS}]
    assert packed["layers"] == 2 * LAYERS
    assert packed["weights"] == weights
    assert packed["bytes"] == size
    assert packed["bits_per_weight"] == pytest.approx(8 * size / weights)


def test_inventory_adds_up(invoke: Callable[..., Any], make_packed: Callable[..., Path]) -> None:
    folder = make_packed()
    found = json.loads(invoke(inspect_command, folder, "--json").stdout)
    assert found["model_type"] == "llama"
    assert found["dense_bytes"] == sum(group["bytes"] for group in found["dense"])
    assert found["total_bytes"] == found["dense_bytes"] + found["packed"]["bytes"]
    assert found["disk_bytes"] == (folder / "model.safetensors").stat().st_size > found["total_bytes"]


def test_dense_tensors_are_folded_over_blocks_largest_first(
    invoke: Callable[..., Any], make_packed: Callable[..., Path]
) -> None:
    found = json.loads(invoke(inspect_command, make_packed(), "--json").stdout)["dense"]
    assert found == [
        {"pattern": name, "count": count, "shape": shape, "dtype": "bfloat16", "bytes": size}
        for name, count, shape, size in (
            ("model.embed_tokens.weight", 1, [100, 64], 12800),
            ("model.layers.*.input_layernorm.weight", LAYERS, [64], 384),
            ("model.layers.*.self_attn.q_proj.bias", LAYERS, [64], 384),
            ("model.norm.weight", 1, [64], 128),
        )
    ]


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_version_is_that_of_the_checkpoint_format(
    invoke: Callable[..., Any], make_packed: Callable[..., Path], layout: str
) -> None:
    result = invoke(inspect_command, make_packed(checkpoint_format=layout), "--json")
    assert json.loads(result.stdout)["packed"]["format"] == layout


def test_layers_of_other_bits_are_listed_apart(invoke: Callable[..., Any], make_packed: Callable[..., Path]) -> None:
    folder = make_packed(dynamic={r"+:.*q_proj$": {"bits": 8}})
    tensors = load_file(folder / "model.safetensors")
    for i in range(LAYERS):
        tensors |= packed_linear(f"model.layers.{i}.self_attn.q_proj", 64, 64, 8, 32)
    save_file(tensors, folder / "model.safetensors")
    lines = [" ".join(line.split()) for line in invoke(inspect_command, folder).stdout.splitlines()]
    assert "4 bits groups of 32, symmetric, 3 layers" in lines
    assert "8 bits groups of 32, symmetric, 3 layers" in lines


def test_table_shows_what_a_person_asks_for(invoke: Callable[..., Any], make_packed: Callable[..., Path]) -> None:
    shown = invoke(inspect_command, make_packed(sym=False)).stdout
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "format gptq" in lines
    assert "4 bits groups of 32, asymmetric, 6 layers" in lines
    assert "desc_act no" in lines
    assert "packed layers 6" in lines
    assert "model.layers.*.input_layernorm.weight 3 64 bfloat16 384 B" in lines
    assert "model.embed_tokens.weight 1 100 x 64 bfloat16 12.8 kB" in lines


def test_a_dense_folder_is_called_dense(invoke: Callable[..., Any], dense_folder: Callable[[int], Path]) -> None:
    folder = dense_folder(0)
    found = json.loads(invoke(inspect_command, folder, "--json").stdout)
    assert found["packed"] is None
    assert found["dense_bytes"] == found["total_bytes"] > 0
    assert "dense, nothing is quantized" in invoke(inspect_command, folder).stdout


def test_no_tensor_is_read(
    invoke: Callable[..., Any], make_packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("llmq.checkpoint.CheckpointReader.read", read)
    assert invoke(inspect_command, make_packed()).exit_code == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "hqq"}, "says 'hqq'; llmq reads gptq"),
        ({"checkpoint_format": "marlin"}, "unknown checkpoint_format 'marlin'"),
        ({"bits": "four"}, "bits is 'four'; llmq reads"),
    ],
    ids=["method", "format", "bits"],
)
def test_what_llmq_does_not_read_is_refused(
    invoke: Callable[..., Any], make_packed: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    folder = make_packed()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        invoke(inspect_command, folder)


def test_packed_tensors_without_their_config_are_refused(
    invoke: Callable[..., Any], make_packed: Callable[..., Path]
) -> None:
    folder = make_packed()
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="quantization_config is missing, but 6 layers are packed"):
        invoke(inspect_command, folder)


def test_a_config_without_packed_tensors_is_refused(
    invoke: Callable[..., Any], make_packed: Callable[..., Path]
) -> None:
    folder = make_packed()
    save_file({"a.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor is named \*\.qweight"):
        invoke(inspect_command, folder)


@pytest.mark.parametrize("name", ["./missing/folder", "."], ids=["no folder", "no config"])
def test_what_is_no_checkpoint_is_refused(
    invoke: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such folder|no config\.json"):
        invoke(inspect_command, name)
