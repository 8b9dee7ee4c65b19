"""The table of stages: complete, each with an effect, and switched one at a time."""

import pytest

from llmq.errors import SpecError
from llmq.presets import PRESETS
from llmq.recipe import Recipe, make_recipe
from llmq.stages import STAGES, Stage, is_on, variants

# Fields that say which solver, which grid, which data or which files; and dials of a stage that is on anyway.
NO_STAGES = {
    *("method", "grid", "bits", "group_size", "sym", "sym_range", "format", "ignore"),
    *("calibration", "num_samples", "response_only", "all_experts", "seq_len", "seed"),
    *("dtype", "shard_size", "max_fallback", "embeddings"),
    *("damp_percent", "search_norm"),
}
DEFAULT = Recipe().model_dump()


def test_every_field_of_the_recipe_is_a_stage_or_is_known_not_to_be_one() -> None:
    fields = [field for stage in STAGES.values() for field in stage.off]
    assert len(fields) == len(set(fields)), "two stages would switch the same field"
    assert set(fields) | NO_STAGES == set(Recipe.model_fields)
    assert not set(fields) & NO_STAGES


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_on_and_off_are_valid_and_differ(stage: Stage) -> None:
    assert stage.on.keys() == stage.off.keys()
    on, off = (make_recipe(fields).model_dump() for fields in (stage.on, stage.off))
    assert {field for field in on if on[field] != off[field]} == stage.on.keys()
    assert {field: off[field] for field in stage.off} == stage.off, (
        "the recipe changed a value, so is_on would not see it"
    )


@pytest.mark.parametrize("name", STAGES)
def test_on_is_what_the_default_or_a_preset_uses(name: str) -> None:
    used = [make_recipe(fields).model_dump() for fields in PRESETS.values()]
    having = [fields for fields in used if is_on(fields, name)]
    if having:  # no preset rotates or uses MagR
        assert any(STAGES[name].on.items() <= fields.items() for fields in having)


def test_plain_has_no_stages() -> None:
    plain = make_recipe(PRESETS["plain"]).model_dump()
    assert [name for name in STAGES if is_on(plain, name)] == []


def test_the_first_variant_is_the_recipe_and_every_other_differs_in_one_stage() -> None:
    found = variants(DEFAULT, list(STAGES))
    assert found[0].fields == DEFAULT
    assert found[0].name == "recipe"
    for variant, (name, stage) in zip(found[1:], STAGES.items(), strict=True):
        assert make_recipe(variant.fields).model_dump() == variant.fields
        changed = {field for field in DEFAULT if variant.fields[field] != DEFAULT[field]}
        assert changed == stage.on.keys(), name
        assert is_on(variant.fields, name) is not is_on(DEFAULT, name)
    assert len({variant.folder for variant in found}) == len(found)


def test_what_is_on_is_taken_away_and_what_is_off_is_added() -> None:
    found = variants(DEFAULT, ["refine", "rotation"])
    assert [(variant.name, variant.folder) for variant in found[1:]] == [
        ("- refine", "without-refine"),
        ("+ rotation", "with-rotation"),
    ]
    assert found[1].fields["refine_rounds"] == 0
    assert found[2].fields["rotation"] == "hadamard"


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("order", {"order": "pivot"}),
        ("scale_search", {"scale_search": "mse"}),
        ("refine", {"refine_rounds": 4}),
        ("random_windows", {"random_windows": 0.5}),
        ("held_out", {"held_out": 0.3}),
        ("rotation", {"rotation": "random"}),
        ("scaling", {"scaling": "awq"}),
        ("magr", {"magr": 0.001}),
        ("shift", {"shift": 1.0}),
        ("guidance", {"guidance_groups": 4}),
        ("tune_blocks", {"tune_steps": 7}),
        ("tune_model", {"tune_epochs": 1}),
    ],
)
def test_a_stage_with_a_value_of_its_own_is_on_and_goes_off(name: str, own: dict[str, object]) -> None:
    fields = make_recipe(own).model_dump()
    assert not own.items() <= STAGES[name].on.items(), "the value is not one of its own"
    changed = variants(fields, [name])[1]
    assert changed.name == f"- {name}"
    assert changed.fields == fields | STAGES[name].off


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["refine", "magic", "luck"], "unknown stages 'magic', 'luck'; there are order, .*, tune_model$"),
        ([], "no stages; there are order, "),
        (["refine", "order", "refine"], "'refine' is named twice"),
    ],
)
def test_names_that_cannot_be_meant(names: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        variants(DEFAULT, names)
