from pathlib import Path

import pytest
from quantize_runs import quantize
from tiny_models import make_llama, make_text


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `model`, `text.txt`, and `packed`: the model quantized by `SMALL`. Nobody writes to them."""
    folder = tmp_path_factory.mktemp("made")
    make_text(folder / "text.txt", 2000)
    make_llama(folder / "model")
    quantize(folder, folder / "packed")
    return folder
