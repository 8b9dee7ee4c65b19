"""What the tests of this folder share."""

from collections.abc import Callable
from pathlib import Path

import pytest
from export_cases import SIZES, Packed, make_folder, pack_linears
from onnx_cases import CASES, Exported, shuffle, watched
from tiny_models import make_model
from transformers import LlamaConfig

from llmq.driver import quantize
from llmq.packed import PackedCheckpoint
from llmq.recipe import Recipe


@pytest.fixture
def llama(tmp_path: Path) -> Packed:
    """A Llama in folder "m", in 4 bits and groups of 32."""
    return pack_linears(make_folder(tmp_path / "m", LlamaConfig(**SIZES)))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Return a function that gives a case exported."""
    made: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in made:
            case, folder = CASES[name], tmp_path_factory.mktemp(name)
            make_model(folder / "dense", case.config, dtype=case.dtype)
            quantize(folder / "dense", folder / "packed", Recipe(**{"method": "rtn", "group_size": 32, **case.recipe}))
            if name == "llama":
                shuffle(folder / "packed")
            with pytest.MonkeyPatch.context() as patch:
                made[name] = watched(PackedCheckpoint(folder / "packed"), folder / "onnx", patch)
        return made[name]

    return make
