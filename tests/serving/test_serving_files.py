"""Files that must not load, or that others wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from serving_cases import layers
from tolerance import assert_close_to_float64

import llmq
from llmq.errors import CheckpointError


def drop(suffix: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        del tensors[next(key for key in tensors if key.endswith(suffix))]

    return change


def reshape(tensors: dict[str, Any]) -> None:
    key = next(key for key in tensors if key.endswith("o_proj.scales"))
    tensors[key] = tensors[key].T.contiguous()


def stray(tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if "layers.0.self_attn.q_proj." in key]:
        tensors[key.replace("layers.0", "layers.7")] = tensors[key].clone()


def act_order(tensors: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith("g_idx")]:
        tensors[key] = tensors[key][torch.randperm(len(tensors[key]), generator=draw)]


def uneven_groups(tensors: dict[str, Any]) -> None:
    key = next(key for key in tensors if key.endswith("g_idx"))
    tensors[key][0] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("qzeros"), r"proj: qzeros is missing"),
        (drop("scales"), r"proj: scales is missing"),
        (drop("q_proj.qweight"), r"q_proj\.\w+ is there, but no .*q_proj\.qweight"),
        (drop("input_layernorm.weight"), r"tensor .*input_layernorm.weight is missing"),
        (reshape, r"o_proj: scales is torch.float16 \[64, 2\]; a layer of 64 outputs and 64 inputs at 4 bits"),
        (stray, r"model.layers.7.self_attn.q_proj belongs to no linear layer"),
        (uneven_groups, r"proj: g_idx puts 3[13] of 128 columns into group"),
    ],
    ids=["zeros", "scales", "codes", "norm", "shape", "stray", "uneven groups"],
)
def test_damaged_packed_tensors_are_errors(broken: Callable[..., Path], change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        llmq.load(broken(change))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"bits": 8}, "at 8 bits"),
        ({"group_size": 64}, "group_size 64"),
        ({"checkpoint_format": "marlin", "format": "marlin"}, "unknown checkpoint_format 'marlin'"),
    ],
    ids=str,
)
def test_configuration_that_contradicts_the_tensors_is_an_error(
    broken: Callable[..., Path], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        llmq.load(broken(**config))


def test_folder_without_config_is_not_a_checkpoint(broken: Callable[..., Path]) -> None:
    folder = broken()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        llmq.load(folder)


def test_old_files_without_g_idx_load(broken: Callable[..., Path], packed: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if key.endswith("g_idx")]:
            del tensors[key]

    ids = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(llmq.load(broken(change))(ids).logits, llmq.load(packed())(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_foreign_act_order_is_honoured_and_saved_again(broken: Callable[..., Path], dtype: torch.dtype) -> None:
    folder = broken(act_order)
    content = load_file(folder / "model.safetensors")
    model = llmq.load(folder, dtype=dtype)
    for name, layer in layers(model).items():
        codes, zeros = (unpack_reference(content[f"{name}.{part}"], part) for part in ("qweight", "qzeros"))
        g_idx, scales = content[f"{name}.g_idx"].long(), content[f"{name}.scales"].double()
        weight = scales[g_idx] * (codes - (zeros[g_idx] + 1))  # [K, N], as the layout has it
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert_close_to_float64(layer(x), x.double() @ weight, layer.in_features)
    saved = model.state_dict()
    assert all(torch.equal(saved[key], tensor) for key, tensor in content.items() if "proj" in key)


def unpack_reference(words: torch.Tensor, part: str) -> torch.Tensor:
    """Return the 4-bit fields of int32 `words`, float64, along dim 0 of qweight and dim 1 of qzeros."""
    fields = torch.stack([(words.long() >> shift) & 15 for shift in range(0, 32, 4)], dim=-1).double()
    if part == "qweight":
        return fields.transpose(1, 2).reshape(-1, words.shape[1])
    return fields.reshape(words.shape[0], -1)
