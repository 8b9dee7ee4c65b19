"""Ways to damage a packed folder that was sound."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.formats import bits as bitstream

Tensors = dict[str, Tensor]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
AWQ = [0, 2, 4, 6, 1, 3, 5, 7]


def tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    """Return what changes the tensors of a folder of one shard."""

    def run(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})

    return run


def each(ending: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Return what changes all tensors whose names have this ending."""

    def run(content: Tensors) -> None:
        for key in [key for key in content if key.endswith(ending)]:
            content[key] = change(content[key]).contiguous()

    return tensors(run)


def one(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return tensors(lambda content: content.update({key: change(content[key]).contiguous()}))


def without(*words: str) -> Callable[[Path], None]:
    """Return what removes the tensors whose names contain one of `words`."""
    return tensors(lambda c: [c.pop(key) for key in list(c) if any(word in key for word in words)])


def settings(**changed: Any) -> Callable[[Path], None]:
    """Return what changes quantization_config in both places; None removes a key."""

    def run(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        new = {**config["quantization_config"], **changed}
        config["quantization_config"] = {key: value for key, value in new.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        if (folder / "quantize_config.json").exists():
            (folder / "quantize_config.json").write_text(json.dumps(config["quantization_config"]))

    return run


def scheme(**changed: Any) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= changed
        (folder / "config.json").write_text(json.dumps(config))

    return run


def add_to_zeros(amount: int, awq: bool = True) -> Callable[[Tensor], Tensor]:
    def change(words: Tensor) -> Tensor:  # nibbles in any order
        packed = words if awq else words.T
        codes = bitstream.unpack(packed.contiguous(), 4, packed.shape[1] * 8).int() + amount
        new = bitstream.pack(codes.clamp(0, 15).to(torch.uint8), 4)
        return new if awq else new.T

    return change


def reorder(order: list[int], *, along: int = 1) -> Callable[[Tensor], Tensor]:
    """Return what makes nibble j of words what nibble order[j] was."""

    def change(words: Tensor) -> Tensor:
        packed = words if along else words.T
        codes = bitstream.unpack(packed.contiguous(), 4, packed.shape[1] * 8)
        mixed = codes.reshape(len(codes), -1, 8)[:, :, order].reshape(codes.shape).contiguous()
        new = bitstream.pack(mixed, 4)
        return new if along else new.T

    return change


def linear(words: Tensor) -> Tensor:
    """Return AWQ's words with outputs one after the other."""
    return reorder([AWQ.index(j) for j in range(8)])(words)


def shuffle_groups(folder: Path) -> None:
    def change(index: Tensor) -> Tensor:
        return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]

    each("g_idx", change)(folder)


def random_words(words: Tensor) -> Tensor:
    return torch.randint(-(2**31), 2**31, words.shape, generator=torch.Generator().manual_seed(0)).to(torch.int32)


def constant_rows(words: Tensor) -> Tensor:
    return torch.cat([torch.full_like(words[:, :8], 0x33333333), words[:, 8:]], dim=1)


def ends(words: Tensor) -> Tensor:
    return torch.where(words % 2 == 0, words | 0x0F0F0F0F, words & 0x0F0F0F0F)


def dense(content: Tensors, module: str, shape: tuple[int, int]) -> None:
    for key in [key for key in content if key.startswith(f"{module}.")]:
        content.pop(key)
    content[f"{module}.weight"] = torch.zeros(shape)


def with_index(change: Callable[[Path, dict[str, str]], object]) -> Callable[[Path], None]:
    """Return what cuts a folder in two shards with an index, and changes it."""

    def run(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        half = len(content) // 2
        weight_map: dict[str, str] = {}
        for number, keys in enumerate((list(content)[:half], list(content)[half:])):
            name = f"model-{number + 1:05d}-of-00002.safetensors"
            save_file({key: content[key] for key in keys}, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(keys, name)
        change(folder, weight_map)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return run


def no_index(folder: Path) -> None:
    with_index(lambda *_: None)(folder)
    (folder / "model.safetensors.index.json").unlink()


def again(folder: Path) -> None:
    """Add a shard with a tensor that the other has, too."""
    content = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    name = "model.norm.weight"
    save_file({name: content[name]}, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    index = dict.fromkeys(content, "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def stale(folder: Path) -> None:
    file = folder / "quantize_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "group_size": 64}))


def remove(*names: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return run


def others(*actions: Callable[[Path], None]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        for action in actions:
            action(folder)

    return run


def other_head(content: Tensors) -> None:
    content["lm_head.weight"] = content["model.embed_tokens.weight"] * 1.1
