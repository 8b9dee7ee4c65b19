"""What quantization_config says of GPTQ checkpoints, ours and others'."""

import re
from typing import Any

import pytest

from llmq.errors import CheckpointError, SpecError
from llmq.formats.gptq import config, specs
from llmq.formats.naming import patterns
from llmq.types import QuantSpec

MODULES = [f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "mlp.down_proj")]
PLAIN = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


def spec(bits: int = 4, group_size: int = 128, symmetric: bool = True, name: str = "gptq") -> QuantSpec:
    return QuantSpec(bits, group_size, symmetric, name)


def test_the_keys_are_those_of_all_readers() -> None:
    # FORMATS 1.1: older readers know checkpoint_format, newer ones format, vLLM requires desc_act and sym
    assert config(dict.fromkeys(MODULES, spec(4, -1, False, "gptq_v2")), []) == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": -1,
        "desc_act": False,
        "sym": False,
        "lm_head": False,
        "checkpoint_format": "gptq_v2",
        "format": "gptq_v2",
        "pack_dtype": "int32",
        "modules_in_block_to_quantize": [["self_attn.q_proj", "mlp.down_proj"]],
    }


def test_a_packed_head_is_said() -> None:
    found = config({"lm_head": spec(), "model.layers.0.mlp.experts.3.up_proj": spec()}, [])
    assert found["lm_head"] is True
    assert found["modules_in_block_to_quantize"] == [["mlp.experts.3.up_proj"]]
    assert specs(found, ["lm_head"]) == {"lm_head": spec()}


def test_dense_modules_are_excluded_with_all_that_is_below_them() -> None:
    found = config({MODULES[0]: spec()}, ["lm_head", "model.layers.0.mlp"])
    assert found["dynamic"] == {r"-:^lm_head(\..*)?$": {}, r"-:^model\.layers\.0\.mlp(\..*)?$": {}}
    with pytest.raises(CheckpointError, match=r"keeps model.layers.0.mlp.down_proj dense, but it is packed"):
        specs({**found, "modules_in_block_to_quantize": None}, ["model.layers.0.mlp.down_proj"])


def test_the_most_common_spec_is_the_base_and_others_are_named() -> None:
    mixed = {name: spec(8, 32) if "down" in name else spec() for name in MODULES}
    mixed |= {"model.layers.1.self_attn.q_proj": spec(2, -1, False), "model.layers.10.mlp.down_proj": spec()}
    found = config(mixed, [])
    assert (found["bits"], found["group_size"], found["sym"]) == (4, 128, True)
    dynamic = found["dynamic"]
    assert isinstance(dynamic, dict)
    # block 10 has another spec than the other down_proj, so that these cannot be one expression
    assert len(dynamic) == 11 + 1
    assert dynamic[r"+:^model\.layers\.1\.self_attn\.q_proj$"] == {"bits": 2, "group_size": -1, "sym": False}
    assert dynamic[r"+:^model\.layers\.11\.mlp\.down_proj$"] == {"bits": 8, "group_size": 32, "sym": True}
    assert specs(found, MODULES) == mixed
    few = {"a.0.x": spec(8), "a.0.y": spec(), "a.0.z": spec()}  # the first is not the most common
    assert config(few, [])["bits"] == 4
    assert specs(config(few, []), list(few)) == few


def test_modules_that_differ_in_numbers_alone_are_one_expression() -> None:
    mixed = {name: spec(8) if "down" in name else spec() for name in [*MODULES, "model.layers.0.self_attn.o_proj"]}
    found = config(mixed, ["model.layers.3.self_attn.k_proj"])
    assert found["dynamic"] == {
        r"-:^model\.layers\.3\.self_attn\.k_proj(\..*)?$": {},
        r"+:^model\.layers\.\d+\.mlp\.down_proj$": {"bits": 8, "group_size": 128, "sym": True},
    }
    assert specs(found, list(mixed)) == mixed


def test_numbers_within_a_part_of_a_name_are_no_numbers_of_blocks() -> None:
    assert patterns(["h.0.fc1", "h.1.fc1", "h.2.fc1"], ["h.0.fc2"]) == [r"^h\.\d+\.fc1$"]


