"""AutoAWQ's gemm layout and its configurations."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from bits_reference import read_awq
from format_cases import assert_same, random_weight

from llmq.errors import CheckpointError, SpecError
from llmq.formats import FORMATS, awq
from llmq.formats.stored import header_of
from llmq.types import QuantSpec

SYM, ASYM = QuantSpec(4, 32, True, "awq"), QuantSpec(4, 32, False, "awq")
MODULES = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("n", [8, 40])
@pytest.mark.parametrize("spec", [SYM, ASYM], ids=["sym", "asym"])
def test_tensors_read_one_nibble_at_a_time(spec: QuantSpec, n: int) -> None:
    weight = random_weight(spec, n, 96)
    codes, zeros = read_awq(FORMATS["awq"].pack(weight, spec))
    assert codes == weight.codes.tolist()
    assert zeros == weight.zeros.tolist()


def test_published_word() -> None:
    # FORMATS 1: codes 0..7 of eight outputs
    weight = random_weight(QuantSpec(4, 1, False, "awq"), 8, 1)
    weight = dataclasses.replace(weight, codes=torch.arange(8, dtype=torch.uint8)[:, None])
    assert FORMATS["awq"].pack(weight, QuantSpec(4, 1, False, "awq"))["qweight"].tolist() == [[0x75316420]]


def test_symmetric_zeros_are_stored_and_recognized() -> None:
    tensors = FORMATS["awq"].pack(random_weight(SYM, 32, 64), SYM)
    assert (tensors["qzeros"].long() & 0xFFFFFFFF == 0x88888888).all()
    assert FORMATS["awq"].recognize(ASYM, header_of(tensors), tensors.__getitem__).spec == SYM
    tensors["qzeros"][1, 3] += 1
    assert FORMATS["awq"].recognize(ASYM, header_of(tensors), tensors.__getitem__).spec == ASYM


def test_other_zeros_under_a_symmetric_label_are_named() -> None:
    weight = random_weight(SYM, 32, 64)
    weight.zeros[3, 1] = 9
    tensors = FORMATS["awq"].pack(weight, ASYM)
    with pytest.raises(CheckpointError, match="zeros are stored as 8, but they are 8 to 9; set zero_point to true"):
        FORMATS["awq"].unpack(tensors, SYM)
    assert_same(FORMATS["awq"].unpack(tensors, ASYM), FORMATS["awq"].unpack(tensors, ASYM))


@pytest.mark.parametrize(
    ("bits", "n", "reason"), [(8, 32, "holds 4 bits, not 8"), (4, 36, "out_features 36 is not a multiple of 8")]
)
def test_what_it_cannot_hold_is_refused(bits: int, n: int, reason: str) -> None:
    refusal = FORMATS["awq"].refuses(QuantSpec(bits, 32, True, "awq"), n, 64)
    assert refusal is not None
    assert reason in refusal


def test_columns_out_of_order_cannot_be_stored() -> None:
    with pytest.raises(SpecError, match="no g_idx"):
        FORMATS["awq"].pack(random_weight(SYM, 32, 64), SYM, torch.arange(64))


def test_config_has_the_keys_of_all_readers() -> None:
    # FORMATS 1.2; zero_point is true of symmetric layers, too: the zeros are there
    for spec in (SYM, ASYM):
        assert awq.config(dict.fromkeys(MODULES, spec), ["lm_head"]) == {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 32,
            "zero_point": True,
            "version": "gemm",
            "format": "gemm",
            "modules_to_not_convert": ["lm_head"],
            "dynamic": {r"-:^lm_head(\..*)?$": {}},
        }


def test_mixed_specs_cannot_be_said() -> None:
    with pytest.raises(SpecError, match="the awq format has one quantization for all modules, not 2"):
        awq.config({MODULES[0]: SYM, MODULES[1]: dataclasses.replace(SYM, group_size=64)}, [])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # AutoAWQ's own file, then what transformers makes of it, then GPTQModel
        ({"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}, ASYM),
        (
            {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "backend": "autoawq"}
            | {"modules_to_not_convert": None, "sym": True, "desc_act": False},
            ASYM,
        ),
        ({"bits": 4, "group_size": 32, "zero_point": False, "format": "gemm", "checkpoint_format": "gemm"}, SYM),
        ({}, QuantSpec(4, 128, False, "awq")),
        ({"group_size": -1}, QuantSpec(4, -1, False, "awq")),
    ],
    ids=["autoawq", "transformers", "gptqmodel", "defaults", "one-group"],
)
def test_spellings_of_all_writers_are_read(config: dict[str, Any], expected: QuantSpec) -> None:
    assert awq.specs({"quant_method": "awq", **config}, MODULES) == dict.fromkeys(MODULES, expected)


def test_dynamic_changes_the_group_size_of_a_module() -> None:
    config = {
        "quant_method": "awq",
        "q_group_size": 128,
        "dynamic": {r".*\.1\..*": {"q_group_size": 32}, "-:.*down": {}},
    }
    assert awq.specs(config, MODULES) == {MODULES[0]: dataclasses.replace(ASYM, group_size=128), MODULES[1]: ASYM}
    with pytest.raises(
        CheckpointError, match=r"'-:\.\*down' keeps model.layers.0.mlp.down_proj dense, but it is packed"
    ):
        awq.specs(config, ["model.layers.0.mlp.down_proj"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": "gemv"}, "version is 'gemv'; llmq reads gemm"),
        ({"version": "GEMM", "format": "gemv_fast"}, "contradicts itself: {'version': 'GEMM', 'format': 'gemv_fast'}"),
        ({"backend": "llm-awq"}, "backend is 'llm-awq', a layout of its own; llmq reads gemm"),
        ({"bits": 8}, "bits is 8; llmq reads awq of 4 bits"),
        ({"bits": 4, "w_bit": 3}, "contradicts itself"),
        ({"bits": "4"}, "bits is '4'; llmq reads 4"),
        ({"group_size": 0}, "group_size is 0; llmq reads a positive number or -1"),
        ({"group_size": 64, "q_group_size": 128}, "contradicts itself"),
        ({"zero_point": 1}, "zero_point is 1; llmq reads true or false"),
    ],
    ids=str,
)
def test_what_llmq_does_not_read_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        awq.specs({"quant_method": "awq", **config}, MODULES)
