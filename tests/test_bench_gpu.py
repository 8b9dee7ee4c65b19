"""scripts/bench_gpu.py without a GPU: what it does with times, made up or taken by the clock. No speed is asserted."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bits_reference import unpack_stream
from fake_cuda import FakeCuda
from rich.console import Console
from script_loading import load_script
from torch import Tensor, nn

from llmq import ops

bench_gpu = load_script("bench_gpu")
bench_rivals = load_script("bench_rivals")
CPU = torch.device("cpu")
LAYER = ops.Layer(4, 32, True, 64, 128)


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put candidates of ours in the place of all others: one that refuses, one that breaks, one that is wrong."""
    dense = bench_gpu.CANDIDATES["dense"]

    def broken(weight: Any) -> Any:
        raise RuntimeError("no such symbol\nmany more lines")

    found = {
        "dense": dense,
        "half": dense._replace(pack=lambda w: [w.dequantize().half()], multiply=lambda x, p, w: x @ p[0].T.to(x.dtype)),
        "refusing": dense._replace(refuses=lambda w: "not today"),
        "broken": dense._replace(pack=broken),
        "wrong": dense._replace(multiply=lambda x, p, w: x @ p[0].T * 1.05),
        "nan": dense._replace(multiply=lambda x, p, w: x @ p[0].T * float("nan")),
    }
    monkeypatch.setattr(bench_gpu, "CANDIDATES", found)
    return found


def plan(timer: Any, tokens: tuple[int, ...] = (1, 4), names: tuple[str, ...] = ("dense",), cold: int = 0) -> Any:
    return bench_gpu.Plan(torch.float32, CPU, tokens, names, cold, timer)


def weight(layer: ops.Layer = LAYER, dtype: torch.dtype = torch.float32) -> Any:
    return bench_rivals.random_weight(layer, dtype, CPU)


