"""Ways to damage a checkpoint folder, and to see what is in one."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.checkpoint import STAGING

INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN_PROJ = "model.layers.1.mlp.down_proj"


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
    """Return all files at and below `folder`, by their place, but for those of an unfinished run."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and STAGING not in file.parts)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
