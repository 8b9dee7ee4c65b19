"""Presets: what `llmq recipe` prints of them is what they do, and options win over them."""

import hashlib
from pathlib import Path

import pytest
import yaml
from command_line import SMALL, assert_fails, llmq
from tiny_models import make_llama, make_text

from llmq.presets import PRESETS
from llmq.recipe import Recipe, make_recipe


@pytest.mark.parametrize("name", PRESETS)
def test_a_printed_preset_is_a_whole_recipe(name: str) -> None:
    printed = yaml.safe_load(llmq("recipe", "--preset", name).stdout)
    assert printed.keys() == Recipe.model_fields.keys()
    assert make_recipe(printed) == make_recipe(PRESETS[name])
    assert all(printed[field] == value for field, value in PRESETS[name].items())


def test_presets_differ_and_default_is_the_default() -> None:
    recipes = {name: make_recipe(fields) for name, fields in PRESETS.items()}
    assert recipes["default"] == Recipe()
    assert len({recipe.to_yaml() for recipe in recipes.values()}) == len(PRESETS)


def test_plain_is_textbook_gptq() -> None:
    plain = make_recipe(PRESETS["plain"])
    assert (plain.method, plain.order, plain.scale_search, plain.damp_percent) == ("gptq", "natural", "none", 0.01)
    off = (plain.refine_rounds, plain.shift, plain.guidance_groups, plain.tune_steps, plain.tune_epochs, plain.magr)
    assert not any(off)
    assert (plain.rotation, plain.scaling, plain.held_out, plain.random_windows) == ("none", "none", 0.0, 0.0)


def test_recipe_files_win_over_presets_and_options_over_both(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("refine_rounds: 7\norder: group\n", encoding="utf-8")
    printed = yaml.safe_load(
        llmq("recipe", "--preset", "plain", "--recipe", file, "--order", "pivot", "--bits", 3).stdout
    )
    assert (printed["refine_rounds"], printed["order"], printed["bits"], printed["scale_search"]) == (
        7,
        "pivot",
        3,
        "none",
    )


def test_an_unknown_preset_lists_those_there_are() -> None:
    result = llmq("recipe", "--preset", "finest")
    assert_fails(result.exit_code, result.stdout, result.stderr, "finest", *PRESETS, expected=2)


def test_presets_give_different_bytes(tmp_path: Path) -> None:
    text = make_text(tmp_path / "text.txt", 3000)
    source = make_llama(tmp_path / "model", num_hidden_layers=1)
    found = set()
    for name in PRESETS:
        options = (*SMALL, "--asym", "--bits", 3, "--calibration", text, "--num-samples", 20)
        quick = ("--tune-steps", 2, "--tune-epochs", 1) if name == "best" else ()
        result = llmq("quantize", source, "--output", tmp_path / name, "--preset", name, *options, *quick)
        assert result.exit_code == 0, result.stderr
        found.add(hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest())
    assert len(found) == len(PRESETS)
