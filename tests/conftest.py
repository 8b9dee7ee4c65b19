"""What all tests share."""

import os
import sys

# Triton kernels run in the interpreter, without a GPU (TRITON_INTERPRET=0 runs the same tests on one). It is
# read when a kernel is defined, so it is set before anything is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# No deadline: a first call may import half of torch. Derandomized: the same run fails or passes everywhere.
settings.register_profile("llmq", deadline=None, derandomize=True)
settings.load_profile("llmq")


@pytest.fixture(autouse=True)
def _compiled_afresh() -> Iterator[None]:
    """Forget what a test has compiled: one method is compiled for so many objects, and then no more."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty and torch.empty_like return NaN, so that unwritten output fails every comparison."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this a machine without native kernels, whose place PyTorch's operators and the reference take."""
    from llmq_kernels.native import build

    monkeypatch.setattr(build, "_library", lambda *_: build.BuildError("not in this test"))
