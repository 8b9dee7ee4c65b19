"""`save_pretrained`, sharding, `push_to_hub`, and the card that goes along."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from serving_cases import layers

import llmq
from llmq.calibration import Calibration
from llmq.card import Facts, card, metadata_of, report_in
from llmq.convert import convert
from llmq.driver import quantize
from llmq.recipe import Recipe
from llmq.types import QuantSpec

KINDS = [("gptq", 4, True), ("gptq", 3, False), ("awq", 4, False), ("compressed-tensors", 4, True), ("llmq", 5, False)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def assert_saved(folder: Path, saved: Path) -> None:
    """Assert that `saved` has the tensors, the configuration and the card of `folder`."""
    before, after = tensors(folder), tensors(saved)
    assert before.keys() == after.keys()
    assert all(after[key].dtype == tensor.dtype and torch.equal(after[key], tensor) for key, tensor in before.items())
    configs = [json.loads((f / "config.json").read_text(encoding="utf-8")) for f in (folder, saved)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert (saved / "README.md").read_bytes() == (folder / "README.md").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("format", "bits", "sym"), KINDS)
def test_what_is_saved_is_what_was_loaded(
    format: str, bits: int, sym: bool, dtype: torch.dtype, packed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = packed(bits, 32, sym, format)
    model = llmq.load(folder, dtype=dtype)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) >= 2
    for saved in (tmp_path / "whole", tmp_path / "sharded"):
        if dtype == torch.float32:  # else the dense ones are rounded
            assert_saved(folder, saved)
        ids = torch.ones(1, 4, dtype=torch.int64)
        with torch.no_grad():
            assert torch.equal(llmq.load(saved, dtype=dtype)(ids).logits, model(ids).logits)


def test_a_copy_saves_itself(packed: Callable[..., Path], tmp_path: Path) -> None:
    model = llmq.load(packed())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight.zero_()
    other.save_pretrained(tmp_path)
    assert not tensors(tmp_path)["model.embed_tokens.weight"].any()


def test_cards_say_what_was_done(packed: Callable[..., Path]) -> None:
    folder = packed(4, 32, False)
    text = (folder / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert data.tags == ["llmq", "gptq_v2", "4-bit"]
    assert (data.library_name, data.base_model) == ("transformers", None)
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert "# LlamaForCausalLM, 4 bits" in text
    assert "| 14 | 4 | 32 | asymmetric | gptq_v2 |" in text
    assert "\ngroup_size: 32\n" in text
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    weights = sum(x["out_features"] * x["in_features"] for x in report["layers"])
    assert f"| bits per packed weight, scales included | {8 * report['bytes']['packed'] / weights:.3f} |" in text
    assert "import llmq.hf" in text
    assert "vllm serve" not in text  # vLLM drops the zeros of asymmetric gptq
    assert "vllm serve" in (packed() / "README.md").read_text(encoding="utf-8")


def test_metadata_of_the_source_that_still_hold_are_kept(dense: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model/snapshots/0123"
    shutil.copytree(dense, snapshot)
    content = (
        "---\nlicense: mit\nlanguage: de\nmodel-index: []\ntags: [x]\nbase_model: other/one\n---\n# Private thoughts\n"
    )
    (snapshot / "README.md").write_text(content, encoding="utf-8")
    ids = torch.ones(8, 32, dtype=torch.int64)
    quantize(
        snapshot,
        tmp_path / "out",
        Recipe(method="rtn", group_size=32),
        calibration=Calibration(ids, None, "/home/me/text", "y"),
    )
    text = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    found = metadata_of(text)
    assert (found["license"], found["language"], found["base_model"]) == ("mit", "de", "some/model")
    assert found["tags"] == ["llmq", "gptq", "4-bit"]
    assert "Private" not in text
    assert "/home" not in text
    convert(tmp_path / "out", tmp_path / "awq", "awq")
    text = (tmp_path / "awq/README.md").read_text(encoding="utf-8")
    found = metadata_of(text)
    assert (found["license"], found["base_model"]) == ("mit", "some/model")
    assert found["tags"] == ["llmq", "awq", "4-bit"]
    assert "with this recipe" in text
    convert(tmp_path / "out", tmp_path / "again", "dense")
    text = (tmp_path / "again/README.md").read_text(encoding="utf-8")
    assert metadata_of(text)["tags"] == ["llmq"]
    assert "llmq.hf" not in text


@pytest.mark.parametrize("text", ["", "# no metadata", "---\n[: }\n---\n", "---\n- a\n---\n", "---\nlicense: mit\n"])
def test_cards_without_readable_metadata_have_none(text: str) -> None:
    assert metadata_of(text) == {}
    spec = QuantSpec(4, 128, True, "gptq")
    made = card(Facts(None, "Model", {"a.b": spec}, {"a.b": (128, 128)}), text)
    assert metadata_of(made)["tags"] == ["llmq", "gptq", "4-bit"]


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"recipe": {}, "layers": [1]}', '{"recipe": {}, "layers": [], "bytes": 3, "versions": {}}']
)
def test_reports_of_others_are_not_believed(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    assert report_in(tmp_path) is None


class Hub:
    """Stands for the hub: keeps what is uploaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[dict[str, Any]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def create_repo(api: Any, repo_id: str, **options: Any) -> Any:
            self.calls.append({"repo_id": repo_id, "token": api.token, **options})
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(api: Any, *, folder_path: Path, **options: Any) -> str:
            shutil.copytree(folder_path, self.folder)
            self.calls.append(options)
            return "https://hub/commit"

        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)


