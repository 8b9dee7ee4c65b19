"""Small packed folders, their originals, and changed copies of both."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from llmq.driver import quantize
from llmq.recipe import Recipe


def pack(source: Path, folder: Path, **settings: Any) -> Path:
    """Quantize `source` to nearest."""
    quantize(source, folder, Recipe(**{"method": "rtn", "bits": 4, "group_size": 32, **settings}))
    return folder


def edited(source: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Copy a folder of one shard, its tensors changed."""
    shutil.copytree(source, folder)
    content = load_file(folder / "model.safetensors")
    change(content)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
