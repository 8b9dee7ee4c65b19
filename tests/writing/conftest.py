"""What the tests of writing share."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let os.fsync do nothing but look at its file: no test can pull the plug."""
    monkeypatch.setattr("os.fsync", os.fstat)
