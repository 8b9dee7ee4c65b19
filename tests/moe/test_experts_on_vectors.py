"""Mixtures of experts on codebooks of vectors: quantized, loaded, run, saved, and taken up after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_cases import EXPERTS, dequantized, make_moe, windows
from safetensors.torch import load_file

import llmq
from llmq.driver import quantize
from llmq.grids.vq import VectorWeight
from llmq.moe import banks_of
from llmq.nn import QuantLinear
from llmq.packed_experts import is_gathered
from llmq.recipe import make_recipe

IDS = torch.randint(1, 128, (2, 20), generator=torch.Generator().manual_seed(1))


class Stop(Exception):  # noqa: N818  not an error
    """What a kill is played by."""


def run(folder: Path, source: Path, progress: Any = lambda _: None, **fields: Any) -> Path:
    recipe = make_recipe({"bits": 1, "refine_rounds": 1, "method": "weighted_rtn", **fields})
    quantize(source, folder, recipe, calibration=windows(4, 24), progress=progress)
    return folder


@pytest.mark.parametrize(
    ("name", "grid", "method"),
    [("qwen3_moe", "vq2", "gptq"), ("mixtral", "vq4", "weighted_rtn"), ("gpt_oss", "vq8", "rtn")],
)
def test_experts_on_vectors_equal_their_dequantized_selves(name: str, grid: str, method: str, tmp_path: Path) -> None:
    source = make_moe(tmp_path / "dense", name)
    packed = run(tmp_path / "packed", source, grid=grid, method=method)
    model = llmq.load(packed)
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 2 * (4 + 3 * EXPERTS)
    assert all(isinstance(module.quantized_weight(), VectorWeight) for module in linears)
    with torch.no_grad():
        together = model(IDS).logits
        # the same weights; gate and up are one product there and two here
        torch.testing.assert_close(together, dequantized(source, model)(IDS).logits, rtol=1e-4, atol=1e-4)
        banks = banks_of(model).values()
        assert all(is_gathered(bank) for bank in banks)
        for bank in banks:
            bank.together = None
        torch.testing.assert_close(model(IDS).logits, together, rtol=1e-5, atol=1e-5)  # the same products, alone
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


def test_a_bank_that_was_interrupted_ends_in_the_same_bytes(tmp_path: Path) -> None:
    source = make_moe(tmp_path / "dense", "qwen3_moe")
    whole = run(tmp_path / "whole", source, grid="vq2")

    def stop(event: Any) -> None:
        if event.layer is not None and event.layer.name.endswith("1.mlp.experts.3.up_proj"):
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "stopped", source, stop, grid="vq2")
    run(tmp_path / "stopped", source, grid="vq2")
    assert (whole / "model.safetensors").read_bytes() == (tmp_path / "stopped/model.safetensors").read_bytes()


def test_an_expert_without_tokens_is_rounded_to_nearest(tmp_path: Path) -> None:
    source = make_moe(tmp_path / "dense", "gpt_oss", never=2)
    recipe = make_recipe({"bits": 1, "refine_rounds": 1, "method": "weighted_rtn", "grid": "vq2"})
    report = quantize(source, tmp_path / "packed", recipe, calibration=windows(4, 24))
    assert [bank.rounded for bank in report.experts] == [[2], [2]]
    with torch.no_grad():
        assert llmq.load(tmp_path / "packed")(IDS).logits.isfinite().all()
