"""The machine code of the kernels, compiled without a GPU (scripts/sass_report.py compiles every variant)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sass_report.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the report in a process of its own: in this one, the interpreter has taken the place of the compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, env=environment, timeout=600
    )


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    result = run("--sample", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    loaded: list[dict[str, Any]] = json.loads(result.stdout)
    return loaded


def test_no_fault_is_reported(reports: list[dict[str, Any]]) -> None:
    # The sample, and on both architectures the sum of split products and four of the column loop of GPTQ.
    assert len(reports) == 13 + 2 + 8
    assert [r["name"] for r in reports if r["faults"]] == []


def test_nothing_spills_and_everything_fits(reports: list[dict[str, Any]]) -> None:
    for r in reports:
        assert r["stack"] == 0, r
        assert r["shared"] <= (166_912 if "sm_80" in r["name"] else 232_448), r


def test_tensor_cores_take_the_weights_on_the_left(reports: list[dict[str, Any]]) -> None:
    for r in reports:
        if r["name"].startswith(("add_splits", "gptq_block")):
            continue
        # wgmma at a batch tile of 16 is there only if the weights are the left operand.
        assert r["mma"].startswith("HGMMA.64x" if "sm_90" in r["name"] else "HMMA.16816"), r
        assert r["mma_count"] > 0, r


def test_codes_become_floats_without_conversion_instructions(reports: list[dict[str, Any]]) -> None:
    assert {r["name"]: r["i2f"] for r in reports if r["i2f"]} == {}


def test_the_column_loop_divides_and_rounds_exactly_and_leaves_room_for_four_programs(
    reports: list[dict[str, Any]],
) -> None:
    blocks = [r for r in reports if r["name"].startswith("gptq_block")]
    assert len(blocks) == 8
    for r in blocks:
        assert r["calls"] >= 2, r  # the reciprocal of R_jj, and the division by the scale
        assert r["rounders"] >= 2, r
        # Of 65536 registers; 128 threads at most.
        assert r["registers"] <= 128, r
        assert r["mma_count"] == 0, r  # TF32 would be enough to move codes


def test_an_unknown_variant_is_a_usage_error() -> None:
    assert run("--only", "w5a16").returncode == 2
