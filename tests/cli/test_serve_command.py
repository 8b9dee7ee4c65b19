import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch

from llmq.calibration import Calibration
from llmq.cli.generate import generate_command
from llmq.cli.serve import serve_command
from llmq.driver import quantize
from llmq.errors import CheckpointError, SpecError
from llmq.recipe import Recipe


def test_a_packed_folder_answers_as_it_generates(
    invoke: Callable[..., Any], dense_folder: Callable[[int], Path], tmp_path: Path
) -> None:

    ids = torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    quantize(
        dense_folder(0),
        tmp_path,
        Recipe(group_size=32, format="compressed-tensors"),
        calibration=Calibration(ids, None, "x", "y"),
    )
    expected = invoke(generate_command, tmp_path, "w3 w7", "--max-new-tokens", 5).stdout.strip()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-m", "llmq", "serve", str(tmp_path), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ}) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server)
            asked = {"model": str(tmp_path), "prompt": "w3 w7", "max_tokens": 5, "temperature": 0}
            request = Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(asked).encode(),
                {"Content-Type": "application/json"},
            )
            with urlopen(request, timeout=60) as answer:
                [choice] = json.load(answer)["choices"]
        finally:
            server.send_signal(signal.SIGINT)
            said = (server.communicate(timeout=60)[0] or b"").decode()
    assert f"w3 w7 {choice['text'].strip()}" == expected
    assert "Traceback" not in said


def wait_for(address: str, server: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            with urlopen(address, timeout=5):
                return
        except (URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError("the server did not come up")


def test_a_missing_folder_is_refused(invoke: Callable[..., Any]) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        invoke(serve_command, "./missing")


def test_a_folder_without_a_tokenizer_is_refused(
    invoke: Callable[..., Any], dense_folder: Callable[[int], Path], tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((dense_folder(0) / name).read_bytes())
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        invoke(serve_command, tmp_path)


def test_a_name_that_the_server_would_cut_is_refused(
    invoke: Callable[..., Any], dense_folder: Callable[[int], Path], tmp_path: Path
) -> None:
    (tmp_path / "model@home").symlink_to(dense_folder(0))
    with pytest.raises(SpecError, match="rename the folder"):
        invoke(serve_command, tmp_path / "model@home")


def test_missing_packages_are_named(
    invoke: Callable[..., Any], dense_folder: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(SpecError, match=r"pip install 'llmq\[serve\]'"):
        invoke(serve_command, dense_folder(0))
