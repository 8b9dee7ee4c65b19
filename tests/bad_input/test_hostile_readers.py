"""Folders made to break a reader end in a named error, soon, or are read: nothing else may come of them."""

import json
import os
import re
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from script_loading import load_script

from llmq.doctor import diagnose
from llmq.errors import CheckpointError, LlmqError, SpecError
from llmq.formats.naming import compiled, matches
from llmq.packed import PackedCheckpoint
from llmq.preflight import model_config

load_script("mutations")  # which the next one imports
fuzz = load_script("fuzz_readers")
SHARD, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
LONG = 5.0  # seconds of this process that no reader takes for any of these; they take a hundredth


@pytest.fixture(scope="module")
def sound() -> list[dict[str, bytes]]:
    found: list[dict[str, bytes]] = list(fuzz.sound_folders())
    return found


@pytest.fixture
def folder(sound: list[dict[str, bytes]], tmp_path: Path) -> Path:
    """Return a gptq folder with one shard."""
    return write(sound[0], tmp_path / "folder")


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    begun = time.process_time()
    yield
    assert time.process_time() - begun < 4 * LONG


def write(content: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, raw in content.items():
        (folder / name).write_bytes(raw)
    return folder


def refused(folder: Path, *words: str) -> None:
    begun = time.process_time()
    with pytest.raises(LlmqError) as caught:
        fuzz.read_all(folder)
    assert time.process_time() - begun < LONG
    assert len(str(caught.value)) < 2000
    for word in (str(folder), *words):
        assert word in str(caught.value)


def header(folder: Path) -> tuple[dict[str, Any], bytes]:
    raw = (folder / SHARD).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put(folder: Path, text: bytes, rest: bytes, length: int | None = None) -> None:
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + rest)


def change(folder: Path, **fields: object) -> str:
    """Change what the header says of the first tensor, and return its name."""
    content, rest = header(folder)
    name = next(key for key in content if key.endswith("qweight"))
    content[name] |= fields
    put(folder, json.dumps(content).encode(), rest)
    return name


def test_every_length_that_a_download_may_stop_at(folder: Path) -> None:
    raw = (folder / SHARD).read_bytes()
    with (folder / SHARD).open("r+b") as file:
        for length in range(len(raw) - 1, -1, -1):
            file.truncate(length)
            with pytest.raises(CheckpointError, match=SHARD):
                PackedCheckpoint(folder)


def test_every_bit_of_a_header_that_a_disk_may_lose(folder: Path) -> None:
    raw = bytearray((folder / SHARD).read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    with (folder / SHARD).open("r+b", buffering=0) as file:
        for at in range(length):
            os.pwrite(file.fileno(), bytes([raw[at] ^ 1 << at % 8]), at)
            try:
                fuzz.read_all(folder)  # a name of an expert that nobody looks for may still be read
            except LlmqError as error:
                assert str(folder) in str(error)  # noqa: PT017
            os.pwrite(file.fileno(), bytes([raw[at]]), at)
    fuzz.read_all(folder)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**63 - 1, 10**8, 0])
