"""Held-out windows from end to end: they judge what is done, and nothing is fitted to them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_llama
from torch import Tensor

from llmq.calibration import Calibration, split_held_out
from llmq.driver import quantize
from llmq.recipe import Recipe
from llmq.report import Report

# enough tokens for the widest layer (16 · 128) that no damping is chosen, and nothing that could be undone
FITTED: dict[str, Any] = {
    "bits": 3, "group_size": 32, "sym": False, "refine_rounds": 0, "shift": 0.0, "random_windows": 0.0,
    "damp_percent": 0.01,
}  # fmt: skip


def windows(count: int, seed: int = 0) -> Calibration:
    ids = torch.randint(1, 128, (count, 64), generator=torch.Generator().manual_seed(seed))
    return Calibration(ids, None, "random tokens", "none")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("held_out") / "model")


def run(model: Path, output: Path, calibration: Calibration, **fields: Any) -> tuple[dict[str, Tensor], Report]:
    report = quantize(model, output, Recipe(**{**FITTED, **fields}), calibration=calibration)
    return load_file(output / "model.safetensors"), report


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def with_other(calibration: Calibration, rows: Tensor) -> Calibration:
    """Return `calibration` with other tokens in the windows `rows`."""
    ids = calibration.input_ids.clone()
    ids[rows] = windows(len(ids), seed=99).input_ids[rows]
    return Calibration(ids, None, "random tokens", "none")


def judges(calibration: Calibration) -> Tensor:
    """Return which windows the default recipe holds out, bool [S]."""
    held_out = split_held_out(calibration, 0.1, 0)[1]
    assert held_out is not None
    return torch.stack([(row == held_out.input_ids).all(dim=1).any() for row in calibration.input_ids])


@pytest.mark.parametrize("fields", [{}, {"guidance_groups": 2}, {"shift": 1.0}], ids=str)
def test_nothing_is_fitted_to_them(model: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    calibration = windows(40)
    rows = judges(calibration)
    assert int(rows.sum()) == 4
    first, report = run(model, tmp_path / "first", calibration, **fields)
    assert report.calibration is not None
    assert (report.calibration["samples"], report.calibration["held_out_samples"]) == (40, 4)
    if not fields.get("shift"):  # which they may undo
        other, judged = run(model, tmp_path / "judges", with_other(calibration, rows), **fields)
        assert same(first, other)
        for a, b in zip(report.layers, judged.layers, strict=True):
            assert (a.loss, a.tokens, a.damp_percent) == (b.loss, b.tokens, b.damp_percent)
            assert a.held_out_loss != b.held_out_loss
    refitted, _ = run(model, tmp_path / "train", with_other(calibration, ~rows), **fields)
    assert not same(first, refitted)


@pytest.mark.parametrize("fields", [{}, {"shift": 1.0}], ids=str)
def test_a_share_of_none_uses_every_window_and_undoes_nothing(
    model: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    calibration = windows(40)
    train, _ = split_held_out(calibration, 0.1, 0)
    alone, report = run(model, tmp_path / "alone", train, held_out=0, refine_rounds=2, **fields)
    assert report.calibration is not None
    assert report.calibration["held_out_samples"] == 0
    for layer in report.layers:
        assert (layer.held_out_loss, layer.undone, layer.damp_percent) == (None, (), 0.01)
        assert layer.tokens == 36 * 64
    # the same windows with others beside them that only judge, and find nothing to judge
    if not fields:
        fitted, _ = run(model, tmp_path / "fitted", train, held_out=0)
        judged, _ = run(model, tmp_path / "judged", calibration)
        assert same(fitted, judged)
    whole, report = run(model, tmp_path / "whole", calibration, held_out=0, refine_rounds=2, **fields)
    assert all(layer.tokens == 40 * 64 for layer in report.layers)
    assert not same(alone, whole)


def test_few_tokens_without_judges_keep_the_recipes_damping(model: Path, tmp_path: Path) -> None:
    _, report = run(model, tmp_path / "none", windows(4), held_out=0)
    assert {layer.damp_percent for layer in report.layers} == {0.01}
    _, report = run(model, tmp_path / "some", windows(4))
    assert {layer.damp_percent for layer in report.layers} - {0.01}


def test_a_single_window_judges_nothing(model: Path, tmp_path: Path) -> None:
    _, report = run(model, tmp_path / "out", windows(1))
    assert report.calibration is not None
    assert report.calibration["held_out_samples"] == 0
    assert all(layer.held_out_loss is None for layer in report.layers)