def test_everything_runs_on_a_cpu_by_the_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--repeats", "1", "--sizes", "tiny", "--tokens", "1", "3", "--output", str(tmp_path)]
    assert bench_gpu.main(options) == 0
    shown = capsys.readouterr().out
    (path,) = tmp_path.iterdir()  # nothing unfinished is left
    assert path.name.endswith("-4bit-g128-sym-bfloat16.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["layer"], row["n"], row["k"]) for row in rows} == {("square", "256", "256"), ("wide", "384", "512")}
    assert len(rows) == 2 * 2 * len(bench_gpu.CANDIDATES)
    for row in rows:
        on_cpu = row["candidate"] in ("dense", "llmq")
        assert (row["microseconds"] != "") == (row["over_dense"] != "") == on_cpu
        assert row["reason"] == ("" if on_cpu else "not on a GPU")
        assert row["timed by"] == "clock"
        assert row["torch"] == torch.__version__
        assert len(row["commit"].removesuffix("-changed")) in (40, len("unknown"))
    assert {row["row"] for row in rows if row["candidate"] == "llmq"} <= ops.KERNELS.keys()
    assert "llmq" in shown
    assert "not timed: tinygemm: not on a GPU (4 times, first square at 1)" in shown


def test_codebooks_of_vectors_are_timed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--repeats", "1", "--sizes", "tiny", "--tokens", "1", "--output", str(tmp_path)]
    assert bench_gpu.main([*options, "--grid", "vq4", "--bits", "2", "--group-size", "-1"]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-vq4-2bit-row-sym-bfloat16.csv")
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["microseconds"]]
    assert {(row["candidate"], row["grid"]) for row in rows} == {("dense", "vq4"), ("llmq", "vq4")}
    assert {row["row"] for row in rows} <= {"", "cpu_vectors", "vectors"}
    with pytest.raises(SystemExit, match="2"):
        bench_gpu.parse([*options, "--grid", "vq4", "--bits", "3"])
    assert "the vq4 grid has no 3 bits" in capsys.readouterr().err
    for name in ("tinygemm", "marlin of vllm"):
        refuses = bench_rivals.CANDIDATES[name].refuses
        vectors = SimpleNamespace(layer=LAYER._replace(grid="vq4"), device=torch.device("cuda"))
        assert refuses(vectors) is not None


def test_speeds_are_of_times_and_the_dense_layer_is_first(candidates: dict[str, Any]) -> None:
    times = iter([8.0, 2.0, 9.0, 3.0])
    found = bench_gpu.figures("m", "l", LAYER, plan(lambda call, calls: next(times), names=("half", "dense")))
    assert [(f.tokens, f.candidate, f.microseconds, f.over_dense) for f in found] == [
        (1, "dense", 8e6, 1.0),
        (1, "half", 2e6, 4.0),
        (4, "dense", 9e6, 1.0),
        (4, "half", 3e6, 3.0),
    ]
    assert found[0].gigabytes_per_second == 64 * 128 * 4 / 8 / 1e9
    assert found[1].gigabytes_per_second == 64 * 128 * 2 / 2 / 1e9
    assert (found[0].n, found[0].k, found[0].bits, found[0].group_size, found[0].dtype) == (64, 128, 4, 32, "float32")


def test_whatever_is_not_timed_has_its_reason(candidates: dict[str, Any]) -> None:
    found = bench_gpu.figures("m", "l", LAYER, plan(lambda call, calls: 1.0, (1,), tuple(candidates)))
    assert {f.candidate: f.reason for f in found} == {
        "dense": "",
        "half": "",
        "refusing": "not today",
        "broken": "RuntimeError: no such symbol",
        "wrong": "ValueError: its product is off by 5.0%",
        "nan": "ValueError: its product is off by nan%",
    }
    assert [f.candidate for f in found if f.microseconds is None] == ["refusing", "broken", "wrong", "nan"]


def test_a_product_that_fails_while_it_is_timed_is_reported(candidates: dict[str, Any]) -> None:
    def timer(call: Any, calls: int) -> float:
        raise torch.OutOfMemoryError("too large")

    found = bench_gpu.figures("m", "l", LAYER, plan(timer))
    assert [f.reason for f in found] == ["OutOfMemoryError: too large"] * 2
    assert all(f.over_dense is None for f in found)


def test_copies_take_turns_and_fill_more_than_the_cache(candidates: dict[str, Any]) -> None:
    made = bench_gpu.turns(candidates["dense"], weight(), 5 * 64 * 128 * 4 + 1)
    assert len({tensors[0].data_ptr() for tensors in made.copies}) == len(made.copies) == 6
    assert all(torch.equal(tensors[0], made.copies[0][0]) for tensors in made.copies)
    seen: list[int] = []
    watched = candidates["dense"]._replace(multiply=lambda x, p, w: seen.append(p[0].data_ptr()) or x)
    calls: list[int] = []

    def timer(call: Any, count: int) -> float:
        calls.append(count)
        for i in range(count):
            call(i)
        return 1.0

    x = torch.zeros(1, 128)
    assert bench_gpu.timed(made._replace(candidate=watched), x, timer) == (1.0, "")
    assert seen == [made.copies[i % 6][0].data_ptr() for i in range(20)]
    many = made._replace(candidate=watched, copies=made.copies * 5)
    bench_gpu.timed(many, x, timer)
    assert calls == [20, 30]


def test_calls_are_captured_once_and_replays_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    calls: list[tuple[str, int]] = []
    # five replays count, after one that does not: 2, 3, 4, 5 and 6 seconds for two calls
    assert bench_gpu.graph_timer(5)(lambda i: calls.append((cuda.where, i)), 2) == 4.0 / 2
    assert calls == [("side", 0), ("side", 1), ("capture", 0), ("capture", 1)]
    assert cuda.replays == 6


def test_modules_are_copied_and_counted_whole() -> None:
    module = nn.Linear(4, 3)
    module.register_buffer("more", torch.zeros(5, dtype=torch.uint8))
    assert bench_gpu.nbytes(module) == 4 * (12 + 3) + 5
    candidate = bench_rivals.Candidate(
        lambda w: None,
        lambda w: nn.Linear(128, 64, bias=False).requires_grad_(False),
        lambda x, p, w: x @ w.dequantize().T,
    )
    made = bench_gpu.turns(candidate, weight(), 2 * 64 * 128 * 4)
    assert len({module.weight.data_ptr() for module in made.copies}) == 3


def test_the_table_shows_speeds_and_leaves_out_what_was_not_timed(candidates: dict[str, Any]) -> None:
    times = iter([8e-6, 2e-6, 9e-6, 4e-6])
    found = bench_gpu.figures("m", "l", LAYER, plan(lambda c, n: next(times), names=("half", "refusing")))
    console = Console(width=100)
    with console.capture() as capture:
        console.print(bench_gpu.table(found))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines == [
        ["layer", "N", "x", "K", "M=1", "M=4"],
        ["m", "l", "64", "x", "128", "dense", "8.0", "µs", "9.0", "µs"],
        ["m", "l", "64", "x", "128", "half", "4.00", "2.25"],
    ]
    assert bench_gpu.reasons(found) == ["not timed: refusing: not today (2 times, first l at 1)"]
    assert bench_gpu.cell(None) == "-"


def test_without_a_dense_or_a_packed_time_the_exit_code_says_so(
    tmp_path: Path, candidates: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--device", "cpu", "--sizes", "tiny", "--tokens", "1", "--output", str(tmp_path), "--repeats", "1"]
    monkeypatch.setattr(bench_gpu, "parse", lambda arguments: parsed(options, ["dense", "refusing"]))
    assert bench_gpu.main(options) == 0
    candidates["llmq"] = candidates["refusing"]
    monkeypatch.setattr(bench_gpu, "parse", lambda arguments: parsed(options, ["llmq"]))
    assert bench_gpu.main(options) == 1


def parsed(options: list[str], names: list[str]) -> Any:
    found = load_script("bench_gpu").parse(options)
    found.candidates = names
    return found


@pytest.mark.parametrize("wrong", [["--repeats", "0"], ["--tokens", "0"], ["--sizes", "gpt-2"], ["--bits", "9"]])
def test_what_cannot_be_timed_is_a_usage_error(wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_gpu.parse(["--device", "cpu", *wrong])


def test_a_machine_without_a_gpu_is_told_what_it_can_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        bench_gpu.parse([])
    assert "--device cpu --repeats 1 --sizes tiny" in capsys.readouterr().err


def test_commands_that_are_not_there_say_nothing() -> None:
    assert bench_gpu.output("no-such-command-here") == ""
    assert bench_gpu.output("false") == ""
    assert bench_gpu.output("echo", "a\nb") == "a"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_what_their_codes_say(bits: int, symmetric: bool) -> None:
    made = weight(ops.Layer(bits, 32, symmetric, 4, 64))
    zero = 2.0 ** (bits - 1)
    for n, k in ((0, 0), (3, 31), (3, 32), (1, 63)):
        if made.zeros is not None:
            zero = float(made.zeros[n, k // 32])
        expected = (float(made.codes[n, k]) - zero) * float(made.scales[n, k // 32])
        assert made.dequantize()[n, k] == expected
    assert torch.equal(made.scales.bfloat16().half(), made.scales)
    words, scales = bench_rivals.gptq_tensors(made)
    assert [unpack_stream(column, bits) for column in words.T.tolist()] == made.codes.tolist()
    assert torch.equal(scales.T, made.scales.float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_our_own_product_is_right(bits: int, symmetric: bool) -> None:
    made = bench_gpu.turns(bench_rivals.CANDIDATES["llmq"], weight(ops.Layer(bits, 32, symmetric, 64, 128)), 0)
    assert bench_rivals.CANDIDATES["llmq"].row(made.weight) in ops.KERNELS


@pytest.mark.parametrize("symmetric", [True, False])
def test_tinygemm_gets_its_arrangement(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = weight(ops.Layer(4, 64, symmetric, 16, 128), torch.bfloat16)
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda w, tiles: w)
    pairs, both = bench_rivals._tinygemm_pack(made)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten(1)
    scales, offsets = both.float().unbind(-1)  # [G, N]
    found = (codes.view(16, 2, 64).float() - 8) * scales.T[..., None] + offsets.T[..., None]
    # the offset is rounded to bfloat16
    slack = 2.0**-8 * offsets.abs().T[..., None].expand_as(found).reshape(16, 128)
    assert ((found.view(16, 128) - made.dequantize()).abs() <= slack + 1e-6).all()


def test_rivals_say_what_they_do_not_multiply() -> None:
    on_gpu = SimpleNamespace(type="cuda")

    def refused(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> str | None:
        layer = ops.Layer(4, 128, True, 256, 1024)._replace(**changes)
        reason: str | None = bench_rivals.CANDIDATES[name].refuses(
            SimpleNamespace(layer=layer, dtype=dtype, device=on_gpu)
        )
        return reason

    assert refused("tinygemm") is None
    assert refused("tinygemm", symmetric=False) is None
    assert refused("tinygemm", torch.float16) is not None
    assert refused("tinygemm", bits=8) is not None
    assert refused("tinygemm", group_size=1024) is not None
    assert refused("tinygemm", in_features=1088) == "needs N % 8 = 0 and K % 128 = 0"
    for name, package in (("marlin of vllm", "vllm"), ("marlin of gptqmodel", "gptqmodel")):
        assert refused(name) == f"{package} is not installed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_rivals, "find_spec", lambda name: object())
        assert refused("marlin of vllm") is None
        assert refused("marlin of vllm", group_size=1024, bits=8) is None
        assert "symmetric" in str(refused("marlin of vllm", symmetric=False))
        assert refused("marlin of vllm", out_features=96) == "needs N % 64 = 0 and K % 128 = 0"


def test_only_arguments_that_a_version_knows_are_passed() -> None:
    def repack(words: Tensor, size_k: int) -> None: ...

    assert bench_rivals.accepted(repack, words=1, perm=2, size_k=3) == {"words": 1, "size_k": 3}
