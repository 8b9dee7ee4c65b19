"""What the tests of this folder share."""

from pathlib import Path

import pytest
from export_cases import SIZES, Packed, make_folder, pack_linears
from transformers import LlamaConfig


@pytest.fixture
def llama(tmp_path: Path) -> Packed:
    """A Llama in folder "m", in 4 bits and groups of 32."""
    return pack_linears(make_folder(tmp_path / "m", LlamaConfig(**SIZES)))
