"""Laws of every packed format."""

import dataclasses

import pytest
import torch
from format_cases import VERSION_1, assert_same, bits_of, layers, random_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.errors import CheckpointError, SpecError
from llmq.formats import FORMATS, METHODS
from llmq.formats.stored import header_of
from llmq.types import QuantSpec

every_format = pytest.mark.parametrize("name", FORMATS)


def spec_of(name: str, symmetric: bool = True, group_size: int = 32) -> QuantSpec:
    return QuantSpec(4, group_size, symmetric, name)


@every_format
@settings(max_examples=60)
@given(data=st.data())
def test_unpack_undoes_pack(name: str, data: st.DataObject) -> None:
    spec, n, k, seed = data.draw(layers(name))
    weight = random_weight(spec, n, k, seed)
    tensors = FORMATS[name].pack(weight, spec)
    assert header_of(tensors) == FORMATS[name].layout(spec, n, k)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_same(FORMATS[name].unpack(tensors, spec), weight)


@every_format
@settings(max_examples=30)
@given(data=st.data())
def test_what_was_packed_is_recognized(name: str, data: st.DataObject) -> None:
    spec, n, k, seed = data.draw(layers(name))
    tensors = FORMATS[name].pack(random_weight(spec, n, k, seed), spec)
    header = {**header_of(tensors), "bias": ((n,), torch.float16)}
    found = FORMATS[name].recognize(spec, header, tensors.__getitem__)
    assert (found.out_features, found.in_features) == (n, k)
    assert found.layout == FORMATS[name].layout(spec, n, k)
    same_bits = 32 % spec.bits == 0  # then both arrangements are one
    assert found.spec == (dataclasses.replace(spec, format=found.spec.format) if same_bits else spec)
    assert FORMATS[name].columns(tensors, spec) is None


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_are_stored_in_the_dtype_that_is_asked_for(name: str, dtype: torch.dtype) -> None:
    spec = dataclasses.replace(spec_of(name), scale_dtype=dtype)
    weight = random_weight(spec, 32, 64, exact=dtype == torch.float16)
    tensors = FORMATS[name].pack(weight, spec)
    assert header_of(tensors) == FORMATS[name].layout(spec, 32, 64)
    assert [t.dtype for t in tensors.values() if t.is_floating_point()] == [dtype]
    unsaid = spec_of(name)
    assert FORMATS[name].recognize(unsaid, header_of(tensors), tensors.__getitem__).spec == spec
    assert_same(FORMATS[name].unpack(tensors, unsaid), weight)


@every_format
@pytest.mark.parametrize("scale", [1 + 2.0**-11, 65536.0, 2.0**-26, float("nan")], ids=str)
def test_scales_that_the_dtype_would_change_are_refused(name: str, scale: float) -> None:
    weight = random_weight(spec_of(name), 32, 64)
    weight.scales[5, 1] = scale
    with pytest.raises(SpecError, match="float16"):
        FORMATS[name].pack(weight, spec_of(name))


@every_format
@pytest.mark.parametrize("zero", [16.0, 16.5, -1.0, 2.5])
def test_zeros_that_are_no_codes_are_refused(name: str, zero: float) -> None:
    # version 1 of gptq goes up to 2^bits, which readers of it may meet, and ours takes it over; no format goes further
    weight = random_weight(spec_of(name, symmetric=False), 32, 32)
    weight.zeros[3, 0] = zero + (1 if name in (*VERSION_1, "llmq") and zero == 16 else 0)
    with pytest.raises(SpecError, match="zero"):
        FORMATS[name].pack(weight, spec_of(name, symmetric=False))


@every_format
def test_a_symmetric_layer_with_other_zeros_is_refused(name: str) -> None:
    weight = random_weight(spec_of(name), 32, 64)
    weight.zeros[3, 1] = 9
    with pytest.raises(SpecError, match="zeros other than 8; store it as asymmetric"):
        FORMATS[name].pack(weight, spec_of(name))


@every_format
@pytest.mark.parametrize(
    ("bits", "group_size", "k", "reason"),
    [(9, 32, 32, "9"), (1, 32, 32, "1"), (4, 128, 192, "group_size 128 does not divide in_features 192")],
    ids=["9-bit", "1-bit", "ragged-group"],
)
def test_refusals_say_why(name: str, bits: int, group_size: int, k: int, reason: str) -> None:
    refusal = FORMATS[name].refuses(QuantSpec(bits, group_size, True, name), 32, k)
    if name == "llmq" and k % group_size:
        assert refusal is None
        return
    assert refusal is not None
    assert reason in refusal


@every_format
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_usual_layers_are_taken(name: str, group_size: int) -> None:
    for bits in bits_of(name):
        assert FORMATS[name].refuses(QuantSpec(bits, group_size, True, name), 96, 128) is None


@every_format
def test_parts_name_every_tensor(name: str) -> None:
    layout = FORMATS[name]
    for symmetric in (True, False):
        tensors = layout.layout(spec_of(name, symmetric), 32, 32)
        assert layout.marker in tensors
        assert tensors.keys() <= set(layout.parts)
        assert set(layout.parts) - set(layout.optional) <= tensors.keys()


@every_format
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_a_config_says_what_specs_reads(name: str, group_size: int, symmetric: bool) -> None:
    for bits in bits_of(name):
        spec = QuantSpec(bits, group_size, symmetric, name)
        modules = [f"model.layers.{i}.{part}_proj" for i in range(2) for part in ("q", "up")]
        config = FORMATS[name].config(dict.fromkeys(modules, spec), ["lm_head", "model.layers.1.mlp.gate"])
        assert METHODS[str(config["quant_method"])] is FORMATS[name]
        found = FORMATS[name].specs(config, modules)
        assert list(found) == modules
        for known in found.values():
            if name == "awq":  # always with zeros; its tensors tell
                known = dataclasses.replace(known, symmetric=symmetric)
            if 32 % bits == 0:
                known = dataclasses.replace(known, format=name)
            names = {"auto-round": "gptq", "auto-round-v2": "gptq_v2"}  # whose tensors they are
            assert dataclasses.replace(known, format=names.get(known.format, known.format)) == dataclasses.replace(
                spec, format=names.get(name, name)
            )


@every_format
def test_nothing_packed_has_no_config(name: str) -> None:
    with pytest.raises(SpecError):
        FORMATS[name].config({}, [])


@every_format
def test_specs_are_those_of_the_modules_asked_for(name: str) -> None:
    config = FORMATS[name].config({"model.layers.0.a": spec_of(name)}, [])
    assert FORMATS[name].specs(config, []) == {}


@every_format
@pytest.mark.parametrize("group_size", [0, -2])
def test_group_sizes_that_cannot_be_are_refused_from_files(name: str, group_size: int) -> None:
    tensors = FORMATS[name].pack(random_weight(spec_of(name), 32, 32), spec_of(name))
    with pytest.raises(CheckpointError, match=f"group_size is {group_size}"):
        FORMATS[name].unpack(tensors, spec_of(name, group_size=group_size))
