"""Loaders as processes: whatever one does, it ends in an outcome."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from verify_cases import edited

import llmq.loaders
from llmq.errors import SpecError
from llmq.verify.calling import Loader, Outcome, ask, call

Make = Callable[[str], Loader]
IDS = torch.arange(6).view(2, 3)

# answers with the ids as logits of one token, and what it was given to go on with
ANSWERS = """
import json, sys
import numpy as np
model, source, target = sys.argv[1:4]
given = np.load(source)
np.savez(target, logits=given["ids"][..., None].astype("float32"))
print("noise {")
print(json.dumps({"loaded": False, "refused": "of a first attempt"}))
told = {"loaded": True, "dtype": "float16", "notes": [model], "new": [int(given["new"])], "versions": {"x": "1"}}
print(json.dumps(told))
print('{"not": "it"}')
"""


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Loader]:
    """Return a function that makes a loader of a script."""

    def make(code: str) -> Loader:
        (tmp_path / "use.py").write_text(code)
        monkeypatch.setitem(llmq.loaders.SCRIPTS, "llmq", str(tmp_path / "use.py"))
        return Loader("llmq")

    return make


def test_an_answer_comes_back(loader: Make, tmp_path: Path) -> None:
    found = call(loader(ANSWERS), tmp_path, IDS, new=5, seconds=60)
    assert found.logits is not None
    assert torch.equal(found.logits, IDS[..., None].float())
    assert (found.refused, found.dtype, found.new, found.notes) == (None, "float16", [5], [str(tmp_path)])
    assert found.versions == {"x": "1"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import nothing_like_this", "exit code 1: ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("import os; os.kill(os.getpid(), 11)", "killed by signal 11"),
        ("print('{\"loaded\": tru')", "exit code 0"),
        ('print(\'{"loaded": false, "refused": "no 3 bits here", "versions": {}}\')', "no 3 bits here"),
        (ANSWERS.replace("np.savez(target", "dict(x=target"), "exit code 0 and no logits"),
    ],
    ids=["import", "signal", "garbage", "refused", "no file"],
)
def test_whatever_goes_wrong_is_a_refusal(loader: Make, tmp_path: Path, code: str, expected: str) -> None:
    found = call(loader(code), tmp_path, IDS, new=0, seconds=60)
    assert found.refused == expected
    assert found.logits is None


def test_time_is_limited_and_children_end(loader: Make, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert call(loader(code), tmp_path, IDS, new=0, seconds=1).refused == "no answer in 1 seconds"
    time.sleep(2.5)
    assert not mark.exists()


def test_a_name_with_its_python_is_parsed(tmp_path: Path) -> None:
    assert Loader.parse("llmq") == Loader("llmq", sys.executable)
    assert Loader.parse(f" vllm={sys.executable}") == Loader("vllm", sys.executable)
    with pytest.raises(SpecError, match="--loaders exllama: unknown; there are llmq, transformers"):
        Loader.parse("exllama")
    with pytest.raises(SpecError, match="no such program"):
        Loader.parse(f"vllm={tmp_path}/python")


def test_what_has_no_gguf_file_is_refused_by_llmq(packed: Path, tmp_path: Path) -> None:
    def strange(content: dict[str, torch.Tensor]) -> None:
        content["strange.weight"] = torch.zeros(2)

    folder = edited(packed, tmp_path / "strange", strange)
    found = ask(Loader("llamacpp"), folder, IDS, new=0, seconds=60)
    assert found.refused is not None
    assert found.refused.startswith("llmq: ")
    assert isinstance(found, Outcome)


def test_every_script_is_there() -> None:
    for name in llmq.loaders.SCRIPTS:
        script = Path(llmq.loaders.command(name, Path("m"), Path("i"), Path("o"))[0])
        compile(script.read_text(encoding="utf-8"), str(script), "exec")
        assert f'serve("{name.removesuffix("-torch")}"' in script.read_text(encoding="utf-8")
