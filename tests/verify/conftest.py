from pathlib import Path

import pytest
from tiny_models import make_llama
from verify_cases import pack


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("verify") / "dense")


@pytest.fixture(scope="session")
def packed(dense: Path) -> Path:
    return pack(dense, dense.parent / "packed", sym=False)
