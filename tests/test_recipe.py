"""Recipes: what is said in YAML is what is done, and what cannot be meant is refused."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llmq.errors import SpecError
from llmq.preflight import prepare
from llmq.recipe import Recipe, make_recipe, parse_size, read_recipe
from llmq.types import QuantSpec

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
recipes = st.builds(
    Recipe,
    method=st.sampled_from(["gptq", "rtn"]),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 32, 128]),
    sym=st.booleans(),
    sym_range=st.sampled_from(["full", "gptq", "restricted"]),
    order=st.sampled_from(["natural", "act", "group", "pivot"]),
    scale_search=st.sampled_from(["hessian", "mse", "none"]),
    search_norm=st.floats(0, 8, exclude_min=True),
    damp_percent=st.floats(0, 1, exclude_min=True),
    calibration=st.none() | words,
    num_samples=st.none() | st.integers(1, 10**6),
    seq_len=st.integers(2, 10**6),
    seed=st.integers(0, 2**40),
    format=st.sampled_from(["gptq", "gptq_v2"]),
    dtype=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    shard_size=st.sampled_from(["1", "500MB", "2GiB", " 4 GB "]),
    ignore=st.lists(
        st.sampled_from(["lm_head", r"layers\.(0|1)\.", "down_proj$", "\u00e4: #x", "yes", "1"]), max_size=3
    ).map(tuple),
    max_fallback=st.floats(0, 1),
)


@given(recipe=recipes)
def test_yaml_round_trip(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert make_recipe(read_recipe(path)) == recipe


def test_yaml_writes_every_field_out() -> None:
    assert list(yaml.safe_load(Recipe().to_yaml())) == list(Recipe.model_fields)


def test_a_recipe_may_leave_everything_out() -> None:
    assert make_recipe({}) == Recipe()
    assert Recipe().spec == QuantSpec(4, 128, True, "gptq")


def test_every_field_explains_itself() -> None:
    assert all(field.description for field in Recipe.model_fields.values())


def test_what_is_wrong_with_a_recipe_is_said_once_and_plainly() -> None:
    with pytest.raises(SpecError, match=r"^recipe: grid is 'codebok'; llmq has uniform, .*, vq8$"):
        make_recipe({"grid": "codebok"})
    with pytest.raises(SpecError, match=r"^recipe: shard_size: 'big' is not a size; .* \(got 'big'\)$"):
        make_recipe({"shard_size": "big"})


def test_recipes_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Recipe().bits = 3


@pytest.mark.parametrize(
    ("symmetric", "asked", "stored"),
    [
        (True, "gptq", "gptq"),
        (False, "gptq", "gptq_v2"),  # version 1 cannot store a zero of 0
        (True, "gptq_v2", "gptq_v2"),
        (False, "gptq_v2", "gptq_v2"),
        (False, "other", "other"),
    ],
)
def test_the_stored_format_follows_from_format_and_symmetry(symmetric: bool, asked: str, stored: str) -> None:
    spec = make_recipe({"bits": 3, "group_size": -1, "sym": symmetric, "format": asked}).spec
    assert spec == QuantSpec(3, -1, symmetric, stored)


def test_an_unknown_field_is_named_with_those_there_are() -> None:
    with pytest.raises(SpecError, match=r"recipe: groupsize: .*got 128.*group_size"):
        make_recipe({"groupsize": 128})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", "four"),
        ("bits", 4.5),
        ("bits", None),
        ("group_size", [128]),
        ("sym", "perhaps"),
        ("damp_percent", 0),
        ("damp_percent", -0.01),
        ("damp_percent", 1.01),
        ("damp_percent", float("nan")),
        ("num_samples", 0),
        ("seq_len", 1),
        ("seed", -1),
        ("dtype", "int8"),
        ("shard_size", "big"),
        ("shard_size", "0"),
        ("shard_size", "4XB"),
        ("ignore", ["("]),
        ("ignore", "lm_head"),
        ("max_fallback", 1.5),
        ("max_fallback", -0.1),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_named(field: str, value: object) -> None:
    with pytest.raises(SpecError, match=rf"^recipe: {field}\b"):
        make_recipe({field: value})


@pytest.mark.parametrize("group_size", [0, -2, -32])
def test_group_sizes_that_mean_nothing_are_refused_before_the_model_is_looked_for(group_size: int) -> None:
    with pytest.raises(SpecError, match="group_size"):
        prepare("no/such/model", make_recipe({"group_size": group_size}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", "magic", "unknown method 'magic'; there are gptq, .*, rtn$"),
        ("format", "exl3", "unknown format 'exl3'; there are gptq, gptq_v2, awq"),
        ("bits", 5, "2, 3, 4, 8 bits, not 5"),
    ],
)
def test_unknown_names_are_refused_before_the_model_is_looked_for(field: str, value: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        prepare("no/such/model", make_recipe({field: value}))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("1B", 1),
        ("5K", 5000),
        ("500MB", 500_000_000),
        ("500mb", 500_000_000),
        ("4GB", 4_000_000_000),
        ("2GiB", 2 * 2**30),
        ("1.5 GB", 1_500_000_000),
        (" 3 TiB ", 3 * 2**40),
        ("0.5KiB", 512),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert make_recipe({"shard_size": text}).shard_bytes == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4 G B", "1e9", "4GBs", "1.2.3GB", "."])
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_reading_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("bits: 3\nignore: [lm_head]\n", encoding="utf-8")
    assert read_recipe(path) == {"bits": 3, "ignore": ["lm_head"]}
    assert make_recipe(read_recipe(str(path))) == Recipe(bits=3, ignore=("lm_head",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds NoneType"),
        (b"- bits\n", "holds list"),
        (b"just text", "holds str"),
        (b"bits: [4", "cannot be read"),
        (b"!!python/object/apply:os.getcwd []", "cannot be read"),
        (b"bits: \xff\xfe", "cannot be read"),
    ],
    ids=["empty", "list", "text", "broken", "python-object", "not-utf8"],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=message) as error:
        read_recipe(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"absent\.yaml"):
        read_recipe(tmp_path / "absent.yaml")
