"""`llmq kernels` and what it shows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import llmq as run
from native_cases import needs_compiler
from tiny_models import make_llama

from llmq import ops
from llmq.calibration import Calibration
from llmq.choices import choices
from llmq.driver import quantize
from llmq.recipe import Recipe
from llmq_kernels import native
from llmq_kernels.native import build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense, made = make_llama(tmp_path_factory.mktemp("dense")), tmp_path_factory.mktemp("packed")
    ids = torch.randint(1, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    quantize(dense, made, Recipe(method="rtn", bits=4, group_size=32), calibration=Calibration(ids, None, "x", "y"))
    return made


@pytest.mark.usefixtures("no_native")
def test_layers_of_one_shape_are_one_line_with_all_refusals(folder: Path) -> None:
    found = choices(folder, CPU, torch.float32)
    assert [choice.layers for choice in found] == sorted((choice.layers for choice in found), reverse=True)
    assert len({choice.layer for choice in found}) == len(found)
    assert sum(choice.layers for choice in found) == 14
    for choice in found:
        assert choice.kernel == "reference"
        assert list(choice.refused) == list(ops.KERNELS)[:-1]
        assert choice.refused["cpu_native"] == "torch.float32 activations: multiplies bfloat16"
        assert choice.refused["cpu_native_float"] == "not in this test"
        assert choice.paths == {}
    [first, *_] = choices(folder, CPU, torch.bfloat16)
    assert first.kernel == "cpu_int4pack"
    assert list(first.refused) == ["cpu_native"]


@needs_compiler
def test_paths_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are of `native.path`; here they are held against what `matmul` calls."""
    kernels, called = build.library(4), []
    monkeypatch.setattr(native, "by_slabs", lambda x, *_: called.append("rows to PyTorch"))
    words, scales = torch.zeros(8, 16, dtype=torch.int32), torch.ones(8, 4)

    class Recorded:
        def __getattr__(self, name: str) -> Any:
            called.append({"llmq_pairs": "bfloat16 pairs", "llmq_float": "float32"}[name])
            return getattr(kernels, name)

    for pairs, wide, amx in [(True, True, False), (True, True, True), (False, True, False), (False, False, False)]:
        if pairs and not build.has_pairs(kernels):
            continue
        monkeypatch.setattr(build, "library", lambda *_: Recorded())
        monkeypatch.setattr(build, "has_pairs", lambda _, found=pairs: found)
        monkeypatch.setattr(build, "is_wide", lambda _, found=wide: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        for dtype in (torch.bfloat16, torch.float32):
            for m in (1, 4, 5, 12, 13, 64):
                native.matmul(torch.zeros(m, 128, dtype=dtype), (words, scales, None), None, 4, 32)
                said = native.path(m, 128, 4, 32, dtype)
                assert said.endswith(called[-1])
                if "PyTorch" not in said:
                    assert said.startswith("from codes" if m <= 4 and wide else "rows in cache")


@needs_compiler
def test_command(folder: Path) -> None:
    shown = run("kernels", folder, "--dtype", "float32").output
    assert "cpu_native_float" in shown
    assert "multiplies bfloat16" in shown.replace("\n", " ")
    found = json.loads(run("kernels", folder, "--dtype", "float32", "--json").output)
    assert found["dtype"] == "float32"
    first = found["choices"][0]
    assert first["layer"]["bits"] == 4
    assert set(first["paths"]) == {"1", "4", "16", "64", "512"}
    assert "cpu_native" in first["refused"]


def test_a_dense_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("kernels", make_llama(tmp_path))
    assert result.exit_code == 1
    assert "error:" in result.output
