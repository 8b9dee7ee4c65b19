"""`llmq bench`: what it counts and compares. No test here asserts a speed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import llmq as run
from fake_cuda import FakeCuda
from tiny_models import make_llama

import llmq
from llmq import benchmark as module
from llmq.benchmark import Plan, bandwidth, benchmark, weight_bytes
from llmq.calibration import Calibration
from llmq.driver import quantize
from llmq.errors import CheckpointError
from llmq.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("packed")
    ids = torch.randint(1, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    quantize(dense, made, Recipe(method="rtn", bits=4, group_size=32), calibration=Calibration(ids, None, "x", "y"))
    return made


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COPIED", 1 << 16)


def test_every_batch_is_measured_and_speeds_are_of_times(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(1, 10000))

    def counted(step: object, device: torch.device) -> float:
        step()  # type: ignore[operator]
        return float(next(seconds))

    monkeypatch.setattr(module, "_seconds", counted)
    monkeypatch.setattr(module, "_COPIES", 1)
    found = benchmark(packed, Plan((1, 3), 8, 3), dtype=torch.float32, device=CPU)
    assert [(s.kind, s.batch, s.length) for s in found.speeds] == [
        ("decode", 1, 8),
        ("decode", 3, 8),
        ("prefill", 1, 8),
    ]
    # times: 1 for the copy; then packed and dense in turns, of which the first pair does not count
    times = {"decode 1": (6, 7), "decode 3": (14, 15), "prefill 1": (22, 23)}
    for speed in found.speeds:
        own, other = times[f"{speed.kind} {speed.batch}"]
        tokens = speed.batch * (speed.length if speed.kind == "prefill" else 1)
        assert (speed.packed, speed.dense) == (tokens / own, tokens / other)
        assert speed.ratio == pytest.approx(other / own)
    read = weight_bytes(llmq.load(packed, dtype=torch.float32), read=True)
    assert found.speeds[0].bandwidth_share == pytest.approx(read / 6 / found.bandwidth)
    assert found.speeds[2].bandwidth_share is None
    assert found.bandwidth == 2 << 16
    assert found.packed_bytes < found.dense_bytes


def test_bytes_read_leave_out_an_embedding_that_is_only_looked_up(dense: Path) -> None:
    model = llmq.load(dense)
    embedding = model.get_input_embeddings().weight
    whole = sum(parameter.nbytes for parameter in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert weight_bytes(model) == whole
    assert weight_bytes(model, read=True) == whole - embedding.nbytes
    model.get_output_embeddings().weight = embedding
    assert weight_bytes(model, read=True) == weight_bytes(model)


def test_decoding_goes_on_from_its_cache(packed: Path) -> None:
    model = llmq.load(packed, dtype=torch.float32)
    ids = torch.arange(1, 7).view(2, 3)
    with torch.no_grad():
        (step,), how = module._decoding([model], ids, 3)
        assert how == "call by call, with a cache that grows"
        lengths = [step().past_key_values.get_seq_length() for _ in range(3)]  # type: ignore[attr-defined]
    assert lengths == [4, 5, 6]


def test_a_cache_of_fixed_size_has_room_for_all_steps_and_gives_the_same_logits(packed: Path) -> None:
    model = llmq.load(packed, dtype=torch.float32)
    ids = torch.arange(1, 7).view(2, 3)
    with torch.no_grad():
        static, growing = module._static(model, ids, 3), module._growing(model, ids)
        for _ in range(3):
            # sums of attention have other zeros in between
            torch.testing.assert_close(static().logits, growing().logits)  # type: ignore[attr-defined]
        with pytest.raises(IndexError):
            static()


def test_a_step_in_a_cache_of_fixed_size_never_asks_for_a_value(dense: Path) -> None:
    # Tensors on the meta device have none: what waits for the GPU, and so cannot be captured, fails here.
    model = llmq.load(dense).to("meta")
    with torch.no_grad():
        step = module._static(model, torch.ones(2, 3, dtype=torch.int64, device="meta"), 2)
        assert step().logits.shape == (2, 1, model.config.vocab_size)  # type: ignore[attr-defined]


def test_a_step_is_warmed_up_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    places: list[str] = []
    replay = module._captured(lambda: places.append(cuda.where), CPU)
    assert places == ["side"] * module._WARM + ["capture"]
    for _ in range(3):
        replay()
    assert cuda.replays == 3
    assert len(places) == module._WARM + 1


def test_where_there_are_graphs_both_models_are_captured(
    packed: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = []

    def capture(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
        for _ in range(module._WARM):
            step()
        captured.append(step)
        return step

    monkeypatch.setattr(module, "_has_graphs", lambda device: True)
    monkeypatch.setattr(module, "_captured", capture)
    found = benchmark(packed, Plan((2,), 4, 3), dtype=torch.float32, device=CPU, against=dense)
    assert len(captured) == 2
    assert [speed.how for speed in found.speeds] == ["as a CUDA graph, with a cache of fixed size", "call by call"]
    shown = run("bench", packed, "--batch", 1, "--prompt", 4, "--repeats", 1, "--dtype", "float32").output
    assert "decode 1: as a CUDA graph, with a cache of fixed size" in shown


def test_what_cannot_be_captured_is_said_and_both_models_run_call_by_call(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def capture(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
        calls.append(step)
        if len(calls) % 2:
            return step
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(module, "_has_graphs", lambda device: True)
    monkeypatch.setattr(module, "_captured", capture)
    options = ("--batch", 1, "--prompt", 4, "--repeats", 9, "--dtype", "float32")
    found = json.loads(run("bench", packed, *options, "--json").output)
    reason = "no CUDA graph, RuntimeError: operation not permitted when stream is capturing"
    assert found["speeds"][0]["how"] == f"call by call, with a cache that grows: {reason}"
    assert reason in " ".join(run("bench", packed, *options).output.split())


def test_a_copy_has_a_speed() -> None:
    assert bandwidth(CPU) > 0


def test_against_has_to_be_dense(packed: Path) -> None:
    with pytest.raises(CheckpointError, match="is packed; --against names the model that was quantized"):
        benchmark(packed, Plan((1,), 4, 1), dtype=torch.float32, device=CPU, against=packed)


def test_command(packed: Path, dense: Path) -> None:
    options = ("--batch", 2, "--prompt", 4, "--repeats", 1, "--dtype", "float32")
    shown = run("bench", packed, "--against", dense, *options).output
    assert "packed tok/s" in shown
    assert "prefill" in shown
    found = json.loads(run("bench", packed, *options, "--json").output)
    assert [(speed["kind"], speed["batch"]) for speed in found["speeds"]] == [("decode", 2), ("prefill", 1)]
    assert found["dense"] == "its own weights"
    before = torch.get_num_threads()
    threads = json.loads(run("bench", packed, *options, "--json", "--threads", 2).output)["machine"]["threads"]
    torch.set_num_threads(before)
    assert threads == 2
    result = run("bench", packed, "--device", "cuda:7")
    assert result.exit_code == 2
