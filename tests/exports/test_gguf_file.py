"""GGUF files, read: what the gguf package writes, what llama.cpp's rows are, and files that are damaged."""

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from export_cases import quantize, random_weight
from torch import Tensor

from llmq.errors import CheckpointError
from llmq.exports import blocks, gguf_file
from llmq.exports.gguf_file import GGUFFile


def write(path: Path, tensors: dict[str, tuple[str, Any]], *, arch: str = "qwen2", **metadata: Any) -> Path:
    """Write a file with the gguf package; a tensor is the name of its type and numbers, or bytes of blocks."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    for name, (kind, content) in tensors.items():
        writer.add_tensor(name, content, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(kind: str, weight: Any) -> tuple[str, np.ndarray]:
    return kind, torch.cat(list(blocks.pack(kind, weight))).numpy()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file with metadata of all sorts, a dense and a packed tensor."""
    return write(
        tmp_path / "small.gguf",
        {"a.weight": packed("Q4_0", random_weight(2, 32, 4, 32)), "b": ("F32", np.arange(3, dtype=np.float32))},
        head_count=4,
        rope_freq_base=1e4,
        add_bos_token=True,
        token_list=["a", "bc"],
        token_types=[1, 1],
        chat_template="x" * 300,
        name="ü",
    )


def test_metadata_is_kept_without_arrays_and_long_texts(small: Path) -> None:
    assert GGUFFile(small).metadata == {
        "general.architecture": "qwen2",
        "general.name": "ü",
        "qwen2.attention.head_count": 4,
        "qwen2.rope.freq_base": 1e4,
        "tokenizer.ggml.add_bos_token": True,
    }


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_dense_tensors(tmp_path: Path, kind: str) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    tensor = torch.randn(3, 5).to(dtype)
    content = tensor.view(torch.uint8).numpy() if kind == "BF16" else tensor.numpy()
    file = GGUFFile(write(tmp_path / "x.gguf", {"first": ("F32", np.ones(1, np.float32)), "t": (kind, content)}))
    assert (file.tensors["t"].shape, file.tensors["t"].type) == ((3, 5), kind)
    assert torch.equal(file.read("t"), tensor)
    with pytest.raises(CheckpointError, match=r"tensor t is .*; llmq reads codes of Q2_K, Q3_K, "):
        file.weight("t")
    with pytest.raises(CheckpointError, match="has no tensor u"):
        file.read("u")


