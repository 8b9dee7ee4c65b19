"""AutoRound's label: what it says of every variant, and what llmq writes into it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from format_cases import random_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.errors import CheckpointError, SpecError
from llmq.formats import FORMATS, METHODS, auto_round
from llmq.types import QuantSpec

MODULES = [f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "mlp.down_proj")]
Q, DOWN = MODULES[:2]
PLAIN = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
    "block_name_to_quantize": "model.layers",
}


def spec(bits: int = 4, group_size: int = 32, symmetric: bool = True, name: str = "auto-round") -> QuantSpec:
    return QuantSpec(bits, group_size, symmetric, name)


def read(changes: dict[str, Any], module: str = Q) -> QuantSpec:
    return auto_round.specs({**PLAIN, **changes}, [module])[module]


# Labels
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "format"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:gptq", "gptq"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round", "gptq_v2"),
        ("auto_round:auto_awq", "awq"),
        ("auto_round:awq", "awq"),
        ("auto_round:gptq:exllamav2", "gptq"),
        ("auto_round:awq:gemm", "awq"),
        ("AUTO_ROUND:GPTQModel", "gptq_v2"),
        ("auto", "gptq"),
        (None, "gptq"),
    ],
)
def test_a_packing_format_names_a_layout(label: str | None, format: str) -> None:
    assert read({"packing_format": label}) == spec(name=format)


@pytest.mark.parametrize(
    ("label", "format"),
    [("auto_round:exllamav2", "gptq_v2"), ("auto_round:tritonv2", "gptq_v2"), ("auto_round:gptq:exllamav2", "gptq")],
)
def test_files_of_old_versions_name_it_as_backend(label: str, format: str) -> None:
    assert read({"packing_format": None, "backend": label, "quant_method": "intel/auto-round"}) == spec(name=format)
    assert METHODS["intel/auto-round"] is auto_round


def test_a_backend_beside_a_packing_format_is_a_wish_for_a_kernel() -> None:
    assert read({"backend": "marlin"}) == spec(name="gptq")


@pytest.mark.parametrize(
    "label",
    ["auto_round:llm_compressor", "auto_round:fp8_static", "mlx", "auto_round:mlx", "gptq", "auto_", 4],
)
def test_other_layouts_are_refused_by_name(label: object) -> None:
    with pytest.raises(
        CheckpointError, match=r"packing_format is .*llmq reads auto_round:auto_gptq, auto_round:gptqmodel"
    ):
        read({"packing_format": label})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp'; llmq reads int"),
        ({"data_type": "nv_fp"}, "data_type is 'nv_fp'"),
        ({"act_bits": 8}, "act_bits is 8; llmq reads activations as they are"),
        ({"act_bits": True}, "act_bits is True"),
        ({"rotation_config": {"r1": True}}, "rotation_config is {'r1': True}"),
        ({"spinquant_config": {"r1": True}}, "spinquant_config is"),
        ({"super_bits": 6}, "super_bits is 6"),
        ({"super_group_size": 8}, "super_group_size is 8"),
        ({"bits": 5}, "bits is 5; llmq reads gptq of 2, 3, 4, 8 bits"),
        ({"bits": None}, "bits is None"),
        ({"bits": 16}, "bits is 16"),
        ({"bits": 3, "packing_format": "auto_round:auto_awq"}, "bits is 3; llmq reads awq of 4 bits"),
        ({"group_size": [128, 128]}, "group_size is"),
        ({"group_size": 0}, "group_size is 0"),
        ({"sym": "yes"}, "sym is 'yes'"),
        ({"extra_config": []}, None),
        ({"extra_config": ["x"]}, "extra_config is"),
        ({"extra_config": {"x": 4}}, "extra_config is"),
        ({"extra_config": {"x": {"bits": 4, "data_type": "fp"}}}, "data_type is 'fp'"),
        ({"extra_config": {"(": {"bits": 8}}}, "no regular expression"),
        ({"extra_config": {"(.*a)*b": {"bits": 8}}}, "no regular expression"),
        ({"block_name_to_quantize": 3}, None),
    ],
    ids=str,
)
def test_what_is_no_integer_grid_is_refused_by_name(changes: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert read(changes) == spec(name="gptq")
        return
    with pytest.raises(CheckpointError, match=message.replace("{", r"\{")):
        read(changes)
    # and so before a module is named, which decides whether llmq.hf leaves a folder to transformers
    with pytest.raises(CheckpointError):
        auto_round.specs({**PLAIN, **changes}, [])


def test_what_leaves_things_as_they_are_is_read() -> None:
    quiet = {"act_bits": 16, "rotation_config": None, "super_bits": None, "data_type": None, "spinquant_config": {}}
    assert read(quiet) == spec(name="gptq")


# Rows for single modules
# ----------------------------------------------------------------------------------------------------------------------


def test_a_name_counts_before_expressions_and_these_in_their_order() -> None:
    rows = {
        ".*down_proj.*": {"bits": 2, "group_size": 64},
        "mlp.*": {"bits": 3},
        r"layers\.1\..*q_proj$": {"sym": False},
        DOWN: {"bits": 8},
    }
    found = auto_round.specs({**PLAIN, "extra_config": rows}, MODULES)
    assert found[DOWN] == spec(8, name="gptq")
    assert found[MODULES[3]] == spec(2, 64, name="gptq")
    assert found[MODULES[2]] == spec(symmetric=False, name="gptq")  # searched for, not matched from the start
    assert found[Q] == found[MODULES[22]] == spec(name="gptq")


def test_a_key_without_special_characters_is_a_name() -> None:
    rows = {"model.layers.1": {"bits": 8}, "down_proj": {"bits": 8}}
    assert set(auto_round.specs({**PLAIN, "extra_config": rows}, MODULES).values()) == {spec(name="gptq")}


def test_an_empty_row_says_nothing() -> None:
    assert read({"extra_config": {Q: {}, ".*q_proj": {"bits": 8}}}) == spec(8, name="gptq")
    assert read({"extra_config": {".*": {}, ".*q_proj": {"bits": 8}}}) == spec(8, name="gptq")


@pytest.mark.parametrize("key", [Q, ".*q_proj.*"])
def test_a_packed_module_that_is_said_to_be_dense_is_refused(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"keeps {Q} dense, but it is packed"):
        read({"extra_config": {key: {"bits": 16, "data_type": "float", "group_size": 0}}})


def test_a_packed_head_has_to_be_named() -> None:
    with pytest.raises(CheckpointError, match="lm_head is packed, but neither block_name_to_quantize nor extra_config"):
        read({}, "lm_head")
    with pytest.raises(CheckpointError, match="lm_head is packed"):
        read({"block_name_to_quantize": None}, "lm_head")
    assert read({"extra_config": {"lm_head": {"bits": 8}}}, "lm_head") == spec(8, name="gptq")
    assert read({"block_name_to_quantize": "model.layers, lm_head"}, "lm_head") == spec(name="gptq")


@pytest.mark.parametrize(
    "blocks",
    [
        {"block_name_to_quantize": "model.layers"},
        {"block_name_to_quantize": "model.other,model.layers"},
        {"block_name_to_quantize": ["model.layers"]},
        {"block_name_to_quantize": None, "to_quant_block_names": [["model.layers.0", "model.layers.1"]]},
        {"block_name_to_quantize": None},
    ],
    ids=str,
)
def test_which_modules_stay_dense(blocks: dict[str, Any]) -> None:
    config = {**PLAIN, **blocks, "extra_config": {"model.layers.0.mlp.gate": {"bits": 16}, ".*k_proj": {"bits": 16}}}
    names = ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.self_attn.k_proj", Q, "model.layers.1.mlp.gate_proj"]
    assert auto_round.kept_dense(config, names) == set(names[:3])
    config["extra_config"] |= {"lm_head": {"bits": 8}}
    assert auto_round.kept_dense(config, names) == set(names[1:3])
    assert auto_round.kept_dense(config, ["visual.blocks.0.fc"]) == (
        {"visual.blocks.0.fc"} if any(blocks.values()) else set()
    )


def test_blocks_that_are_no_names_are_refused() -> None:
    with pytest.raises(CheckpointError, match="block_name_to_quantize is 3"):
        auto_round.kept_dense({**PLAIN, "block_name_to_quantize": 3}, [Q])


# What llmq writes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "packing"), [("auto-round", "auto_round:auto_gptq"), ("auto-round-v2", "auto_round:gptqmodel")]
)
def test_the_keys_are_those_that_autoround_reads(name: str, packing: str) -> None:
    one = spec(8, -1, False, name)
    assert auto_round.config(dict.fromkeys(MODULES, one), ["model.layers.3.mlp.gate"]) == {
        "quant_method": "auto-round",
        "bits": 8,
        "group_size": -1,
        "sym": False,
        "data_type": "int",
        "packing_format": packing,
        "block_name_to_quantize": "model.layers",
        "extra_config": {"model.layers.3.mlp.gate": {"bits": 16}},
    }
    assert "extra_config" not in auto_round.config(dict.fromkeys(MODULES, one), [])


def test_the_most_common_spec_stands_above_and_others_have_rows() -> None:
    mixed = {name: spec(8, 64) if "down" in name else spec() for name in [*MODULES, "model.layers.0.self_attn.k_proj"]}
    mixed |= {"lm_head": spec(), "model.vision.4.fc": spec(3, symmetric=False)}
    found = auto_round.config(mixed, [])
    rows: Any = found["extra_config"]
    assert (found["bits"], found["group_size"], found["sym"]) == (4, 32, True)
    assert found["block_name_to_quantize"] == "model.layers,model.vision"
    assert rows["lm_head"] == {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
    assert set(rows) == {"lm_head", "model.vision.4.fc", *(name for name in MODULES if "down" in name)}
    few = {Q: spec(8), DOWN: spec(), MODULES[2]: spec()}  # the first is not the most common
    assert auto_round.config(few, [])["bits"] == 4
    assert auto_round.specs(found, list(mixed)) == {name: replace(s, format="gptq") for name, s in mixed.items()}


def test_experts_are_in_the_block_that_their_layer_is_in() -> None:
    found = auto_round.config(dict.fromkeys(["h.0.mlp.experts.3.up", "h.1.mlp.experts.0.up"], spec()), [])
    assert found["block_name_to_quantize"] == "h"


def test_a_model_without_blocks_names_none() -> None:
    found = auto_round.config({"lm_head": spec()}, [])
    assert "block_name_to_quantize" not in found
    assert auto_round.specs(found, ["lm_head"]) == {"lm_head": spec(name="gptq")}


def test_two_ways_to_store_zeros_do_not_mix() -> None:
    with pytest.raises(SpecError, match="one format, not of auto-round and auto-round-v2"):
        auto_round.config({Q: spec(), DOWN: spec(name="auto-round-v2")}, [])


@pytest.mark.parametrize(("name", "inner"), [("auto-round", "gptq"), ("auto-round-v2", "gptq_v2")])
@settings(max_examples=30)
@given(
    bits=st.sampled_from([2, 3, 4, 8]), groups=st.integers(1, 3), rows=st.integers(1, 3), symmetric=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_tensors_are_those_of_gptq_without_an_index(
    name: str, inner: str, bits: int, groups: int, rows: int, symmetric: bool, seed: int
) -> None:
    one, there = spec(bits, 32, symmetric, name), spec(bits, 32, symmetric, inner)
    weight = random_weight(one, 32 * rows, 32 * groups, seed)
    expected = FORMATS[inner].pack(weight, there)
    del expected["g_idx"]
    found = FORMATS[name].pack(weight, one)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[local], tensor) for local, tensor in expected.items())


def test_columns_out_of_order_have_no_place() -> None:
    one = spec()
    with pytest.raises(SpecError, match="AutoRound passes over g_idx"):
        auto_round.pack(random_weight(one, 32, 64), one, torch.arange(64).flip(0))
