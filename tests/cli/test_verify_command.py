"""`llmq verify`: the certificate of the example model, and what a damaged copy of it fails on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from llmq.checkpoint import CheckpointReader
from llmq.cli.verify import verify_command
from llmq.errors import CheckpointError, SpecError

EXAMPLES = Path(__file__).parents[2] / "examples"
DENSE, PACKED = EXAMPLES / "wiki-llama-1m", EXAMPLES / "wiki-llama-1m-4bit"
CERTIFICATE = PACKED / "certificate.json"
TENSOR = "model.layers.2.self_attn.o_proj.scales"

Invoke = Callable[..., Result]


def damaged(folder: Path) -> Path:
    shutil.copytree(PACKED, folder)
    info = CheckpointReader(folder).info(TENSOR)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[info.offset + 7] ^= 64
    (folder / "model.safetensors").write_bytes(content)
    return folder


def test_the_example_is_as_certified(invoke: Invoke) -> None:
    result = invoke(verify_command, PACKED, "--certificate", CERTIFICATE)
    assert result.exit_code == 0, result.output
    assert "as certified" in result.stdout
    certificate = json.loads(CERTIFICATE.read_bytes())
    assert certificate["faults"] == []
    verdicts = {row["loader"]: row["verdict"] for row in certificate["loaders"] if row["loaded"]}
    assert verdicts["llmq"] == verdicts["transformers"] == "exact"


def test_a_damaged_copy_fails_and_the_tensor_is_named(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke(verify_command, damaged(tmp_path / "copy"), "--certificate", CERTIFICATE, "--json")
    assert result.exit_code == 1
    expected = f"model.safetensors: sha256 differs; tensor {TENSOR} does"
    assert json.loads(result.stdout)["faults"] == [expected]
    assert result.stderr == f"fault: {expected}\n"


def test_a_certificate_is_made_and_holds(invoke: Invoke, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(PACKED, folder)
    file = folder / "proof.json"
    result = invoke(verify_command, folder, "--against", DENSE, "--loaders", "llmq", "--output", file, "--json")
    assert result.exit_code == 0, result.stderr
    made, before = json.loads(file.read_bytes()), json.loads(CERTIFICATE.read_bytes())
    assert made == json.loads(result.stdout)
    assert made["loaders"][0]["verdict"] == "exact"
    assert made["loaders"][0]["new_tokens"] == before["loaders"][0]["new_tokens"]
    for key in ("files", "tensors", "account", "sizes"):
        assert made[key] == before[key]
    # float32 on another processor: sums in another order
    assert made["packing"]["kl"] == pytest.approx(before["packing"]["kl"], rel=1e-3)
    assert invoke(verify_command, folder, "--certificate", file).exit_code == 0


def test_a_fault_is_a_line_and_exit_code_1(invoke: Invoke, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(DENSE, source)
    content = bytearray((source / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (source / "model.safetensors").write_bytes(content)
    result = invoke(verify_command, PACKED, "--against", source, "--loaders", "")
    assert result.exit_code == 1
    [fault] = [line for line in result.stderr.splitlines() if line.startswith("fault: ")]
    assert "is not the original's, and report.json does not say why" in fault


def test_what_cannot_be_carried_out_is_refused(invoke: Invoke) -> None:
    with pytest.raises(SpecError, match="give either --against"):
        invoke(verify_command, PACKED)
    with pytest.raises(SpecError, match="--loaders exllama: unknown"):
        invoke(verify_command, PACKED, "--against", DENSE, "--loaders", "exllama")
    with pytest.raises(CheckpointError, match="is packed"):
        invoke(verify_command, PACKED, "--against", PACKED, "--loaders", "")