def test_headers_of_impossible_length(folder: Path, length: int) -> None:
    content, rest = header(folder)
    put(folder, json.dumps(content).encode(), rest, length)
    refused(folder, SHARD)


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [2**62, 2**62]},
        {"shape": [0, 2**63], "data_offsets": [0, 0]},
        {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        {"shape": [1] * 100_000},
        {"shape": [10**400, 1]},
        {"shape": [-8, -32]},
        {"shape": [16.0, 32.0]},
        {"shape": [True, 32]},
        {"shape": "16"},
        {"shape": {"16": 32}},
        {"shape": None},
        {"data_offsets": [8, 0]},
        {"data_offsets": [-8, 8]},
        {"data_offsets": [0]},
        {"data_offsets": [2**63, 2**63 + 2048]},
        {"data_offsets": [4, 2052]},
        {"data_offsets": None},
        {"dtype": "I16"},
        {"dtype": "F4"},
        {"dtype": "F33"},
        {"dtype": ["I32"]},
        {"dtype": "x" * 100_000},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_headers_that_lie(folder: Path, fields: dict[str, object]) -> None:
    change(folder, **fields)
    refused(folder, SHARD)


@pytest.mark.parametrize(("shape", "size"), [([1] * 65, 1), ([0, 2**63], 0), ([0, 2**62, 2**62], 0), ([0, 2**61], 0)])
def test_dense_tensors_whose_shape_torch_cannot_have(folder: Path, shape: list[int], size: int) -> None:
    content, rest = header(folder)
    content["x"] = {"dtype": "U8", "shape": shape, "data_offsets": [len(rest), len(rest) + size]}
    put(folder, json.dumps(content).encode(), rest + bytes(size))
    refused(folder, SHARD, "tensor x has", "too many or too large")


@pytest.mark.parametrize("dtype", ["I64", "U32", "F32", "C64", "BOOL", "F8_E4M3", "I8"])
def test_tensors_of_other_dtypes_that_fill_the_same_bytes(folder: Path, dtype: str) -> None:
    content, rest = header(folder)
    size = {"I64": 8, "C64": 8, "U32": 4, "F32": 4}.get(dtype, 1)
    for name, value in content.items():
        if name.endswith("qweight"):
            rows, columns = value["shape"]
            value |= {"dtype": dtype, "shape": [rows, columns * 4 // size]}
    put(folder, json.dumps(content).encode(), rest)
    refused(folder, "qweight")


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b'{"a\xff":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"[]",
        b"null",
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b"[" + b"[]," * 2_000_000 + b"[]]",
        b'{"a":1' + b"0" * 100_000 + b"}",
    ],
    ids=lambda text: text[:12],
)
def test_headers_that_are_no_header(folder: Path, text: bytes) -> None:
    put(folder, text, b"")
    refused(folder, SHARD)
    (folder / INDEX).write_bytes(text)
    refused(folder)
    (folder / INDEX).unlink()
    (folder / CONFIG).write_bytes(text)
    refused(folder)


def test_a_million_tensors(folder: Path) -> None:
    row = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    put(folder, b"{" + b",".join(row % number for number in range(10**6)) + b"}", b"")
    refused(folder, SHARD, "more than")


def test_as_many_tensors_as_the_largest_models_have_in_all(folder: Path) -> None:
    content, rest = header(folder)
    extra = {f"{n}.x": {"dtype": "U8", "shape": [0], "data_offsets": [len(rest)] * 2} for n in range(100_000)}
    put(folder, json.dumps({**content, **extra}).encode(), rest)
    begun = time.process_time()
    assert len(PackedCheckpoint(folder).layers) == 2
    assert time.process_time() - begun < LONG


@pytest.mark.parametrize(
    "name",
    [
        *("../{}", "/etc/passwd", "a/../{}", "..", ".", "", "a\x00b", "\ud800", "x" * 5000),
        *("missing", "loop", "link", "pipe", "sub"),
    ],
)
def test_an_index_that_leads_out_of_the_folder(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_text("secret")
    (folder / "link").symlink_to(folder.parent / "outside")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe")
    content, _ = header(folder)
    weight_map = dict.fromkeys(content, name.format(SHARD))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder)


def test_an_index_of_more_shards_than_there_can_be(folder: Path) -> None:
    weight_map = {f"t{number}": f"model-{number}.safetensors" for number in range(100_000)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "missing")


def test_more_shards_than_files_may_be_open(folder: Path) -> None:
    names = [f"model-{number}.safetensors" for number in range(300)]
    for name in names:
        (folder / name).write_bytes(struct.pack("<Q", 2) + b"{}")
    (folder / INDEX).write_text(json.dumps({"weight_map": {name: name for name in names}}))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    try:
        refused(folder, "Too many open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_same_shard_under_many_names(folder: Path) -> None:
    content, _ = header(folder)
    for number in range(100):
        os.link(folder / SHARD, folder / f"model-{number:05d}-of-00100.safetensors")
    weight_map = {f"{key}{n}": f"model-{n:05d}-of-00100.safetensors" for key in content for n in range(100)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="is in model-00000-of-00100"):
        PackedCheckpoint(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2**64},
        {"bits": 4.0},
        {"bits": 3},
        {"group_size": 10**30, "bits": 4},
        {"group_size": 0},
        {"group_size": [32]},
        {"sym": "yes"},
        {"quant_method": ["gptq"]},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "awq"},
        {"checkpoint_format": {"a": 1}},
        {"dynamic": {"(a+)+$": {}}},
        {"dynamic": {"x": {"bits": 8}, ".*": {"bits": 3}}},
        {"dynamic": [".*"]},
        {"modules_in_block_to_quantize": [[["q_proj"]]]},
    ],
    ids=str,
)
def test_a_configuration_that_contradicts_the_tensors(folder: Path, settings: dict[str, object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["quantization_config"] |= settings
    (folder / CONFIG).write_text(json.dumps(config))
    refused(folder, "")


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts"])
@pytest.mark.parametrize("inner", [None, "text_config"])
def test_more_blocks_than_the_files_could_hold(folder: Path, key: str, inner: str | None) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config |= {key: 2**31} if inner is None else {inner: {key: 2**31}}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(SpecError, match=rf"config.json: {key} is 2147483648, but the files have \d+ tensors"):
        model_config(PackedCheckpoint(folder))
    assert "model-unknown" in {finding.name for finding in diagnose(folder)}


@pytest.mark.parametrize("value", [64, "LlamaForCausalLM", {"": {}}, [], [[]], [None], None], ids=str)
def test_architectures_of_any_kind(folder: Path, value: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "architectures": value}))
    diagnose(folder)