@pytest.mark.parametrize("alignment", [8, 32, 128])
def test_the_alignment_is_the_files_own(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for name in "ab":
        writer.add_tensor(name, np.full(3, ord(name), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert [GGUFFile(path).read(name).tolist() for name in "ab"] == [[97.0] * 3, [98.0] * 3]


@pytest.mark.parametrize("size", [32, 64, 128, 192, 384])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_codes_and_groups_come_back(tmp_path: Path, kind: str, size: int) -> None:
    block = blocks.BLOCKS[kind]
    weight = random_weight(3, 384, block.bits, size, symmetric=not block.offset, seed=size)
    if kind == "Q4_1":
        weight = replace(weight, scales=torch.arange(1, weight.scales.numel() + 1).reshape(weight.scales.shape) / 64)
    back = GGUFFile(write(tmp_path / "x.gguf", {"w": packed(kind, weight)})).weight("w")
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert back.grid == weight.grid
    # 384 columns are 12 blocks: pairs of pairs of blocks make 128, three of which stay
    assert back.group_size == {32: 32, 64: 64, 128: 128, 192: 64, 384: 128}[size]


def test_groups_that_differ_in_their_zeros_only_stay_apart(tmp_path: Path) -> None:
    weight = replace(random_weight(2, 64, 4, 32, symmetric=False), scales=torch.ones(2, 2))
    weight = replace(weight, zeros=torch.tensor([[3.0, 5.0], [3.0, 3.0]]))
    back = GGUFFile(write(tmp_path / "x.gguf", {"w": packed("Q4_1", weight)})).weight("w")
    assert (back.group_size, back.zeros.tolist()) == (32, weight.zeros.tolist())


def test_what_the_gguf_package_quantizes_is_read(tmp_path: Path) -> None:
    w = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    for kind in ("Q4_0", "Q5_0", "Q8_0"):
        raw = gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
        back = GGUFFile(write(tmp_path / f"{kind}.gguf", {"w": (kind, raw)})).weight("w")
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
        assert np.array_equal(back.dequantize().numpy(), theirs)


def test_experts_are_read_one_by_one(tmp_path: Path) -> None:
    weights = [random_weight(3, 64, 4, 32, seed=seed) for seed in range(3)]
    raw = torch.stack([torch.cat(list(blocks.pack("Q4_0", weight))) for weight in weights]).numpy()
    file = GGUFFile(write(tmp_path / "x.gguf", {"w": ("Q4_0", raw)}))
    assert file.tensors["w"].shape == (3, 3, 64)
    for expert, weight in enumerate(weights):
        assert torch.equal(file.weight("w", expert).codes, weight.codes)
    with pytest.raises(CheckpointError, match=r"tensor w has shape \[3, 3, 64\], no expert 3"):
        file.weight("w", 3)


@pytest.mark.parametrize(("name", "heads"), [("blk.0.attn_q.weight", 4), ("blk.0.attn_k.weight", 2)])
def test_rows_of_a_llama_are_put_back(tmp_path: Path, name: str, heads: int) -> None:
    weight = quantize(torch.randn(32, 64), 4, 32)
    half = 32 // heads // 2
    # GGUF has the rows i and i + half of a head next to each other
    order = [head * 2 * half + i + side * half for head in range(heads) for i in range(half) for side in (0, 1)]
    moved = replace(weight, codes=weight.codes[order], scales=weight.scales[order], zeros=weight.zeros[order])
    tensors = {name: packed("Q4_0", moved), "blk.0.attn_v.weight": packed("Q4_0", weight)}
    file = GGUFFile(write(tmp_path / "l.gguf", tensors, arch="llama", head_count=4, head_count_kv=2))
    for read in (file.weight(name), file.weight("blk.0.attn_v.weight")):
        assert torch.equal(read.dequantize(), weight.dequantize())
    other = GGUFFile(write(tmp_path / "q.gguf", tensors, arch="qwen2", head_count=4, head_count_kv=2))
    assert torch.equal(other.weight(name).dequantize(), moved.dequantize())
    bad = GGUFFile(write(tmp_path / "b.gguf", tensors, arch="llama", head_count=5, head_count_kv=0))
    with pytest.raises(CheckpointError, match=r"has 32 rows for llama\.attention\.head_count(_kv)? [05]"):
        bad.weight(name)


def test_a_file_cut_anywhere_is_an_error(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    end = max(stored.offset + stored.nbytes for stored in GGUFFile(small).tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in {*range(0, end, 7), end - 1}:
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: is not a GGUF file that llmq can read: "):
            GGUFFile(cut)


def test_a_byte_changed_anywhere_is_an_error_or_another_file(small: Path, tmp_path: Path) -> None:
    content = bytearray(small.read_bytes())
    end = min(stored.offset for stored in GGUFFile(small).tensors.values())
    changed = tmp_path / "changed.gguf"
    choose = random.Random(0)
    for at in range(end):
        value = choose.choice([0, 255, content[at] ^ 1 << choose.randrange(8)])
        changed.write_bytes(bytes(content[:at]) + bytes([value]) + bytes(content[at + 1 :]))
        try:
            file = GGUFFile(changed)
            for name, stored in file.tensors.items():
                _ = file.read(name) if stored.type in ("F32", "F16", "BF16") else file.weight(name)
        except CheckpointError as error:
            assert str(changed) in str(error)  # noqa: PT017


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content.encode())) + content.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def header(tensors: list[bytes], keys: list[bytes], *, n_tensors: int = -1, n_keys: int = -1) -> bytes:
    counts = (len(tensors) if n_tensors < 0 else n_tensors, len(keys) if n_keys < 0 else n_keys)
    return struct.pack("<4sIQQ", b"GGUF", 3, *counts) + b"".join(keys) + b"".join(tensors)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it ends within its header"),
        (b"GGML" + bytes(100), "it does not begin with GGUF"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "its version is 1, llmq reads 2 and 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "its version is 50331648, llmq reads 2 and 3"),
        (header([], [], n_tensors=2**63), "it claims 9223372036854775808 tensors"),
        (header([], [], n_keys=2**17), "it claims 131072 metadata keys"),
        (header([], [], n_keys=1) + struct.pack("<Q", 2**62), "a metadata key has 4611686018427387904 bytes"),
        (header([], [key("x", 4, bytes(4))] * 2), "it has the metadata key x twice"),
        (header([], [key("x", 13, bytes(64))]), "its metadata has a value of type 13"),
        (header([], [key("x", 9, struct.pack("<IQ", 9, 1))]), "its metadata has an array of type 9"),
        (header([], [key("x", 9, struct.pack("<IQ", 8, 2**40))]), "it claims 1099511627776 items of an array"),
        (header([], [key("x", 9, struct.pack("<IQ", 10, 2**20))]), "it ends within its header"),
        (header([], [key("x", 8, struct.pack("<Q", 2**60))]), "it ends within its header"),
        (header([], [key("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment is 0, not a power of 2"),
        (header([], [key("general.alignment", 4, struct.pack("<I", 48))]), "general.alignment is 48, not a power"),
        (header([], [key("general.alignment", 8, text("x"))]), "general.alignment is 'x', not a power of 2"),
        (header([], [key("x", 8, struct.pack("<Q", 2) + b"\xff\xff")]), "can't decode byte 0xff"),
        (header([tensor("t", ())], []), "tensor t has 0 dimensions"),
        (header([tensor("t", (1,) * 5)], []), "tensor t has 5 dimensions"),
        (header([tensor("t", (0, 4))], []), r"tensor t is empty: \[0, 4\]"),
        (header([tensor("t" * 65, (4,))], []), "the name of a tensor has 65 bytes"),
        (header([tensor("t", (2**62, 2**62))], []) + bytes(99), "tensor t of 8507059173.* bytes cannot lie at 0"),
        (header([tensor("t", (4,), offset=2**63)], []) + bytes(99), "tensor t of 16 bytes cannot lie at 9223372036"),
        (header([tensor("t", (4,), offset=1)], []) + bytes(99), "tensor t of 16 bytes cannot lie at 1 "),
        (header([tensor("t", (4,))] * 2, []) + bytes(99), "it has two tensors t"),
        (header([tensor("t", (4,)), tensor("u", (4,))], []) + bytes(99), "tensor u of 16 bytes cannot lie at 0 "),
        (header([tensor("t", (2, 48), kind=2)], []) + bytes(99), "tensor t has rows of 48, no multiple of 32"),
    ],
)
def test_hostile_headers_are_refused_by_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"is not a GGUF file that llmq can read: .*{message}"):
        GGUFFile(path)


def test_types_that_llmq_does_not_know_are_named_when_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header([tensor("t", (4, 256), kind=23)], []) + bytes(4096))
    for read in (GGUFFile(path).read, GGUFFile(path).weight):
        with pytest.raises(CheckpointError, match="tensor t is number 23"):
            read("t")


@pytest.mark.parametrize("damage", [lambda raw: raw[:, 1:2].fill_(0x7C)])
def test_damaged_codes_are_refused_by_the_tensors_name(tmp_path: Path, damage: Callable[[Tensor], Tensor]) -> None:
    raw = torch.cat(list(blocks.pack("Q4_0", random_weight(2, 32, 4, 32))))
    damage(raw)
    file = GGUFFile(write(tmp_path / "x.gguf", {"w": ("Q4_0", raw.numpy())}))
    with pytest.raises(CheckpointError, match=r"x\.gguf: tensor w holds a scale that is not finite"):
        file.weight("w")


def test_a_file_that_shrinks_while_it_is_read(small: Path) -> None:
    file = GGUFFile(small)
    with small.open("r+b") as handle:
        handle.truncate(file.tensors["b"].offset)
    with pytest.raises(CheckpointError, match="tensor b cannot be read: it ends 12 bytes early"):
        file.read("b")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        GGUFFile(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        GGUFFile(tmp_path)


def test_many_texts_do_not_take_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "_MOST_ITEMS", 3)
    path = tmp_path / "x.gguf"
    for count in (3, 4):
        path.write_bytes(header([], [key("x", 9, struct.pack("<IQ", 8, count) + text("a") * count)]))
        if count == 3:
            assert GGUFFile(path).metadata == {}
        else:
            with pytest.raises(CheckpointError, match="it claims 4 items"):
                GGUFFile(path)
