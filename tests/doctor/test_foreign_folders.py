"""Folders that other tools wrote (scripts/make_foreign_checkpoints.py): llmq reads them, the doctor is content."""

from pathlib import Path

import pytest
import torch

import llmq
from llmq.doctor import NOTE, diagnose
from llmq.packed import PackedCheckpoint

DATA = Path(__file__).parents[1] / "data" / "foreign"
FOLDERS = sorted(path.parent.name for path in DATA.glob("*/config.json"))
IDS = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def test_every_tool_is_there() -> None:
    assert {name.partition("-")[0] for name in FOLDERS} == {"autoround", "gptqmodel", "llmcompressor"}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_sound_folder_of_another_tool(name: str) -> None:
    assert [f.line() for f in diagnose(DATA / name) if f.severity != NOTE] == []
    packed = PackedCheckpoint(DATA / name)
    assert len(packed.layers) == (7 if name.startswith("autoround-label") else 14)  # blocks differ
    for module in packed.layers:
        assert packed.dequantized(module).std() < 0.2  # weights of standard deviation 0.1 were quantized
    with torch.no_grad():
        assert llmq.load(DATA / name, dtype=torch.float32)(IDS).logits.isfinite().all()
