"""One quantization in every format: there and back in the same bytes, and what cannot be said is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, make_llama, make_model
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, Qwen3MoeConfig

import llmq
from llmq.calibration import Calibration
from llmq.convert import convert
from llmq.driver import quantize
from llmq.errors import CheckpointError, SpecError
from llmq.packed import PackedCheckpoint
from llmq.recipe import Recipe
from llmq.writing import CheckpointWriter

MOE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=WORDS, n_embd=64, n_layer=2, n_head=2, n_positions=64),
    "qwen3_moe": Qwen3MoeConfig(**MOE, head_dim=16, num_experts=4, moe_intermediate_size=32),
    "mixtral": MixtralConfig(**MOE, num_local_experts=4),
}
IDS = torch.randint(1, WORDS, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives a model quantized with these settings."""
    made: dict[Any, Path] = {}

    def make(model: str = "llama", bits: int = 4, *, sym: bool = True) -> Path:
        key = (model, bits, sym)
        if key not in made:
            folder = tmp_path_factory.mktemp("packed")
            recipe = Recipe(method="rtn", bits=bits, sym=sym, group_size=32, shard_size="60KB")
            source = make_llama(folder / "dense") if model == "llama" else make_model(folder / "dense", CONFIGS[model])
            quantize(source, folder / "packed", recipe)
            made[key] = folder / "packed"
        return made[key]

    return make


