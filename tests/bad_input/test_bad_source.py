"""Sources that are no sound checkpoint: each ends in one line that helps, and in nothing that looks finished."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command_line import SMALL, llmq
from damage import DOWN_PROJ, INDEX, change_config, change_index, change_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def test_missing_folder(tmp_path: Path, fails: Callable[..., None]) -> None:
    fails(tmp_path / "nowhere", words=("nowhere", "no such folder", "hub id"))


def test_model_is_a_file(made: Path, fails: Callable[..., None]) -> None:
    fails(made / "model" / "model.safetensors", words=("model.safetensors", "no such folder"))


def test_name_too_long_for_the_system(fails: Callable[..., None]) -> None:
    fails("m" * 300, words=("File name too long",))


def test_hub_id_while_offline(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("some-org/some-model", words=("some-org/some-model", "no such folder here", "hub", "pass the folder"))


def test_no_config(model: Path, fails: Callable[..., None]) -> None:
    (model / "config.json").unlink()
    fails(model, words=(str(model), "not a checkpoint", "config.json"))


@pytest.mark.parametrize("text", ["", "{", "[]", "\0"], ids=["empty", "truncated", "a list", "binary"])
def test_config_that_is_no_object(text: str, model: Path, fails: Callable[..., None]) -> None:
    (model / "config.json").write_text(text)
    fails(model, words=("config.json", "JSON"))


def test_config_with_a_wrong_value(model: Path, fails: Callable[..., None]) -> None:
    change_config(model, hidden_size="large")
    fails(model, words=("config.json", "hidden_size"), code=2)


def test_config_with_other_sizes_than_the_weights(model: Path, fails: Callable[..., None]) -> None:
    change_config(model, intermediate_size=256)
    fails(model, words=("mlp", "[128, 64]", "[256, 64]", "config.json"))


@pytest.mark.parametrize("kept", [0, 5, 100, -1], ids=["empty", "in its size", "in its header", "in its data"])
def test_truncated_safetensors(kept: int, model: Path, fails: Callable[..., None]) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    fails(model, words=("model.safetensors", "truncated or corrupt", "download it again"))


def test_corrupt_safetensors(model: Path, fails: Callable[..., None]) -> None:
    file = model / "model.safetensors"
    file.write_bytes(b"<html>Not found, see other page</html>" * 100)
    fails(model, words=("model.safetensors", "truncated or corrupt"))


def test_truncated_shard(sharded: Path, fails: Callable[..., None]) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    fails(sharded, words=(shard.name, "truncated or corrupt"))


def test_no_safetensors_but_other_weights(model: Path, fails: Callable[..., None]) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    fails(model, words=("no .safetensors", "pytorch_model.bin", "save_pretrained"))


def test_index_names_a_missing_shard(sharded: Path, fails: Callable[..., None]) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    fails(sharded, words=(INDEX, shard.name, "missing"))


def test_index_places_a_tensor_in_the_wrong_shard(sharded: Path, fails: Callable[..., None]) -> None:
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))
    name = "model.norm.weight"
    change_index(sharded, lambda m: m.update({name: next(shard for shard in shards if shard != m[name])}))
    fails(sharded, words=(INDEX, name))


def test_index_names_a_tensor_that_no_shard_has(sharded: Path, fails: Callable[..., None]) -> None:
    change_index(sharded, lambda m: m.update({"model.extra": m["model.norm.weight"]}))
    fails(sharded, words=(INDEX, "model.extra"))


@pytest.mark.parametrize("above", [True, False], ids=["relative", "absolute"])
def test_index_leads_out_of_the_folder(above: bool, made: Path, sharded: Path, fails: Callable[..., None]) -> None:
    shutil.copy(made / "model" / "model.safetensors", sharded.parent / "outside.safetensors")
    path = "../outside.safetensors" if above else str(sharded.parent / "outside.safetensors")
    change_index(sharded, lambda m: m.update({"model.norm.weight": path}))
    fails(sharded, words=(INDEX, "outside.safetensors", "not a plain file name"))


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}], ids=["empty", "list", "number"])
def test_index_without_a_weight_map(index: dict[str, object], sharded: Path, fails: Callable[..., None]) -> None:
    (sharded / INDEX).write_text(json.dumps(index))
    fails(sharded, words=(INDEX, "weight_map"))


def test_tensor_missing_from_every_file(model: Path, fails: Callable[..., None]) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors[f"{DOWN_PROJ}.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    fails(model, words=(DOWN_PROJ, "missing", "incomplete"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "minus inf"])
@pytest.mark.parametrize(
    "name",
    [f"{DOWN_PROJ}.weight", "model.embed_tokens.weight", "model.norm.weight"],
    ids=["packed", "embedding", "norm"],
)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_weight_that_is_not_finite(
    value: float, name: str, method: str, model: Path, fails: Callable[..., None]
) -> None:
    change_tensor(model, name, lambda w: w.view(-1)[3].fill_(value))
    fails(model, "--method", method, words=(name, "1 of", "NaN or infinite", "damaged"))


def test_scale_beyond_float16(model: Path, fails: Callable[..., None]) -> None:
    change_tensor(model, f"{DOWN_PROJ}.weight", lambda w: w[3, 5].fill_(1e6))
    fails(model, words=(DOWN_PROJ, "scale", "125000", "float16", "65280", "--ignore"))


def test_groups_of_opposite_extremes_have_scales_within_float16(made: Path, model: Path, output: Path) -> None:
    def change(w: Tensor) -> None:
        w[3, 5], w[3, 40] = 9e5, -9e5  # as one group they would need a scale of 120000

    change_tensor(model, f"{DOWN_PROJ}.weight", change)
    result = llmq("quantize", model, "--output", output, *SMALL, "--method", "rtn", "--asym")
    assert result.exit_code == 0, result.stderr


def test_weights_of_a_dtype_that_is_no_weight(model: Path, fails: Callable[..., None]) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[f"{DOWN_PROJ}.weight"] = tensors[f"{DOWN_PROJ}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    fails(model, words=(DOWN_PROJ, "float8_e4m3fn", "bfloat16"))


def test_already_quantized(made: Path, tmp_path: Path, fails: Callable[..., None]) -> None:
    packed = tmp_path / "packed"
    assert llmq("quantize", made / "model", "--output", packed, *SMALL, "--method", "rtn").exit_code == 0
    fails(packed, words=(str(packed), "already quantized", "gptq", "original weights"), code=2)
    change_config(packed, quantization_config=None)  # the tensors tell too
    fails(packed, words=("already quantized", "qweight"), code=2)


def test_unknown_model_type(model: Path, fails: Callable[..., None]) -> None:
    change_config(model, model_type="llama9")
    fails(model, words=("config.json", "transformers", "'llama9'"), code=2)


def test_configuration_that_brings_its_own_code(model: Path, fails: Callable[..., None]) -> None:
    change_config(
        model, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    )
    (model / "mine.py").write_text("raise SystemExit('this code must never run')")
    fails(model, words=("config.json", "'mine'"), code=2)


def test_model_without_a_language_head(model: Path, fails: Callable[..., None]) -> None:
    change_config(model, model_type="vit", architectures=["ViTModel"])
    fails(model, words=("'vit'", "model with a head", "AutoModelForCausalLM", "docs/families.md"), code=2)


class BlocklessConfig(PreTrainedConfig):
    model_type = "blockless"
    vocab_size = 128
    hidden_size = 64


class Blockless(PreTrainedModel):
    """A language model of one linear layer, without blocks."""

    config_class = BlocklessConfig

    def __init__(self, config: BlocklessConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.middle = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()


@pytest.fixture
def blockless() -> Iterator[None]:
    """Make transformers know `Blockless` for the duration of one test."""
    AutoConfig.register("blockless", BlocklessConfig)
    AutoModelForCausalLM.register(BlocklessConfig, Blockless)
    yield
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING._extra_content.pop("blockless")
    AutoModelForCausalLM._model_mapping._extra_content.pop(BlocklessConfig)


@pytest.mark.usefixtures("blockless")
def test_architecture_without_blocks(model: Path, fails: Callable[..., None]) -> None:
    change_config(model, model_type="blockless", architectures=["Blockless"])
    fails(model, words=("Blockless", "no transformer blocks", "ModuleList", "torch.nn.Linear", "Conv1D"), code=2)
