"""Headers of safetensors files: what their own reader refuses is refused here too."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from llmq.checkpoint import CheckpointReader, tensor_infos
from llmq.errors import CheckpointError
from llmq.shards import read_tensors, write_tensors


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: object = (1,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED = {
    "empty": b"",
    "in its size": b"1234567",
    "header longer than the file": raw({}, length=3),
    "huge header": raw({}, length=2**63),
    "not JSON": raw(b"{"),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "nested too deeply": raw(b"[" * 10**6),
    "a list": raw([]),
    "no entry": raw({"a": 1}),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "three offsets": raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, bytes(4)),
    "text for offsets": raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": "04"}}, bytes(4)),
    "negative extent": raw({"a": entry(0, 4, [-1, -1])}, bytes(4)),
    "broken extent": raw({"a": entry(0, 4, [1.0])}, bytes(4)),
    "text for a shape": raw({"a": entry(0, 4, "1")}, bytes(4)),
    "negative offset": raw({"a": entry(-4, 0)}, bytes(4)),
    "backwards": raw({"a": entry(4, 0)}, bytes(4)),
    "fewer bytes than numbers": raw({"a": entry(0, 4, [2])}, bytes(4)),
    "more bytes than numbers": raw({"a": entry(0, 8, [1])}, bytes(8)),
    "data too short": raw({"a": entry(0, 4), "b": entry(4, 8)}, bytes(7)),
    "data too long": raw({"a": entry(0, 4)}, bytes(5)),
    "hole at the start": raw({"a": entry(4, 8)}, bytes(8)),
    "hole inside": raw({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "overlap": raw({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "same place": raw({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "nothing but data": raw({}, bytes(4)),
    "odd number of halves": raw({"a": entry(0, 1, [1], "F4")}, bytes(1)),
}


def test_tensors_come_back_as_they_were_written(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "half": torch.randn(3, 5, generator=draw).bfloat16(),
        "across": torch.randn(7, 4, generator=draw).T,
        "part": torch.randn(9, 9, generator=draw)[2:5, 1:8],
        "trained": torch.randn(2, 2, generator=draw).requires_grad_(),
        "bytes": torch.arange(11, dtype=torch.uint8),
        "none": torch.empty(0, 3),
        "one": torch.tensor(2.5, dtype=torch.float64),
    }
    file = tmp_path / "tensors.safetensors"
    with file.open("wb") as written:
        write_tensors(written.fileno(), tensors)
    with file.open("rb") as read:
        found = read_tensors(read.fileno())
    for other in (found, load_file(file)):
        assert other.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert other[name].dtype == tensor.dtype
            assert torch.equal(other[name], tensor)


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
    for open_it in (lambda: CheckpointReader(tmp_path), lambda: tensor_infos([file])):
        with pytest.raises(CheckpointError, match=rf"{file}: truncated or corrupt \(.+\); download it again$"):
            open_it()


def test_a_name_twice_in_one_header(tmp_path: Path) -> None:
    text = json.dumps(entry(0, 4)).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(raw(b'{"a":%b,"a":%b}' % (text, text), bytes(4)))
    with pytest.raises(CheckpointError, match=r"truncated or corrupt \(its header is not JSON: it has two entries of"):
        tensor_infos([file])


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F128", ["F32"]], ids=str)
def test_dtype_that_torch_does_not_have(dtype: object, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(raw({"a": entry(0, 3, [4], dtype)}, bytes(3)))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor a has dtype .*, which torch .* cannot read"):
        tensor_infos([file])


def test_files_that_are_sound_though_odd(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    content = {"z": entry(0, 0, [0, 5]), "b": entry(0, 8, [2]), "a": entry(8, 12, []), "e": entry(12, 12, [0])}
    file.write_bytes(raw({"__metadata__": {"format": "pt"}, **content}, bytes(12)))
    loaded = load_file(file)
    assert {name: info.shape for name, info in tensor_infos([file]).items()} == {
        name: tuple(tensor.shape) for name, tensor in loaded.items()
    }
    file.write_bytes(raw({}))
    assert tensor_infos([file]) == load_file(file) == {}


@st.composite
def flipped(draw: st.DrawFn) -> bytes:
    """Draw a sound file with a few bytes of it changed, most of them in the header."""
    content = {"a": entry(0, 8, [2]), "b": entry(8, 12, [2, 1], "F16"), "c": entry(12, 13, [1], "BOOL")}
    file = bytearray(raw(content, bytes(13)))
    for _ in range(draw(st.integers(1, 3))):
        file[draw(st.integers(0, len(file) - 1))] = draw(st.sampled_from(b'0123456789[]{},:"-. eFZ\x00\xff'))
    return bytes(file)


@given(file=flipped())
def test_whatever_safetensors_refuses_is_refused(file: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("flipped") / "a.safetensors"
    path.write_bytes(file)
    try:
        loaded = load_file(path)
    except (SafetensorError, KeyError, AttributeError, RuntimeError, TypeError):
        with pytest.raises(CheckpointError):
            tensor_infos([path])
        return
    assume(len({*re.findall(rb'"(.)":', file)}) >= 3)  # the same name twice is llmq's own objection
    infos = tensor_infos([path])
    assert {name: info.shape for name, info in infos.items()} == {n: tuple(t.shape) for n, t in loaded.items()}
