"""Other people's loaders that the tests' own environment has: their processes compute what our codes stand for."""

from pathlib import Path

import pytest
import torch
from verify_cases import pack

from llmq.packed import PackedCheckpoint
from llmq.verify.calling import Loader, call
from llmq.verify.comparing import EXACT, compare
from llmq.verify.reference import logits, reference_model

IDS = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("bits", "sym"), [(4, False), (3, True)], ids=["4 bits asym", "3 bits sym"])
def test_transformers_alone_loads_compressed_tensors(dense: Path, tmp_path: Path, bits: int, sym: bool) -> None:
    folder = pack(dense, tmp_path, format="compressed-tensors", bits=bits, sym=sym)
    outcome = call(Loader("transformers"), folder, IDS, new=3, seconds=300)
    assert outcome.refused is None
    assert outcome.logits is not None
    assert "compressed-tensors" in outcome.versions
    found = compare(logits(reference_model(PackedCheckpoint(folder)), IDS), outcome.logits)
    assert found.relative is not None
    assert found.relative < EXACT
    assert len(outcome.new) == 3
