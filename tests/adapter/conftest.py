"""A dense model, its packed folders and an adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import RANK, SQUARE
from tiny_models import make_llama, make_text, make_tokenizer

from llmq.adapter import Adapter, compensate, open_pair, save
from llmq.calibration import Calibration, load_calibration
from llmq.driver import quantize
from llmq.recipe import Recipe


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    text = make_text(tmp_path_factory.mktemp("text") / "text.txt", 2000)
    return load_calibration(str(text), make_tokenizer(), num_samples=16, seq_len=64, seed=0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("dense"), **SQUARE)


@pytest.fixture(scope="module")
def packed(dense: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the folder of `dense` rounded to nearest, which depends on no solver's defaults."""
    made: dict[Any, Path] = {}

    def make(**settings: Any) -> Path:
        key = tuple(settings.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "model"
            recipe = Recipe(**{"method": "rtn", "bits": 4, "group_size": 32, "sym": False, **settings})
            quantize(dense, made[key], recipe, calibration=calibration)
        return made[key]

    return make


@pytest.fixture(scope="module")
def adapter(dense: Path, packed: Callable[..., Path], calibration: Calibration) -> Adapter:
    return compensate(open_pair(packed(), dense), calibration, RANK)


@pytest.fixture
def folder(adapter: Adapter, tmp_path: Path) -> Path:
    save(adapter, tmp_path / "adapter")
    return tmp_path / "adapter"
