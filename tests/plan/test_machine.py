import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from plan_cases import SLOW

from llmq.errors import SpecError
from llmq.planning import machine as machines
from llmq.planning.counting import Work
from llmq.planning.machine import machine_of, measure

CPU = torch.device("cpu")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measure with few tries and little data, and keep what is found under `tmp_path`."""
    monkeypatch.setattr(machines, "_PATIENCE", 0.0)
    monkeypatch.setattr(machines, "_OTHER", 64)
    monkeypatch.setattr(machines, "_SIDES", (8, 16))
    monkeypatch.setattr(machines, "_FACTOR_SIDES", (8, 16))
    monkeypatch.setattr(machines, "_BIG", 2**16)
    monkeypatch.setattr(machines, "_FILE", 2**20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("hurried")
def test_every_speed_is_a_positive_number(tmp_path: Path) -> None:
    found = asdict(measure(CPU, tmp_path))
    name = found.pop("name")
    assert f"{torch.get_num_threads()} threads" in name
    tables = [
        speed for kind in ("products", "factors", "solves") for t in found.pop(kind).values() for speed in t.values()
    ]
    assert len(tables) == 4 * 2 + 2 * 2 * 2
    assert all(math.isfinite(x) and x > 0 for x in [*tables, *found.values()])
    assert not any(tmp_path.glob("*/probe"))


@pytest.mark.usefixtures("hurried")
def test_a_measurement_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, source = machine_of(CPU, None, tmp_path)
    assert "measured now" in source
    monkeypatch.setattr(machines, "measure", lambda *_: pytest.fail("it was measured before"))
    again, source = machine_of(CPU, None, tmp_path)
    assert again == first
    assert "measured before" in source
    assert list((tmp_path / "cache/llmq/machines").iterdir())


@pytest.mark.usefixtures("hurried")
def test_a_file_is_written_where_there_is_none_and_read_where_there_is(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "machine.json"
    made, _ = machine_of(CPU, file, tmp_path)
    file.write_text(json.dumps(asdict(replace(made, name="another", near=7.0))))
    found, _ = machine_of(CPU, file, tmp_path)
    assert (found.name, found.near, found.products) == ("another", 7.0, made.products)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": "x"}', "\0"])
def test_a_file_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_text(content)
    with pytest.raises(SpecError, match="is no measurement of a machine"):
        machine_of(CPU, file, tmp_path)


def test_speeds_lie_on_a_line_of_logarithms_between_those_measured() -> None:
    fast = replace(SLOW, products={"float32": {4: 10.0, 8: 1000.0}}, near=2.0, far=4.0, call=0.5)

    def seconds(at: int) -> float:
        work = Work()
        work.products["float32", at] = 100.0
        return fast.seconds(work)

    assert [seconds(at) for at in (2, 4, 6, 8, 12)] == pytest.approx([10, 10, 1, 0.1, 0.1])
    assert fast.seconds(Work(near=3.0, far=8.0, calls=6.0)) == 3 / 2 + 8 / 4 + 3 * 6 * 0.5
