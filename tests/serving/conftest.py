"""A tiny model, dense and packed, and damaged copies of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_llama

from llmq.calibration import Calibration
from llmq.driver import quantize
from llmq.recipe import Recipe


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the folder of `dense` rounded to these bits, groups and symmetry."""
    made: dict[Any, Path] = {}

    def make(bits: int = 4, group_size: int = 32, sym: bool = True, format: str = "gptq") -> Path:
        key = (bits, group_size, sym, format)
        if key not in made:
            ids = torch.randint(1, 128, (8, 32), generator=torch.Generator().manual_seed(0))
            made[key] = tmp_path_factory.mktemp("packed")
            recipe = Recipe(method="rtn", bits=bits, group_size=group_size, sym=sym, format=format)
            quantize(dense, made[key], recipe, calibration=Calibration(ids, None, "x", "y"))
        return made[key]

    return make


@pytest.fixture
def broken(packed: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a packed folder with its tensors or quantization_config changed."""

    def make(tensors: Callable[[dict[str, Any]], None] | None = None, **config: Any) -> Path:
        source = packed()
        content = load_file(source / "model.safetensors")
        if tensors:
            tensors(content)
        save_file(content, tmp_path / "model.safetensors", metadata={"format": "pt"})
        whole = json.loads((source / "config.json").read_text(encoding="utf-8"))
        whole["quantization_config"].update(config)
        (tmp_path / "config.json").write_text(json.dumps(whole), encoding="utf-8")
        return tmp_path

    return make
