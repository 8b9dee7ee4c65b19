"""Blocks and linears are found where they are, and what cannot be done with a model is said before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from command_line import assert_fails, llmq
from family_cases import FAMILIES, GLU
from torch import nn

from llmq import families
from llmq.errors import LlmqError, SpecError
from llmq.families import Family, auto_class, check_stages, find_structure, is_causal, skeleton
from llmq.preflight import prepare
from llmq.recipe import Recipe, make_recipe


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)


class OtherBlock(Block):
    pass


class OddLinear(nn.Linear):
    pass


class Bare(nn.Module):
    """As much of a model as finding its structure needs."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.config = tf.PretrainedConfig()
        for name, part in parts.items():
            setattr(self, name, part)

    def get_decoder(self) -> nn.Module:
        return self


def names(model: Any) -> list[str]:
    return find_structure(model).names


def test_the_largest_list_of_modules_with_linears_is_the_blocks() -> None:
    small, large = nn.ModuleList([Block(), Block()]), nn.ModuleList([Block(16), OtherBlock(16)])
    linears = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
    mixed = nn.ModuleList([Block(64), nn.LayerNorm(64)])
    structure = find_structure(Bare(a=small, b=large, c=linears, d=mixed))  # type: ignore[arg-type]
    assert structure.names == ["b.0", "b.1"]
    assert [[x.name for x in linears] for linears in structure.linears] == [["b.0.linear"], ["b.1.linear"]]
    assert structure.starts == (0,)
    assert structure.ends == ()
    assert structure.around(0) == ""


def test_a_list_in_a_block_is_not_the_blocks() -> None:
    outer = nn.Module()
    outer.layer = nn.ModuleList([Block(), Block()])
    assert names(Bare(blocks=nn.ModuleList([outer]))) == ["blocks.0"]


def test_lists_beside_the_decoder_are_not_looked_at() -> None:
    text = nn.Module()
    text.layers = nn.ModuleList([Block()])
    model = Bare(vision=nn.ModuleList([Block(64)]), text=text)
    model.get_decoder = lambda: text  # type: ignore[method-assign]
    assert names(model) == ["text.layers.0"]


def test_a_decoder_that_is_only_a_head_is_not_the_decoder() -> None:
    model = Bare(layers=nn.ModuleList([Block()]), decoder=nn.Linear(8, 8))
    model.get_decoder = lambda: model.decoder  # type: ignore[method-assign]
    assert names(model) == ["layers.0"]


def test_what_was_looked_for_and_found_is_told() -> None:
    with pytest.raises(
        SpecError, match=r"^Bare: no transformer blocks .* looked in Bare .* found a, b; .*families\.md"
    ):
        names(Bare(a=nn.ModuleList([nn.LayerNorm(8)]), b=nn.ModuleList([nn.Linear(8, 8)])))
    with pytest.raises(SpecError, match="found no ModuleList and layers of OddLinear; "):
        names(Bare(a=nn.Linear(8, 8), b=OddLinear(8, 8)))


def test_a_family_names_its_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Bare(b=nn.ModuleList([Block()]), a=nn.ModuleList([Block(), Block()]))
    model.config.model_type = "bare"
    monkeypatch.setattr(families, "FAMILIES", (Family(("other",)), Family(("bare", "bear"), stacks=("a", "b"))))
    structure = find_structure(model)  # type: ignore[arg-type]
    assert structure.names == ["a.0", "a.1", "b.0"]
    assert structure.prefixes == ("a.0.", "a.1.", "b.0.")
    assert structure.starts == (0,)  # one after the other: one stack for all that follows
    monkeypatch.setattr(families, "FAMILIES", (Family(("bare",), stacks=("a", "c")),))
    with pytest.raises(SpecError, match=r"Family names c, which is no ModuleList of it; there are b, a"):
        find_structure(model)  # type: ignore[arg-type]


def test_layers_that_stay_dense_are_listed_with_the_reason() -> None:
    block = Block()
    block.odd = OddLinear(8, 8)
    structure = find_structure(Bare(layers=nn.ModuleList([block, Block()])), ["absent", r"1\.linear"])  # type: ignore[arg-type]
    assert [x.name for x in structure.all_linears] == ["layers.0.linear"]
    assert structure.ignored == {
        "layers.0.odd": "OddLinear may compute something else than torch.nn.Linear",
        "layers.1.linear": r"--ignore 1\.linear",
    }


