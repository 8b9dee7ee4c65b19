"""Banks of experts, and what is around them, come out the same whether parts of blocks are replayed or not."""

from pathlib import Path
from typing import Any

import pytest
from moe_cases import CONFIGS, make_moe, windows

from llmq.driver import quantize
from llmq.recipe import Recipe
from llmq.stream import Stream

RECIPE = Recipe(group_size=32, refine_rounds=0, scale_search="none")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_bytes_do_not_depend_on_replays(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, start = make_moe(tmp_path / "dense", name), Stream.start.__func__  # type: ignore[attr-defined]
    streams: list[Stream] = []

    def quantized(replays: bool) -> bytes:
        def started(cls: type[Stream], *args: Any, **options: Any) -> Stream:
            streams.append(start(cls, *args, **options | {"replays": replays, "batch_tokens": 96}))
            return streams[-1]

        monkeypatch.setattr(Stream, "start", classmethod(started))
        quantize(source, tmp_path / str(replays), RECIPE, calibration=windows(9))
        return (tmp_path / str(replays) / "model.safetensors").read_bytes()

    assert quantized(True) == quantized(False)
    assert [stream.replays for stream in streams] == [True, False], "no comparison has failed"
