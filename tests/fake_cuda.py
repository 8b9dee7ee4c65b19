"""As much of torch.cuda as a capture calls, on a machine without a GPU: it records, and a replay only counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch


class FakeCuda:
    """What happened: "side" and "capture" while in them, "replay" for each replay."""

    def __init__(self) -> None:
        self.where = "host"
        self.replays = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Take the place of torch.cuda's functions."""
        patch.setattr(torch.cuda, "Stream", lambda *_: self)
        patch.setattr(torch.cuda, "current_stream", lambda *_: self)
        patch.setattr(torch.cuda, "device", lambda *_: nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(torch.cuda, "stream", lambda stream: self.inside("side"))
        patch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        patch.setattr(torch.cuda, "graph", lambda graph, stream=None: self.inside("capture"))
        patch.setattr(torch.cuda, "Event", lambda enable_timing: self)

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Be somewhere for a while."""
        assert self.where == "host"
        self.where = name
        yield
        self.where = "host"

    def replay(self) -> None:
        """Count."""
        self.replays += 1

    def wait_stream(self, other: Any) -> None:
        """Do nothing."""

    def record(self) -> None:
        """Do nothing."""

    def elapsed_time(self, end: Any) -> float:
        """Return 1000 milliseconds for each replay so far."""
        return 1000.0 * self.replays
