"""The pack-quantized layout of compressed-tensors, both arrangements of its bits, and its configurations."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from bits_reference import read_compressed
from format_cases import assert_same, random_weight
from hypothesis import given
from hypothesis import strategies as st

from llmq.errors import CheckpointError, SpecError
from llmq.formats import FORMATS
from llmq.formats.bits import word_count
from llmq.formats.compressed_config import config, specs
from llmq.formats.stored import header_of
from llmq.types import QuantSpec

STREAM, PADDED = "compressed-tensors", "compressed-tensors-padded"
arrangements = pytest.mark.parametrize("name", [STREAM, PADDED])
MODULES = [f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "mlp.down_proj")]
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


def spec(bits: int = 4, group_size: int = 128, symmetric: bool = True, name: str = STREAM) -> QuantSpec:
    return QuantSpec(bits, group_size, symmetric, name)


@arrangements
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_tensors_read_one_code_at_a_time(name: str, bits: int, symmetric: bool) -> None:
    stored = spec(bits, 13, symmetric, name)
    weight = random_weight(stored, 11, 39, seed=bits)
    tensors = FORMATS[name].pack(weight, stored)
    codes, zeros, weights = read_compressed(tensors, bits, 13, name == PADDED)
    half = 2 ** (bits - 1)
    assert codes == (weight.codes.long() - half).tolist()
    assert zeros == (None if symmetric else (weight.zeros - half).tolist())
    # 16 significant bits: exact in float32 as in Python's float
    assert weights == weight.dequantize().double().tolist()
    assert tensors["weight_shape"].tolist() == [11, 39]


def test_published_zeros() -> None:
    # FORMATS 1: zero points -8 to -1 along the outputs
    weight = random_weight(spec(4, -1, False), 8, 8)
    weight = dataclasses.replace(weight, zeros=torch.arange(8.0)[:, None])
    assert FORMATS[STREAM].pack(weight, spec(4, -1, False))["weight_zero_point"].tolist() == [[0x76543210]]


@given(bits=st.integers(2, 8), blocks=st.integers(1, 200))
def test_words_tell_the_arrangement_of_whole_blocks(bits: int, blocks: int) -> None:
    same = word_count(32 * blocks, bits) == word_count(32 * blocks, bits, padded=True)
    assert same == (32 % bits == 0)


@pytest.mark.parametrize("label", [STREAM, PADDED])
@pytest.mark.parametrize("name", [STREAM, PADDED])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_win_over_the_label(name: str, label: str, bits: int) -> None:
    stored = spec(bits, 32, False, name)
    weight = random_weight(stored, 16, 64)
    tensors = FORMATS[name].pack(weight, stored)
    found = FORMATS[label].recognize(spec(bits, 32, False, label), header_of(tensors), tensors.__getitem__)
    assert found.spec == stored
    assert_same(FORMATS[label].unpack(tensors, spec(bits, 32, False, label)), weight)


@arrangements
def test_where_words_do_not_tell_the_label_decides(name: str) -> None:
    stored = spec(3, 20, True, name)  # two words either way
    weight = random_weight(stored, 4, 20)
    tensors = FORMATS[name].pack(weight, stored)
    assert tensors["weight_packed"].shape == (4, 2)
    assert_same(FORMATS[name].unpack(tensors, stored), weight)
    other = {STREAM: PADDED, PADDED: STREAM}[name]
    assert not torch.equal(FORMATS[other].unpack(tensors, spec(3, 20, True, other)).codes, weight.codes)


def test_zeros_of_a_symmetric_label_are_refused() -> None:
    tensors = FORMATS[STREAM].pack(random_weight(spec(4, 32, False), 8, 32), spec(4, 32, False))
    with pytest.raises(CheckpointError, match="weight_zero_point is there"):
        FORMATS[STREAM].unpack(tensors, spec(4, 32))
    del tensors["weight_zero_point"]
    with pytest.raises(CheckpointError, match="weight_zero_point is missing"):
        FORMATS[STREAM].unpack(tensors, spec(4, 32, False))


# ----------------------------------------------------------------------------------------------------------------------


def test_one_spec_is_said_of_all_linears_but_the_dense_ones() -> None:
    dense = ["lm_head", "model.layers.3.mlp.gate", "model.layers.4.mlp.gate"]
    assert config(dict.fromkeys(MODULES, spec()), dense) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": WEIGHTS | {"dynamic": False},
                "format": "pack-quantized",
            }
        },
        "ignore": [r"re:^lm_head(\..*)?$", r"re:^model\.layers\.\d+\.mlp\.gate(\..*)?$"],
        "version": "0.18.0",
    }


def test_one_group_per_output_is_a_channel() -> None:
    found: Any = config({MODULES[0]: spec(8, -1, False, PADDED)}, [])
    weights = found["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"], weights["symmetric"]) == ("channel", None, False)
    assert found["version"] == "0.17.0"


def test_several_specs_get_a_group_each() -> None:
    mixed = {name: spec(8, -1) if "down" in name else spec() for name in MODULES}
    mixed["model.layers.7.self_attn.q_proj"] = spec(2, 32, False)
    found: Any = config(mixed, ["lm_head"])
    groups = found["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 8, 2]
    assert groups["group_1"]["targets"] == [r"re:^model\.layers\.\d+\.mlp\.down_proj$"]
    assert groups["group_2"]["targets"] == [r"re:^model\.layers\.7\.self_attn\.q_proj$"]
    assert len(groups["group_0"]["targets"]) == 11
    assert specs(found, MODULES) == mixed
    two = {"a.0.x": spec(8), "a.0.y": spec()}
    assert specs(config(two, []), list(two)) == two


def test_what_is_dense_is_not_packed() -> None:
    found = config(dict.fromkeys(MODULES, spec()), ["lm_head", "model.layers.0.mlp.gate"])
    for name in ("lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.gate.inner"):
        with pytest.raises(CheckpointError, match=f"ignore names {name}, but it is packed"):
            specs(found, [name])
    assert specs(found, ["model.layers.0.mlp.gate_proj"])


def test_arrangements_cannot_be_mixed() -> None:
    with pytest.raises(SpecError, match="of one format"):
        config({"a": spec(), "b": spec(name=PADDED)}, [])


def made(weights: dict[str, Any] | None = None, group: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """Return a configuration as llm-compressor writes it, with changes."""
    return {
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": WEIGHTS
                | {"actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax"}
                | (weights or {}),
            }
            | (group or {})
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    } | top


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (made(), spec()),
        (made({"num_bits": 8, "strategy": "channel", "group_size": None}), spec(8, -1)),
        (made({"strategy": None}), spec()),
        (made({"strategy": None, "group_size": -1}), spec(group_size=-1)),
        (made({"symmetric": False, "num_bits": 3}), spec(3, symmetric=False)),
        (made({"num_bits": 3}, version="0.16.1"), spec(3, name=PADDED)),
        (made({"num_bits": 3}, version="0.17.1"), spec(3, name=PADDED)),
        (made({"num_bits": 3}, version="0.18.0.a20260601"), spec(3)),
        (made({"num_bits": 3}, version=None), spec(3)),
        (made({"num_bits": 4}, version="0.9.4"), spec()),
        (made({"actorder": "group"}), spec()),
        (made({"actorder": "static"}), spec()),
        (made({"actorder": True}), spec()),
        (made({"actorder": False}), spec()),
        (made({"strategy": "channel"}), spec(group_size=-1)),
        (made(group={"format": None}, quantization_status="frozen"), spec()),
        (made(group={"targets": ["re:.*q_proj"]}), spec()),
        (made(group={"targets": [MODULES[0]]}, format="mixed-precision"), spec()),
        (made(sparsity_config={"format": "dense", "sparsity_structure": "dense"}), spec()),
        (made(transform_config={"config_groups": {}}, ignore=None), spec()),
    ],
)
def test_configurations_of_all_versions_are_read(found: dict[str, Any], expected: QuantSpec) -> None:
    assert specs(found, MODULES[:1]) == {MODULES[0]: expected}


def test_a_name_comes_before_an_expression_and_that_before_a_class() -> None:
    group = made()["config_groups"]["group_0"]

    def bits(count: int, *targets: str) -> dict[str, Any]:
        return {**group, "targets": list(targets), "weights": WEIGHTS | {"num_bits": count}}

    groups = {"a": bits(2, "lm_head"), "b": bits(3, "Linear"), "c": bits(5, "re:.*q_proj"), "d": bits(6, MODULES[0])}
    found = specs(made(config_groups=groups, ignore=[]), [*MODULES[:3], "lm_head"])
    assert [one.bits for one in found.values()] == [6, 3, 5, 2]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (made({"num_bits": 1}), "config_groups 'group_0' has num_bits 1; llmq reads whole numbers of 2 to 8 bits"),
        (made({"num_bits": 16}), "num_bits 16"),
        (made({"num_bits": None}), "config_groups 'group_0' has no num_bits"),
        (made({"num_bits": "4"}), "num_bits is '4'; llmq reads 2 to 8"),
        (made({"type": "float"}), "type 'float'"),
        (made({"strategy": "tensor", "group_size": None}), "strategy 'tensor'"),
        (made({"strategy": None, "group_size": None}), "strategy 'tensor'"),
        (made({"strategy": "block"}), "strategy 'block'"),
        (made({"group_size": None}), "config_groups 'group_0' has no group_size"),
        (made({"group_size": 0}), "group_size 0"),
        (made({"group_size": -128}), "group_size -128"),
        (made({"dynamic": True}), "dynamic True"),
        (made({"actorder": "input"}), "actorder 'input'"),
        (made({"symmetric": "no"}), "symmetric is 'no'; llmq reads true or false"),
        (made(group={"format": "int-quantized"}), "'group_0' has format 'int-quantized'; llmq reads pack-quantized"),
        (made(group={"input_activations": {"num_bits": 8}}), "'group_0' has input_activations"),
        (made(group={"targets": "Linear"}), "targets is 'Linear'; llmq reads a list of names"),
        (made(group={"targets": [4]}), "targets is [4]"),
        (made(group={"targets": ["re:("]}), "targets has '(', which is no regular expression"),
        (made(group={"targets": ["Embedding"]}), "q_proj is packed, but no target of config_groups names it"),
        (made(group={"weights": None}), "config_groups 'group_0': weights is None"),
        (made(config_groups={"W4A16": ["Linear"]}), "config_groups 'W4A16' is ['Linear']; llmq reads an object"),
        (made(config_groups=None), "config_groups is None"),
        (made(ignore=["re:.*q_proj"]), "ignore names model.layers.0.self_attn.q_proj, but it is packed"),
        (made(ignore=MODULES[:1]), "ignore names model.layers.0.self_attn.q_proj, but it is packed"),
        (made(ignore="lm_head"), "ignore is 'lm_head'"),
        (made(format="int-quantized"), "format is 'int-quantized'; llmq reads pack-quantized"),
        (made(quantization_status=None), "quantization_status is None; llmq reads compressed"),
        (made(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is {'num_bits': 8}; llmq reads packed weights only"),
        (made(sparsity_config={"format": "sparse-24"}), "sparsity_config is"),
        (made(transform_config={"config_groups": {"u": {}}}), "transform_config is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_llmq_does_not_read_is_named(found: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        specs(found, MODULES[:1])