def test_an_encoder_comes_before_its_decoder() -> None:
    for name, lists in {"t5": ("encoder.block", "decoder.block"), "bart": ("model.encoder.layers",) * 2}.items():
        structure = find_structure(skeleton(FAMILIES[name].config, torch.float32))
        assert structure.names[0] == f"{lists[0]}.0"
        assert structure.names[2] == f"{lists[1].replace('encoder', 'decoder')}.0"
        assert structure.starts == (0, 2)
        assert structure.ends == (1,)
        assert structure.around(1).endswith("encoder")


@pytest.mark.parametrize("name", FAMILIES)
def test_models_are_made_by_the_class_of_their_architecture(name: str) -> None:
    family = FAMILIES[name]
    made = type(skeleton(family.config, torch.float32))
    with torch.device("meta"):
        assert made is type(family.auto.from_config(family.config))
    assert is_causal(family.config) == (name not in ("t5", "bart", "bert"))


def test_the_architecture_decides_among_several_heads() -> None:
    config = tf.BertConfig(**{k: v for k, v in GLU.items() if k != "num_key_value_heads"})
    assert auto_class(config) is tf.AutoModelForCausalLM
    config.architectures = ["BertForMaskedLM"]
    assert auto_class(config) is tf.AutoModelForMaskedLM
    config.architectures = ["BertModel"]
    assert auto_class(config) is tf.AutoModelForCausalLM


def test_an_encoder_decoder_that_sees_images_is_not_causal() -> None:
    config = tf.Florence2Config()
    assert auto_class(config) is tf.AutoModelForImageTextToText
    assert not is_causal(config)


def test_a_family_decides_before_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", (Family(("bert",), auto="AutoModelForMaskedLM"),))
    assert auto_class(tf.BertConfig()) is tf.AutoModelForMaskedLM


CLASHES = [
    ("t5", {"tune_epochs": 1}, "tune_epochs works on predictions of the next token.*'t5'"),
    ("bert", {"guidance_groups": 1}, "guidance_groups works on predictions"),
    ("bert", {"response_only": True}, "response_only works on predictions"),
    ("t5", {"tune_steps": 1}, "tune_steps works on one stack .*'t5' have two"),
    ("bart", {"scaling": "awq"}, "scaling works on one stack"),
    ("bart", {"rotation": "random"}, "rotation works on one stack"),
    ("gemma3_vl", {"rotation": "random"}, "images .*'gemma3' without rotation"),
]


@pytest.mark.parametrize(("name", "fields", "message"), CLASHES)
def test_stages_that_a_model_cannot_have_are_refused(name: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_stages(FAMILIES[name].config, make_recipe(fields))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("t5", {}),
        ("bert", {"tune_steps": 1, "scaling": "awq"}),
        ("gemma3_vl", {"scaling": "awq", "tune_epochs": 1, "guidance_groups": 1}),
        ("gemma3", {"rotation": "random"}),
    ],
)
def test_stages_that_a_model_can_have_are_not(name: str, fields: dict[str, object]) -> None:
    check_stages(FAMILIES[name].config, make_recipe(fields))


def test_preflight_checks_the_stages(tmp_path: Path) -> None:
    folder = FAMILIES["bert"].make(tmp_path / "m")
    with pytest.raises(SpecError, match="guidance_groups"):
        prepare(folder, Recipe(group_size=32, guidance_groups=1))


def test_a_missing_tensor_is_noticed_in_a_model_without_a_base_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = FAMILIES["t5"].make(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlmqError, match=r"encoder\.final_layer_norm\.weight is missing"):
        prepare(folder, Recipe(group_size=32))


def test_eval_refuses_a_model_that_predicts_no_next_token(tmp_path: Path) -> None:
    folder = FAMILIES["bert"].make(tmp_path / "m")
    (tmp_path / "text").write_text("w1 w2")
    done = llmq("eval", folder, "--text", tmp_path / "text")
    assert_fails(done.exit_code, done.stdout, done.stderr, "llmq eval works on predictions of the next", expected=2)
