"""Sums of files and tensors: whatever changes is found, and the tensor is named."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmq.checkpoint import CheckpointReader
from llmq.errors import CheckpointError
from llmq.verify.certificate import read_certificate
from llmq.verify.signature import check_signature, sign_files, sign_tensors

TENSOR = "model.layers.1.mlp.down_proj.qweight"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def signed(packed: Path) -> dict[str, Any]:
    return {"files": sign_files(packed), "tensors": sign_tensors(CheckpointReader(packed))}


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def test_sums_are_those_of_the_bytes(packed: Path, signed: dict[str, Any]) -> None:
    assert signed["files"].keys() == {path.name for path in packed.iterdir()}
    config = (packed / "config.json").read_bytes()
    assert signed["files"]["config.json"] == {"sha256": hashlib.sha256(config).hexdigest(), "bytes": len(config)}
    content = load_file(packed / "model.safetensors")
    assert signed["tensors"].keys() == content.keys()
    for name, tensor in content.items():
        assert signed["tensors"][name] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def test_a_copy_is_as_certified(copy: Path, signed: dict[str, Any]) -> None:
    (copy / ".cache").mkdir()
    (copy / ".cache/download.lock").write_text("")
    (copy / "certificate.json").write_text("{}")
    (copy / "other.json").write_text("{}")
    assert check_signature(copy, signed, copy / "other.json") == []


def test_a_flipped_byte_is_found_and_its_tensor_named(copy: Path, signed: dict[str, Any]) -> None:
    info = CheckpointReader(copy).info(TENSOR)
    flip(copy / "model.safetensors", info.offset + info.nbytes - 1)
    assert check_signature(copy, signed) == [f"model.safetensors: sha256 differs; tensor {TENSOR} does"]


def test_several_tensors_are_counted(copy: Path, signed: dict[str, Any]) -> None:
    reader = CheckpointReader(copy)
    for name in (TENSOR, "model.norm.weight"):
        flip(copy / "model.safetensors", reader.info(name).offset)
    [fault] = check_signature(copy, signed)
    assert fault.endswith("does and 1 more")


def test_a_damaged_header_is_told(copy: Path, signed: dict[str, Any]) -> None:
    flip(copy / "model.safetensors", 7)
    [fault] = check_signature(copy, signed)
    assert fault.startswith("model.safetensors: sha256 differs; it cannot be read: ")


def test_other_metadata_leave_tensors_alone(copy: Path, signed: dict[str, Any]) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"format":"pt"', b'"format":"np"', 1))
    assert check_signature(copy, signed) == ["model.safetensors: sha256 differs; no tensor in it does"]


def test_files_that_come_go_or_change_are_named(copy: Path, signed: dict[str, Any]) -> None:
    (copy / "report.json").unlink()
    (copy / "more").mkdir()
    (copy / "more/code.py").write_text("")
    flip(copy / "config.json", 0)
    assert sorted(check_signature(copy, signed)) == [
        "config.json: sha256 differs",
        "more/code.py: not in the certificate",
        "report.json: missing",
    ]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"certificate": 2}', json.dumps({"certificate": "1"})])
def test_what_is_no_certificate_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "certificate.json").write_text(content)
    with pytest.raises(CheckpointError, match="certificate"):
        read_certificate(tmp_path / "certificate.json")
    with pytest.raises(CheckpointError, match="the certificate has no files or tensors"):
        check_signature(tmp_path, {"certificate": 1})
