"""Packed experts of several kinds: what keeps them from running at once, and what arranges them anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moe_cases import make_moe, windows

import llmq
from llmq.driver import quantize
from llmq.moe import Bank, banks_of
from llmq.nn import QuantLinear
from llmq.packed_experts import PackedExperts, gather_, is_gathered
from llmq.recipe import make_recipe


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """Return a bank whose linears have biases, rounded to nearest."""
    source = make_moe(tmp_path / "dense", "gpt_oss")
    recipe = make_recipe({"group_size": 32, "method": "rtn"})
    quantize(source, tmp_path / "packed", recipe, calibration=windows(2, 8))
    return next(iter(banks_of(llmq.load(tmp_path / "packed", dtype=torch.float32)).values()))


@torch.no_grad()
def test_another_dtype_arranges_anew_and_a_missing_bias_keeps_experts_apart(bank: Bank) -> None:
    linears = [module for module in bank.modules() if isinstance(module, QuantLinear)]
    assert isinstance(bank.together, PackedExperts)
    for dtype in (torch.float32, torch.bfloat16):
        assert bank.together._can_run(bank, dtype)
        assert {linear.prepared_for for linear in linears} == {dtype}
    for number in ("2", "0"):
        bank.get_submodule(number).down_proj.bias = None
        gather_(bank, torch.float32)
        assert not is_gathered(bank)
