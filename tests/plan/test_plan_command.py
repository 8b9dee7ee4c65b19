import json
from dataclasses import asdict
from pathlib import Path

import pytest
from command_line import assert_fails, llmq
from plan_cases import SLOW, job_of
from tiny_models import make_llama

from llmq.cli.plan import duration

SMALL = ("--group-size", 32, "--num-samples", 8, "--seq-len", 64)
QUICK = ("--shift", 0, "--refine-rounds", 0, "--scale-search", "none")  # a solver that is quickly looked at


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Return a file with the speeds of a machine."""
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(asdict(SLOW)))
    return file


def planned(folder: Path, slow: Path, *more: object) -> dict[str, object]:
    done = llmq("plan", folder, "--machine", slow, "--json", *SMALL, *QUICK, *more)
    assert done.exit_code == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_plan_says_what_is_made_needed_and_taken(folder: Path, slow: Path) -> None:
    plan = planned(folder, slow)
    job = job_of(folder)
    assert (plan["blocks"], plan["linears"]) == (2, 14)
    assert plan["output_bytes"] == job.output_bytes
    assert plan["bits_per_weight"] == pytest.approx(8 * job.packed_bytes / plan["weights"])  # type: ignore[operator]
    assert plan["windows"] == 9
    (kind,) = plan["kinds"]  # type: ignore[misc]
    assert [stage["linears"] for stage in kind["stages"]] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"],
    ]  # fmt: skip
    states = 9 * 64 * 64 * 4
    assert plan["disk"]["hidden states of two blocks"] == 2 * states  # type: ignore[index]
    assert set(plan["seconds"]) == {"check", "load", "forward", "solve", "write"}  # type: ignore[call-overload]
    assert {engine["engine"] for engine in plan["engines"]} >= {"llmq", "llama.cpp"}  # type: ignore[attr-defined]


def test_rounding_to_nearest_needs_no_forward_pass(folder: Path, slow: Path) -> None:
    plan = planned(folder, slow, "--method", "rtn")
    assert "forward" not in plan["seconds"]  # type: ignore[operator]
    assert set(plan["disk"]) == {"output", "journal"}  # type: ignore[call-overload]
    assert plan["tokens"] == 0


@pytest.mark.parametrize("stage", [("--tune-steps", 5), ("--tune-epochs", 1), ("--guidance-groups", 1)])
def test_gradients_take_longer_and_hold_more(stage: tuple[object, ...], folder: Path, slow: Path) -> None:
    plain, more = planned(folder, slow), planned(folder, slow, *stage)
    assert more["seconds_total"] > plain["seconds_total"]  # type: ignore[operator]
    assert more["memory"]["host_total"] > plain["memory"]["host_total"]  # type: ignore[index]


def test_text_names_engines_parts_and_stages(folder: Path, slow: Path) -> None:
    done = llmq("plan", folder, "--machine", slow, *SMALL, *QUICK)
    for words in ("vLLM 0.33: yes", "mlp.down_proj", "hidden states", "measured before", "times smaller"):
        assert words in " ".join(done.stdout.split())


def test_a_clash_is_named_before_work_starts(folder: Path, slow: Path) -> None:
    plan = planned(folder, slow, "--bits", 2)
    (vllm,) = [engine for engine in plan["engines"] if engine["engine"].startswith("vLLM")]  # type: ignore[attr-defined]
    assert not vllm["accepted"]
    assert vllm["clashes"] == ["2 bits, of gptq it takes 4, 8"]


@pytest.mark.parametrize(("size", "word"), [("1MB", "needs at least"), ("much", "is not a size")])
def test_too_little_memory_is_refused(size: str, word: str, folder: Path, slow: Path) -> None:
    done = llmq("plan", folder, "--machine", slow, "--max-memory", size, *SMALL, *QUICK)
    assert_fails(done.exit_code, done.stdout, done.stderr, "--max-memory", word, expected=2)


def test_another_machine_may_have_a_gpu(folder: Path, slow: Path) -> None:
    plan = planned(folder, slow, "--device", "cuda")
    assert plan["memory"]["device_total"] > 0  # type: ignore[index]
    assert "a block" not in plan["memory"]["host"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (42, "42 s"), (700, "12 min"), (12_000, "3 h 20 min"), (200_000, "2 days 7 h")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
