"""The machine code of the kernels, compiled without a GPU (scripts/check --aot-all compiles every variant)."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from script_loading import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sass_report.py"
sass = load_script("sass")
sass_report = load_script("sass_report")


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
    assert [r["name"] for r in reports] == [str(job) for job in sass_report.SAMPLE]
    assert {r["arch"] for r in reports} == {75, 80, 86, 89, 90, 100, 120}
    assert [r["name"] for r in reports if r["faults"]] == []


def test_nothing_spills_and_everything_fits(reports: list[dict[str, Any]]) -> None:
    limits = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
    for r in reports:
        assert r["stack"] == 0, r
        assert r["shared"] <= limits[r["arch"]], r


def test_tensor_cores_take_the_weights_on_the_left(reports: list[dict[str, Any]]) -> None:
    # wgmma at a batch tile of 16 is there only if the weights are the left operand.
    begins = {90: "HGMMA.64x", 100: "UTCHMMA"}
    tiles = [r for r in reports if r["name"][-2:] in ("#0", "#1", "#2", "#3") and "gptq" not in r["name"]]
    integers = [r for r in tiles if r["name"].startswith("w8a8")]
    assert len(integers) == 4
    assert len(tiles) >= 22
    for r in tiles:
        assert r["mma_count"] > 0, r
        if r not in integers:
            assert r["mma"].startswith(begins.get(r["arch"], "HMMA.16816")), r


def test_integers_are_multiplied_by_tensor_cores(reports: list[dict[str, Any]]) -> None:
    found = {r["name"]: r["mma"] for r in reports if r["name"].startswith("w8a8") and "#" in r["name"]}
    assert {name: mma[:12] for name, mma in found.items()} == {
        "w8a8 sm_90 bf16 even fused #0": "IMMA.16832.S",  # 32 outputs are too few for wgmma
        "w8a8 sm_80 bf16 ragged fused #1": "IMMA.16832.S",
        "w8a8 sm_90 bf16 even #3": "IGMMA.64x128",
        "w8a8 sm_89 bf16 even #2": "IMMA.16832.S",
    }


def test_codes_become_floats_without_conversion_instructions(reports: list[dict[str, Any]]) -> None:
    sums = {r["name"] for r in reports if r["name"].startswith("w8a8")}  # of integers, which become floats once
    assert {r["name"]: r["i2f"] for r in reports if r["i2f"] and r["name"] not in sums} == {}


def test_the_column_loop_divides_and_rounds_exactly_and_leaves_room_for_four_programs(
    reports: list[dict[str, Any]],
) -> None:
    blocks = [r for r in reports if r["name"].startswith("gptq_block")]
    assert len(blocks) == 7
    for r in blocks:
        assert r["calls"] >= 2, r  # the reciprocal of R_jj, and the division by the scale
        assert r["rounders"] >= 2, r
        # Of 65536 registers; 128 threads at most.
        assert r["registers"] <= 128, r
        assert r["mma_count"] == 0, r  # TF32 would be enough to move codes


def test_a_handful_of_tokens_costs_less_than_a_tile_where_it_is_chosen(reports: list[dict[str, Any]]) -> None:
    costs = {r["name"]: r["per_weight"] for r in reports}
    assert 3 < costs["w4a16 sm_90 bf16 g128 sym #0"] < 4
    assert 4 < costs["w4a16 sm_90 bf16 g128 asym M=1"] < 6


def test_an_unknown_variant_is_a_usage_error() -> None:
    with pytest.raises(SystemExit, match="2"):
        sass_report.parse(["--only", "w5a16"])


@pytest.mark.parametrize("part", [["--sample"], ["--only", "w4a16"], ["--arch", "80"]])
def test_a_table_is_not_written_of_a_part(part: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sass_report.parse(["--update", *part])
    assert sass_report.parse(["--update"]).update


def a_report(**changes: Any) -> Any:
    report = sass.Report(
        name="w4a16 sm_90 bf16 g128 asym M=1",
        arch=90,
        tile="32x1 w2",
        registers=80,
        stack=0,
        shared=64,
        mma="-",
        mma_count=0,
        i2f=0,
        wide_copies=6,
        calls=0,
        rounders=0,
        instructions=400,
        loop=300,
        per_weight=5.0,
        bytes_per_weight=0.5,
    )
    return replace(report, **changes)


def test_faults_are_named() -> None:
    assert list(sass.faults(a_report())) == []
    assert list(sass.faults(a_report(stack=8))) == ["spills 8 bytes"]
    assert list(sass.faults(a_report(shared=232_449))) == ["232449 bytes of shared memory, 232448 allowed"]
    assert list(sass.faults(a_report(i2f=3))) == ["3 int-to-float conversions"]


@pytest.mark.parametrize(("instructions", "right"), [(400, True), (420, True), (380, True), (421, False), (379, False)])
def test_instructions_may_differ_by_a_twentieth(instructions: int, right: bool) -> None:
    table = {a_report().name: {"instructions": 400}}
    found = list(sass_report.compare(a_report(instructions=instructions), table))
    assert found == ([] if right else [f"{instructions} instructions, 400 in docs/bench/aot.json"])


def test_a_kernel_that_is_not_in_the_table_is_a_fault() -> None:
    assert list(sass_report.compare(a_report(), {})) == ["not in docs/bench/aot.json: run --update"]


def test_loops_are_counted_from_target_to_branch() -> None:
    lines = ["MOV R1, R2", "FADD R1, R1", "@P0 BRA 0x20", "FADD R1, R1", "@!P1 BRA `(.L_1) 0x10", "EXIT", "BRA 0x60"]
    sass_text = "".join(f"        /*{16 * i:04x}*/   {line} ;    /* 0x0 */\n" for i, line in enumerate(lines))
    assert sass.longest_loop(sass_text) == 4  # from 0x10 to 0x40; what branches to itself ends the code
    assert sass.longest_loop("        /*0000*/   EXIT ;") == 0


def test_estimates_are_those_of_the_data_sheet() -> None:
    memory, issue = sass.estimate(a_report())
    assert memory == pytest.approx(9600)  # 4800 GB/s
    assert issue == pytest.approx(132 * 1.83 * 128 / 5)
    job = sass_report.Variant("w4a16", 90, "bf16", "g128", True, "M=1")
    assert sass_report.judged(a_report(), job) == "issue, by 1.6"
    assert sass_report.judged(a_report(per_weight=1.0), job) == "memory, by 3.2"
    assert sass_report.judged(a_report(), replace(job, row="#3")) == ""


def test_the_committed_table_is_that_of_all_variants() -> None:
    committed = json.loads((sass_report.BENCH / "aot.json").read_text())
    assert (sass_report.BENCH / "aot.json").read_text() == sass_report.text(committed)
    assert list(committed["kernels"]) == [str(job) for job in sass_report.jobs(sample=False)]
    assert set(map(str, sass_report.SAMPLE)) <= committed["kernels"].keys()
    assert (sass_report.BENCH / "aot.md").read_text() == sass_report.markdown(committed)
    assert set(sass_report.SHOWN) <= asdict(a_report()).keys()


def test_another_triton_is_reported_and_not_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = sass_report.SAMPLE[14]
    (tmp_path / "aot.json").write_text(json.dumps({"triton": "3.0", "kernels": {}}))
    monkeypatch.setattr(sass_report, "BENCH", tmp_path)
    monkeypatch.setattr(sass_report, "compiled", lambda chosen, processes: iter([a_report(name=str(job))]))
    monkeypatch.setattr(sass_report, "SAMPLE", (job,))
    assert sass_report.main(["--sample"]) == 0
    assert "is of Triton 3.0: counts not compared" in capsys.readouterr().err
    triton = pytest.importorskip("triton")
    (tmp_path / "aot.json").write_text(json.dumps({"triton": triton.__version__, "kernels": {}}))
    assert sass_report.main(["--sample"]) == 1
    assert "not in docs/bench/aot.json" in capsys.readouterr().out