@pytest.mark.parametrize("way", ["push", "save"])
def test_pushing_uploads_model_and_card(
    way: str, packed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed()
    hub = Hub(tmp_path / "hub")
    hub.install(monkeypatch)
    model = llmq.load(folder)
    if way == "push":
        address = model.push_to_hub("small", private=True, token="t", commit_message="first", max_shard_size="60KB")
        assert address == "https://hub/commit"
    else:
        model.save_pretrained(
            tmp_path / "small", push_to_hub=True, private=True, token="t", commit_message="first", max_shard_size="60KB"
        )
    assert hub.calls[0] == {"repo_id": "small", "token": "t", "private": True, "exist_ok": True}
    assert hub.calls[1] == {"repo_id": "me/small", "commit_message": "first"}
    assert len(list(hub.folder.glob("*.safetensors"))) >= 2
    assert_saved(folder, hub.folder)
    assert layers(llmq.load(hub.folder)).keys() == layers(model).keys()


def test_tags_are_added_and_unknown_options_refused(
    packed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "hub")
    hub.install(monkeypatch)
    model = llmq.load(packed())
    with pytest.raises(TypeError, match="colour"):
        model.push_to_hub("small", colour="red")
    assert hub.calls == []
    model.push_to_hub("small", tags=["mine", "llmq"])
    assert ModelCard.load(hub.folder / "README.md").data.tags == ["llmq", "gptq", "4-bit", "mine"]


def test_folders_of_others_get_a_card_with_their_certificate(packed: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(packed() / name, tmp_path / name)
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n# Mine", encoding="utf-8")
    loaders = [
        {"loader": "llmq", "verdict": "exact", "relative": 1.25e-7},
        {"loader": "vllm", "loaded": False, "refused": "no GPU"},
    ]
    certificate = {"loaders": loaders, "packing": {"kl": 0.0125}}
    (tmp_path / "certificate.json").write_text(json.dumps(certificate))
    llmq.load(tmp_path).save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved/README.md").read_text(encoding="utf-8")
    assert metadata_of(text)["license"] == "mit"
    assert "| llmq | exact | 1.2e-07 of the largest logit |" in text
    assert "| vllm | refused |  |" in text
    assert "1.250e-02 nats per token" in text
    assert not (tmp_path / "saved/certificate.json").exists()  # it is about other files


def test_cards_name_files_without_their_folders() -> None:
    report = {
        "recipe": {"calibration": "/home/me/text.txt"},
        "calibration": {"source": "/home/me/text.txt", "tokens": 5},
    }
    text = card(Facts(None, "Model", {}, {}, report=report))
    assert "/home" not in text
    assert "source text.txt, tokens 5" in text


def test_a_card_that_somebody_has_edited_is_kept(packed: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(packed(), tmp_path / "packed")
    with (tmp_path / "packed/README.md").open("a", encoding="utf-8") as file:
        file.write("Made with care.\n")
    llmq.load(tmp_path / "packed").save_pretrained(tmp_path / "saved")
    assert_saved(tmp_path / "packed", tmp_path / "saved")


def test_the_dtype_that_a_layer_shows_is_the_one_it_was_cast_to(packed: Callable[..., Path]) -> None:
    layer = next(iter(layers(llmq.load(packed(), dtype=torch.float32)).values()))
    assert layer.weight.dtype == torch.float32
    assert layer.half().weight.dtype == torch.float16
    assert layer.to("meta").weight.is_meta