def test_versions_cannot_be_mixed() -> None:
    with pytest.raises(SpecError, match="of one format, not of gptq and gptq_v2"):
        config({"a.0.b": spec(), "a.0.c": spec(name="gptq_v2")}, [])


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, spec()),
        ({"checkpoint_format": "gptq_v2"}, spec(name="gptq_v2")),
        ({"format": "GPTQ_V2"}, spec(name="gptq_v2")),
        ({"format": "gptq_v2", "checkpoint_format": "GPTQ_v2"}, spec(name="gptq_v2")),
        ({"sym": None}, spec()),
        ({"sym": False, "bits": 3}, spec(3, 128, False)),
        ({"group_size": None}, spec(group_size=-1)),
        ({"bits": None, "wbits": 4, "group_size": None, "groupsize": 64}, spec(group_size=64)),
        ({"bits": None, "w_bit": 8}, spec(8)),
        # AutoGPTQ's quantize_config.json
        (
            {"quant_method": None, "damp_percent": 0.01, "static_groups": False, "true_sequential": True}
            | {"model_name_or_path": None, "model_file_base_name": "model", "is_marlin_format": False},
            spec(),
        ),
        ({"desc_act": True, "dynamic": None, "meta": {}, "pack_dtype": "int32", "lm_head": True}, spec()),
    ],
    ids=str,
)
def test_spellings_of_all_times_are_read(changes: dict[str, Any], expected: QuantSpec) -> None:
    assert specs(PLAIN | changes, ["model.layers.0.a"]) == {"model.layers.0.a": expected}


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [
        ({r"+:.*\.down_proj$": {"bits": 8}}, {"mlp.down_proj": spec(8)}),
        ({r".*\.down_proj$": {"bits": 8, "group_size": 32, "sym": False}}, {"mlp.down_proj": spec(8, 32, False)}),
        ({r"model\.layers\.0\.": {"bits": 8}}, {"mlp.down_proj": spec(8), "self_attn.q_proj": spec(8)}),
        # the first that matches decides, wherever it is an expression and wherever a name
        ({".*down": {"bits": 8}, r"^model\.layers\.0\.mlp\.down_proj$": {"bits": 2}}, {"mlp.down_proj": spec(8)}),
        ({r"^model\.layers\.0\.mlp\.down_proj$": {"bits": 2}, ".*down": {"bits": 8}}, {"mlp.down_proj": spec(2)}),
        (
            {r"^model\.layers\.0\.mlp\.down_proj$": {"bits": 2}, r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 3}},
            {"mlp.down_proj": spec(2)},
        ),
        ({"-:.*up_proj": {}, "+:.*down": {"damp_percent": 0.1}}, {}),
        # matched from the start on, not searched
        ({"down_proj": {"bits": 8}, "-:q_proj": {}}, {}),
        ({"+:.*down": {"group_size": -1}}, {"mlp.down_proj": spec(group_size=-1)}),
    ],
    ids=str,
)
def test_dynamic_has_gptqmodels_meaning(dynamic: dict[str, Any], expected: dict[str, QuantSpec]) -> None:
    found = specs(PLAIN | {"dynamic": dynamic}, ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"])
    plain = {"mlp.down_proj": spec(), "self_attn.q_proj": spec()}
    assert found == {f"model.layers.0.{name}": one for name, one in (plain | expected).items()}


def test_a_module_that_the_selection_leaves_out_is_not_packed() -> None:
    selected = PLAIN | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}
    assert specs(selected, ["model.layers.0.self_attn.q_proj", "lm_head"])
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.down_proj is packed, but modules_in_block"):
        specs(selected, ["model.layers.0.mlp.down_proj"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "marlin"}, "unknown checkpoint_format 'marlin'; llmq reads gptq, gptq_v2"),
        ({"format": "gptq", "checkpoint_format": "gptq_v2"}, "contradicts itself: {'checkpoint_format': 'gptq_v2'"),
        ({"is_marlin_format": True}, "marlin"),
        ({"checkpoint_format": 1}, "checkpoint_format is 1; llmq reads gptq and gptq_v2"),
        ({"bits": "four"}, "bits is 'four'; llmq reads 2, 3, 4 and 8"),
        ({"bits": True}, "bits is True"),
        ({"bits": None}, "bits is None"),
        ({"bits": 5}, "bits is 5"),
        ({"bits": 4.0}, "bits is 4.0"),
        ({"bits": 10**30}, "bits is 1000"),
        (
            {"w_bit": 8},
            "contradicts itself: {'bits': 4, 'w_bit': 8}, and readers differ in which they follow; keep one",
        ),
        ({"group_size": -2}, "group_size is -2; llmq reads a positive number or -1"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": True}, "group_size is True"),
        ({"group_size": "128"}, "group_size is '128'"),
        ({"sym": "yes"}, "sym is 'yes'; llmq reads true or false"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16'; llmq reads int32"),
        ({"dynamic": []}, "dynamic is []; llmq reads an object"),
        ({"dynamic": {"+:a": 4}}, "dynamic '+:a' is 4; llmq reads an object"),
        ({"dynamic": {"+:(": {}}}, "dynamic has '(', which is no regular expression"),
        ({"dynamic": {"+:.*": {"bits": 7}}}, "bits is 7"),
        ({"modules_in_block_to_quantize": "all"}, "modules_in_block_to_quantize is 'all'"),
        ({"modules_in_block_to_quantize": [[1]]}, "modules_in_block_to_quantize is [[1]]"),
    ],
    ids=str,
)
def test_what_llmq_does_not_read_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        specs(PLAIN | changes, ["model.layers.0.mlp.down_proj"])
