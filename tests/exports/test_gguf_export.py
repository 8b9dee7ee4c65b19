"""Packed folders as GGUF files: every tensor and number as the gguf package reads it."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from export_cases import (
    EXPERTS,
    LLAMA3,
    SIZES,
    Packed,
    dequantized,
    make_folder,
    pack_linears,
    quantize,
    random_weight,
    rewrite,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmq.errors import CheckpointError, SpecError
from llmq.exports import EXPORTS
from llmq.exports import gguf as gguf_export
from llmq.exports.architectures import rotary_factors
from llmq.exports.gguf import export
from llmq.exports.gguf_file import GGUFFile
from llmq.formats import FORMATS
from llmq.packed import PackedCheckpoint
from llmq.types import QuantSpec

BLOCK = {  # of GGUF: of transformers
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def source(name: str) -> str:
    """Return transformers' name of a tensor of GGUF."""
    first, *rest = name.split(".")
    if first != "blk":
        return f"{OUTER[first]}.{rest[0]}"
    index, inner, ending = rest
    return f"model.layers.{index}.{BLOCK[inner]}.{ending}"


def expected(packed: Packed, name: str, *, moved: bool) -> Tensor:
    """Return what tensor `name` of the file should hold."""

    def one(key: str) -> Tensor:
        module = key.removesuffix(".weight")
        return dequantized(packed.weight(module)) if module in packed.specs else packed.read(key).float()

    key = source(name)
    w = torch.stack([one(key.format(expert)) for expert in range(4)]) if "{}" in key else one(key)
    heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
    if not moved or heads is None:
        return w
    half = len(w) // heads // 2
    return w[[head * 2 * half + i + side * half for head in range(heads) for i in range(half) for side in (0, 1)]]


def content(reader: gguf.GGUFReader) -> dict[str, Tensor]:
    dequantize = gguf.quants.dequantize
    return {x.name: torch.from_numpy(np.array(dequantize(x.data, x.tensor_type))) for x in reader.tensors}


def fields(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize(
    ("config", "arch"),
    [
        (LlamaConfig(**SIZES), "llama"),
        (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), "llama"),
        (LlamaConfig(**SIZES, head_dim=32, rope_parameters=LLAMA3), "llama"),
        (MistralConfig(**SIZES, sliding_window=96), "llama"),
        (Qwen2Config(**SIZES), "qwen2"),
        (Qwen3Config(**SIZES, head_dim=32), "qwen3"),
        (Qwen3MoeConfig(**SIZES, **EXPERTS), "qwen3moe"),
    ],
    ids=["llama", "biases", "llama3", "mistral", "qwen2", "qwen3", "qwen3moe"],
)
def test_every_tensor_is_in_its_place(tmp_path: Path, config: PretrainedConfig, arch: str) -> None:
    packed = pack_linears(make_folder(tmp_path / "m", config))
    types = export(packed, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = content(reader)
    factors = found.pop("rope_freqs.weight", None)
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors if tensor.name in found} == types
    for name, tensor in found.items():
        assert torch.equal(tensor, expected(packed, name, moved=arch == "llama")), name
        packs = "_proj" in source(name) and name.endswith("weight")
        assert types[name] == ("Q4_0" if packs else "F32" if tensor.dim() == 1 or "gate_inp" in name else "BF16")
    here = {source(name).format(expert) for name in found for expert in range(4)}
    assert here == set(packed) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    metadata = fields(reader)
    assert metadata["general.architecture"] == arch
    head = getattr(config, "head_dim", None) or 16
    numbers = {
        "context_length": 96 if isinstance(config, MistralConfig) else 128,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "vocab_size": 320,
    }
    if arch == "qwen3moe":
        numbers |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    assert {key: value for key, value in metadata.items() if key.startswith(f"{arch}.")} == {
        f"{arch}.{key}": value for key, value in numbers.items()
    }
    assert (factors is not None) == (config.rope_parameters["rope_type"] == "llama3")


def test_tokenizer_and_marks_of_the_file(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "name of it", LlamaConfig(**SIZES))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    export(pack_linears(folder), tmp_path / "m.gguf")
    metadata = fields(gguf.GGUFReader(tmp_path / "m.gguf"))
    tokens = metadata.pop("tokenizer.ggml.tokens")
    types, merges = metadata.pop("tokenizer.ggml.token_type"), metadata.pop("tokenizer.ggml.merges")
    assert (tokens[0], len(tokens), types[0], len(types)) == ("<|end|>", 320, 3, 320)
    assert merges[0] == "t h"
    assert {key: value for key, value in metadata.items() if not key.startswith("llama.")} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "name of it",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }


def test_linear_scaling_of_positions(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    export(pack_linears(make_folder(tmp_path / "m", config)), tmp_path / "m.gguf")
    metadata = fields(gguf.GGUFReader(tmp_path / "m.gguf"))
    assert (metadata["llama.rope.scaling.type"], metadata["llama.rope.scaling.factor"]) == ("linear", 4.0)


@pytest.mark.parametrize("theta", [500.0, 500000.0])
@pytest.mark.parametrize("head", [32, 128])
def test_rotary_factors_of_llama_3_are_those_of_transformers(theta: float, head: int) -> None:
    rope = {**LLAMA3, "rope_theta": theta, "original_max_position_embeddings": 8192}
    config = LlamaConfig(**{**SIZES, "max_position_embeddings": 131072}, head_dim=head, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** -(torch.arange(0, head, 2).double() / head)
    factors = rotary_factors(config)
    assert factors is not None
    # theirs are computed in float32, whose powers are off by a few units in the last place
    torch.testing.assert_close(plain / factors.double(), scaled.double(), rtol=2e-6, atol=0)
    assert factors.min() == 1
    assert theta == 500 or factors.max() == 8
    assert rotary_factors(LlamaConfig(**SIZES)) is None


@pytest.mark.parametrize(
    ("bits", "size", "symmetric", "kind"),
    [
        (2, 32, True, "Q4_0"),
        (3, 64, False, "Q4_0"),
        (4, 128, True, "Q4_0"),
        (4, 64, False, "Q5_0"),
        (5, 64, True, "Q5_0"),
        (8, 64, True, "Q8_0"),
        (2, 256, False, "Q2_K"),
        (3, 256, True, "Q3_K"),
        (4, 256, False, "Q4_K"),
        (6, 256, True, "Q6_K"),
    ],
)
def test_the_smallest_type_that_is_exact_is_taken(
    tmp_path: Path, bits: int, size: int, symmetric: bool, kind: str
) -> None:
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    folder = make_folder(tmp_path / "m", LlamaConfig(**sizes))
    packed = pack_linears(folder, bits, size, symmetric=symmetric)
    types = export(packed, tmp_path / "m.gguf")
    assert {
        name: found for name, found in types.items() if "BF16" not in found and "F32" not in found
    } == dict.fromkeys((name for name in types if "blk" in name and "norm" not in name), kind)
    read = GGUFFile(tmp_path / "m.gguf").weight("blk.0.attn_q.weight")
    assert torch.equal(read.dequantize(), packed.weight("model.layers.0.self_attn.q_proj").dequantize())
    metadata = fields(gguf.GGUFReader(tmp_path / "m.gguf"))
    name = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M"}.get(kind, kind)
    assert metadata["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{name}"]


def test_a_type_may_be_asked_for(llama: Packed, tmp_path: Path) -> None:
    types = export(llama, tmp_path / "m.gguf", kind="Q8_0")
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    with pytest.raises(
        SpecError, match=r"no GGUF block type holds its codes exactly, not even Q4_K: a block has 256 weigh"
    ):
        export(llama, tmp_path / "k.gguf", kind="Q4_K")
    with pytest.raises(SpecError, match="GGUF type 'Q4_0_0' is unknown; use Q2_K, Q3_K, Q4_0"):
        export(llama, tmp_path / "k.gguf", kind="Q4_0_0")


def test_a_packed_head_is_kept_also_beside_a_tied_embedding(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", LlamaConfig(**SIZES, tie_word_embeddings=True))
    packed = pack_linears(folder)
    head = quantize(packed.read("model.embed_tokens.weight"), 8, 32)
    packed = Packed(folder, {**packed._weights, "lm_head": head})
    types = export(packed, tmp_path / "m.gguf")
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q8_0", "BF16")


def test_linears_that_stay_dense_keep_their_dtype(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", LlamaConfig(**SIZES))
    whole = pack_linears(folder)
    rewrite(folder, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": t["lm_head.weight"][:96].half()}))
    kept = ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj")
    packed = Packed(folder, {name: weight for name, weight in whole._weights.items() if name not in kept})
    types = export(packed, tmp_path / "m.gguf")
    assert (types["blk.0.ffn_up.weight"], types["blk.0.attn_q.weight"]) == ("F16", "BF16")
    found = content(gguf.GGUFReader(tmp_path / "m.gguf"))
    for name in ("blk.0.ffn_up.weight", "blk.0.attn_q.weight"):
        assert torch.equal(found[name], expected(packed, name, moved=True))


def test_large_dense_tensors_are_copied_some_rows_at_a_time(
    llama: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmq.checkpoint._PIECE", 1000)
    largest = []
    write = gguf_export.write_bytes

    def watched(handle: int, content: memoryview, offset: int) -> None:
        largest.append(len(content))
        write(handle, content, offset)

    monkeypatch.setattr(gguf_export, "write_bytes", watched)
    export(llama, tmp_path / "m.gguf")
    assert max(largest) == 96 * 64 // 32 * 18  # codes of a linear layer; the embedding has 40960 bytes
    assert torch.equal(GGUFFile(tmp_path / "m.gguf").read("token_embd.weight"), llama.read("model.embed_tokens.weight"))


def test_tensors_that_config_json_says_already_are_left_out(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", LlamaConfig(**SIZES))
    weights = pack_linears(folder)._weights
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    with_them = export(Packed(folder, weights), tmp_path / "m.gguf")
    rewrite(folder, lambda t: t.pop("model.layers.0.self_attn.rotary_emb.inv_freq"))
    assert with_them == export(Packed(folder, weights), tmp_path / "n.gguf")


def test_a_head_that_is_tied_is_left_out(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", LlamaConfig(**SIZES, tie_word_embeddings=True))
    weights = pack_linears(folder)._weights
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "output.weight" not in export(Packed(folder, weights), tmp_path / "m.gguf")


def test_experts_are_one_tensor_of_one_type(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", Qwen3MoeConfig(**SIZES, **EXPERTS))
    packed = pack_linears(folder)
    expert = "model.layers.1.mlp.experts.2.gate_proj"
    packed._weights[expert] = quantize(packed.read(f"{expert}.weight"), 8, 32)
    types = export(packed, tmp_path / "m.gguf")
    assert (types["blk.0.ffn_gate_exps.weight"], types["blk.1.ffn_gate_exps.weight"]) == ("Q4_0", "Q8_0")
    read = GGUFFile(tmp_path / "m.gguf")
    assert torch.equal(read.weight("blk.1.ffn_gate_exps.weight", 2).codes, packed.weight(expert).codes)
    packed._weights[expert] = random_weight(48, 64, 4, 32)
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj and the other experts differ in shape"):
        export(packed, tmp_path / "n.gguf")
    some = {name: weight for name, weight in packed._weights.items() if name != expert}
    with pytest.raises(
        SpecError, match=rf"blk\.1\.ffn_gate_exps\.weight: {expert}\.weight is dense and other experts are p"
    ):
        export(Packed(folder, some), tmp_path / "n.gguf")
    rewrite(folder, lambda t: t.pop(f"{expert}.weight"))
    with pytest.raises(
        CheckpointError, match=r"blk\.1\.ffn_gate_exps\.weight is put together from 4 experts, the files have 3"
    ):
        export(Packed(folder, some), tmp_path / "n.gguf")


def test_a_packed_folder_from_disk(llama: Packed, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(llama.path, folder)
    spec = QuantSpec(4, 32, True, "gptq")
    tensors = {key: llama.read(key) for key in llama.dense}
    for module in llama.specs:
        packed = FORMATS["gptq"].pack(llama.weight(module), spec)
        tensors |= {f"{module}.{local}": tensor.contiguous() for local, tensor in packed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = FORMATS["gptq"].config(dict.fromkeys(llama.specs, spec), ["lm_head"])
    (folder / "config.json").write_text(json.dumps({**llama.config, "quantization_config": quantization}))
    EXPORTS["gguf"].export(PackedCheckpoint(folder), tmp_path / "m.gguf")
    found = content(gguf.GGUFReader(tmp_path / "m.gguf"))
    assert {
        name for name, tensor in found.items() if not torch.equal(tensor, expected(llama, name, moved=True))
    } == set()
    assert len(found) == 2 * 9 + 3