NAME = "model.language_model.layers.0.mlp.experts.17.gate_proj"
EXPLODING = [
    *("(a+)+$", "(.*)*x", "(a|a)*$", "(a|aa)+$", "(?:[^.]+\\.?)*x", "(?=(.*)*)x", "((a{1,9}){1,9}){1,9}x", "(?:.?)*x"),
    *(".*.*.*.*.*.*.*.*x", ".*?" * 20 + "x", "a?" * 40 + "x", "(?:a|aa)" * 30, "x" * 20_000),
]


@pytest.mark.parametrize("pattern", EXPLODING, ids=lambda pattern: pattern[:20])
def test_an_expression_that_may_take_for_ever_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(CheckpointError, match=r"quantization_config: .* (has .* expression|leaves too many choices)"):
        matches(compiled(pattern, "dynamic"), NAME)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\..*\.mlp\.experts\..*\.(gate|up|down)_proj$",
        r"^model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up)_proj(\..*)?$",
        r"(?:.*\.)?(?:gate|up)_proj",
        r"model\.layers\.(?:[0-9]|1[0-9])\..*",
        r".*gate_proj.*",
        r".*\.mlp\.gate$",
        "|".join(rf".*\.layers\.{n}\..*" for n in range(80)),
    ],
)
def test_expressions_as_tools_write_them_pass(pattern: str) -> None:
    assert matches(compiled(pattern, "dynamic"), NAME) == (re.match(pattern, NAME) is not None)


def test_a_thousand_mutations(sound: list[dict[str, bytes]], tmp_path: Path) -> None:
    found = [fuzz.outcome(number, sound, tmp_path / "case", doctor=False) for number in range(1000)]
    assert {number: seen for number, seen in enumerate(found) if seen not in ("read", "refused")} == {}
    assert 50 < found.count("read") < 500


def test_fifty_mutations_for_the_doctor(sound: list[dict[str, bytes]], tmp_path: Path) -> None:
    found = [fuzz.outcome(number, sound, tmp_path / "case") for number in range(50)]
    assert {number: seen for number, seen in enumerate(found) if seen not in ("read", "refused")} == {}


def test_a_thousand_mutations_of_folders_on_grids(sound: list[dict[str, bytes]], tmp_path: Path) -> None:
    on_grids = sound[-len(fuzz.GRIDS) :]
    found = [fuzz.outcome(number, on_grids, tmp_path / "case", doctor=False) for number in range(1000)]
    assert {number: seen for number, seen in enumerate(found) if seen not in ("read", "refused")} == {}
    assert 50 < found.count("read") < 500


def test_sound_folders_are_sound(sound: list[dict[str, bytes]], tmp_path: Path) -> None:
    for number, content in enumerate(sound):
        fuzz.read_all(write(content, tmp_path / str(number)))
