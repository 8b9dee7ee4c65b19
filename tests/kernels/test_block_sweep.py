"""GPTQ with its column loop in the kernel against GPTQ with the loop in PyTorch, whole solver and single blocks."""

from __future__ import annotations

import importlib
from typing import Any, cast

import pytest
import torch
from column_loop import eager_block
from kernel_cases import DEVICE
from torch import Tensor

from llmq import gpu as gpus
from llmq.block_sweep import MAX_COLUMNS, Block, cuda_block, runs_on
from llmq.grids.uniform import UniformGrid
from llmq.hessian import factorize
from llmq.solvers import SOLVERS
from llmq.types import Grid, QuantizedWeight

sweep = importlib.import_module("llmq.solvers.sweep")  # by this name the package may hold a function

UNIFORM_GRIDS = [
    UniformGrid(4, symmetric=False),
    UniformGrid(4, symmetric=True),
    UniformGrid(3, symmetric=True, sym_range="gptq"),
    UniformGrid(3, symmetric=True, sym_range="restricted"),
    UniformGrid(2, symmetric=False),
    UniformGrid(8, symmetric=True),
]


def layer(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return weights [n, k], and the Hessian [k, k] of inputs that share directions."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.7 * torch.randn(k, k, generator=draw) / k**0.5
    x = torch.randn(8 * k, k, generator=draw) @ mix
    return torch.randn(n, k, generator=draw).to(DEVICE), (2 * x.T @ x / len(x)).to(DEVICE)


@pytest.mark.parametrize("grid", UNIFORM_GRIDS, ids=str)
def test_a_block_is_rounded_to_the_grid_that_is_given(grid: UniformGrid) -> None:
    b, n, groups = 40, 33, 4
    w, h = layer(n, b, seed=1)
    factor = factorize(h, 0.01)
    assert factor is not None
    draw = torch.Generator().manual_seed(2)
    placed = [grid.fit(w[:, g::groups]) for g in range(groups)]
    scales, zeros = (torch.cat(parts, dim=1).T.contiguous() for parts in zip(*(at[:2] for at in placed), strict=True))
    results = []
    for run in (eager_block, cuda_block):
        block = Block(
            w.T.contiguous(),
            torch.randn(b, n, generator=torch.Generator().manual_seed(3)).to(DEVICE) / 8,
            factor.r,
            torch.randint(0, groups, (b,), generator=draw.manual_seed(4)).to(DEVICE),
            torch.empty(b, n, dtype=torch.uint8, device=DEVICE),
            torch.full((b, n), float("nan"), device=DEVICE),
        )
        run(block, scales, zeros, grid)
        results.append(block)
    expected, found = results
    # One weight in 1e5 is as near to a tie as float32 is inexact, and takes the rest of its row along.
    same = (found.codes == expected.codes).all(0)
    assert same.sum() >= n - 1
    # Scales have 8 bits, so that a level is exact and its difference from the weight rounds once.
    assert torch.equal(found.errors[:, same], expected.errors[:, same])
    assert found.codes.min() == int(grid.symmetric and grid.sym_range == "restricted")
    assert found.codes.max() == 2**grid.bits - 1


@pytest.mark.parametrize(
    ("k", "group_size", "order"),
    [(160, 160, "act"), (130, 128, "natural"), (70, 32, "act"), (70, 32, "natural"), (31, 7, "natural")],
)
def test_the_solver_with_the_kernel_is_the_solver_without(
    monkeypatch: pytest.MonkeyPatch, k: int, group_size: int, order: str
) -> None:
    w, h = layer(5, k, seed=k)
    options: dict[str, Any] = {"order": order, "scale_search": "hessian"}
    grid = UniformGrid(3, symmetric=False)
    blocks: list[int] = []

    def counted(block: Block, *args: Any) -> None:
        blocks.append(len(block.w))
        cuda_block(block, *args)

    monkeypatch.setattr(sweep, "cuda_block", counted)
    results = []
    for fused in (False, True):
        monkeypatch.setattr(sweep, "runs_on", lambda device, grid, fused=fused: fused)
        assert not blocks
        results.append(SOLVERS["gptq"].run(w, h, grid, group_size, **options).weight)
    assert sum(blocks) == k
    assert len(blocks) <= 2 * -(-k // min(MAX_COLUMNS, group_size if order == "natural" else k))
    assert different_rows(*results) <= 1  # see above


def different_rows(a: QuantizedWeight, b: QuantizedWeight) -> int:
    """Return the number of rows that are not equal in every code, scale and zero."""
    pairs = ((a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros))
    return int(torch.stack([(x != y).any(1) for x, y in pairs]).any(0).sum())


def test_the_kernel_is_for_uniform_grids_on_gpus_that_triton_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, grid = torch.device("cuda"), UniformGrid(4, symmetric=True)
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runs_on(gpu, grid)
    assert not runs_on(torch.device("cpu"), grid)
    assert not runs_on(torch.device("meta"), grid)
    assert not runs_on(gpu, cast(Grid, object()))
    capability = (7, 5)
    assert not runs_on(gpu, grid)
    capability = (9, 0)
    monkeypatch.setattr(gpus, "find_spec", lambda name: None)
    assert not runs_on(gpu, grid)