def tensors(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = llmq.load(folder, dtype=torch.float32)(IDS).logits
    return out


def edit(source: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Copy a packed folder of one shard, its tensors changed."""
    shutil.copytree(source, folder)
    content = {}
    for shard in sorted(folder.glob("*.safetensors")):
        content |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(content)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("model", "bits", "sym", "way"),
    [
        ("llama", 4, True, ["awq", "compressed-tensors", "gptq"]),
        ("llama", 4, True, ["gptq_v2", "awq", "gptq"]),
        ("llama", 4, False, ["compressed-tensors", "gptq"]),
        ("llama", 4, False, ["awq", "compressed-tensors", "gptq_v2"]),
        ("llama", 8, True, ["compressed-tensors", "gptq"]),
        ("llama", 3, False, ["compressed-tensors-padded", "compressed-tensors", "gptq"]),
        ("llama", 2, True, ["compressed-tensors", "gptq"]),
        ("gpt2", 4, True, ["awq", "compressed-tensors", "gptq"]),
        ("qwen3_moe", 4, True, ["awq", "compressed-tensors", "gptq"]),
        ("mixtral", 4, False, ["compressed-tensors", "gptq"]),
        ("llama", 3, False, ["llmq", "compressed-tensors-padded", "llmq", "gptq"]),
        ("llama", 8, True, ["llmq", "gptq"]),
        ("gpt2", 4, False, ["llmq", "awq", "gptq"]),
        ("qwen3_moe", 4, True, ["llmq", "gptq"]),
        ("gpt2", 3, False, ["auto-round", "llmq", "auto-round", "gptq"]),
        ("qwen3_moe", 4, True, ["auto-round", "awq", "auto-round-v2", "gptq"]),
    ],
    ids=str,
)
def test_there_and_back_are_the_same_bytes(
    packed: Callable[..., Path], tmp_path: Path, model: str, bits: int, sym: bool, way: list[str]
) -> None:
    source = here = packed(model, bits, sym=sym)
    expected = logits(source)
    for step, format in enumerate(way):
        there = tmp_path / str(step)
        done = convert(here, there, format, shard_bytes=60_000)
        assert done.layers == len(PackedCheckpoint(source).layers)
        assert not done.rounded
        assert torch.equal(logits(there), expected), format
        here = there
    assert tensors(here) == tensors(source)


def test_everything_beside_the_weights_comes_along(packed: Callable[..., Path], tmp_path: Path) -> None:
    source = packed()
    convert(source, tmp_path / "awq", "awq")
    theirs = {path.name for path in source.iterdir() if not path.name.startswith("model")}
    ours = {path.name for path in (tmp_path / "awq").iterdir() if not path.name.startswith("model")}
    assert ours == theirs - {"quantize_config.json"}
    assert (tmp_path / "awq/report.json").read_bytes() == (source / "report.json").read_bytes()
    config = json.loads((tmp_path / "awq/config.json").read_bytes())
    assert config["quantization_config"]["quant_method"] == "awq"
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]


@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen3_moe"])
def test_dequantized_weights_are_what_the_codes_stand_for(
    packed: Callable[..., Path], tmp_path: Path, model: str
) -> None:
    source = packed(model)
    convert(source, tmp_path / "dense", "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert loaded.config.to_dict().get("quantization_config") is None
    with torch.no_grad():
        # the products of packed layers are summed in another order: 64 terms each, a few layers
        assert torch.allclose(loaded(IDS).logits, logits(source), rtol=1e-4, atol=1e-4)
    reader = PackedCheckpoint(source)
    content = load_file(tmp_path / "dense/model.safetensors")
    for module in reader.layers:
        dense = reader.weight(module).dequantize()
        assert torch.equal(content[f"{module}.weight"], dense.T if model == "gpt2" else dense)


@pytest.mark.parametrize(
    ("bits", "sym", "format", "message"),
    [
        (8, True, "awq", "holds 4 bits, not 8"),
        (4, True, "exl2", "unknown format 'exl2'; there are gptq"),
    ],
    ids=["bits", "unknown"],
)
def test_what_a_format_cannot_say_is_refused(
    packed: Callable[..., Path], tmp_path: Path, bits: int, sym: bool, format: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        convert(packed("llama", bits, sym=sym), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_act_order_goes_where_there_is_a_place_for_it(packed: Callable[..., Path], tmp_path: Path) -> None:
    def shuffle(content: dict[str, Any]) -> None:
        draw = torch.Generator().manual_seed(0)
        for name in [name for name in content if name.endswith("g_idx")]:
            content[name] = content[name][torch.randperm(len(content[name]), generator=draw)]

    source = edit(packed(), tmp_path / "source", shuffle)
    with pytest.raises(SpecError, match=r"has an index of groups \(act-order\), which awq has no place for"):
        convert(source, tmp_path / "awq", "awq")
    convert(source, tmp_path / "ct", "compressed-tensors")
    assert torch.equal(logits(tmp_path / "ct"), logits(source))
    convert(tmp_path / "ct", tmp_path / "back", "gptq")
    back, there = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", source))
    assert back.keys() == there.keys()
    assert all(torch.equal(back[name], there[name]) for name in there)


def wide_scales(content: dict[str, Any]) -> None:
    """Scales that float32 holds and float16 does not."""
    for name in [name for name in content if name.endswith("weight_scale")]:
        content[name] = content[name].float() * (1 + 2**-12)


def test_scales_that_would_be_rounded_are_refused_and_said(packed: Callable[..., Path], tmp_path: Path) -> None:
    convert(packed(), tmp_path / "ct", "compressed-tensors")
    source = edit(tmp_path / "ct", tmp_path / "wide", wide_scales)
    with pytest.raises(SpecError, match=r"stores scales as float16, which changes .* --allow-lossy"):
        convert(source, tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()
    done = convert(source, tmp_path / "out", "gptq", allow_lossy=True)
    assert len(done.rounded) == done.layers
    # every scale has 8 significant bits before the factor, so rounding takes exactly the factor away
    assert all(change == pytest.approx(2**-12, rel=1e-3) for change in done.rounded.values())
    exact, rounded = (PackedCheckpoint(folder) for folder in (packed(), tmp_path / "out"))
    for module in exact.layers:
        assert torch.equal(exact.weight(module).scales, rounded.weight(module).scales)


def test_scales_beyond_float16_are_never_rounded(packed: Callable[..., Path], tmp_path: Path) -> None:
    convert(packed(), tmp_path / "ct", "compressed-tensors")

    def enlarge(content: dict[str, Any]) -> None:
        name = next(name for name in content if name.endswith("weight_scale"))
        content[name] = content[name].float() * 1e9

    source = edit(tmp_path / "ct", tmp_path / "large", enlarge)
    with pytest.raises(SpecError, match="stores scales as float16"):
        convert(source, tmp_path / "out", "gptq", allow_lossy=True)


def test_what_the_disk_gives_back_otherwise_is_no_checkpoint(
    packed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = CheckpointWriter.read

    def flipped(self: CheckpointWriter, name: str) -> torch.Tensor:
        tensor = read(self, name)
        return tensor ^ 1 if name.endswith("layers.1.mlp.up_proj.qweight") else tensor

    monkeypatch.setattr(CheckpointWriter, "read", flipped)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj: what was written is not what was read"):
        convert(packed(), tmp_path / "out", "awq")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_not_converted_into_itself(packed: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(packed(), source)
    with pytest.raises(CheckpointError, match="is the folder to convert"):
        convert(source, source, "awq", force=True)
    assert torch.equal(logits(source), logits(packed()))


def test_quantizing_into_a_format_is_quantizing_and_converting(tmp_path: Path) -> None:
    dense = make_llama(tmp_path / "dense")
    for format in ("awq", "compressed-tensors"):
        for name, chosen in (("direct", format), ("gptq", "gptq")):
            recipe = Recipe(bits=4, group_size=32, format=chosen, num_samples=8, seq_len=32)
            ids = torch.randint(1, WORDS, (8, 32), generator=torch.Generator().manual_seed(0))
            quantize(dense, tmp_path / format / name, recipe, calibration=Calibration(ids, None, "random", "none"))
        convert(tmp_path / format / "gptq", tmp_path / format / "converted", format)
        assert tensors(tmp_path / format / "direct") == tensors(tmp_path / format / "converted")
        configs = [
            json.loads((tmp_path / format / name / "config.json").read_bytes())["quantization_config"]
            for name in ("direct", "converted")
        ]
        assert configs[0] == configs[1]
