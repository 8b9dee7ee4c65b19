"""What two formats can hold goes from one to the other and back without a bit changed."""

from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch
from format_cases import VERSION_1, assert_same, layers, random_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.formats import FORMATS
from llmq.formats.stored import header_of
from llmq.types import QuantizedWeight, QuantSpec


def read(tensors: dict[str, torch.Tensor], label: QuantSpec) -> tuple[QuantizedWeight, QuantSpec]:
    """Return a weight from a file that `label` says is of some format, as any consumer would."""
    spec = FORMATS[label.format].recognize(label, header_of(tensors), tensors.__getitem__).spec
    return FORMATS[spec.format].unpack(tensors, spec), spec


@pytest.mark.parametrize(("first", "second"), list(permutations(FORMATS, 2)))
@settings(max_examples=15)
@given(data=st.data())
def test_any_weight_that_both_take_is_the_same_in_both(first: str, second: str, data: st.DataObject) -> None:
    spec, n, k, seed = data.draw(layers(first))
    there = replace(spec, format=second)
    if FORMATS[second].refuses(there, n, k) is not None:
        return
    # version 1 of gptq alone has no zero of 0
    weight = random_weight(spec, n, k, seed, lowest_zero=int(bool({first, second} & set(VERSION_1))))
    one, _ = read(FORMATS[first].pack(weight, spec), spec)
    two, found = read(FORMATS[second].pack(one, there), there)
    assert_same(two, weight)
    assert found.symmetric == spec.symmetric
    back = FORMATS[first].pack(two, spec)
    assert all(torch.equal(back[local], tensor) for local, tensor in FORMATS[first].pack(weight, spec).items())


@pytest.mark.parametrize(
    ("bits", "symmetric", "way"),
    [
        (4, True, ["gptq", "awq", "compressed-tensors", "gptq"]),
        (4, False, ["gptq_v2", "awq", "compressed-tensors", "gptq_v2"]),
        (3, False, ["gptq_v2", "compressed-tensors", "compressed-tensors-padded", "gptq_v2"]),
        (8, True, ["gptq", "compressed-tensors", "gptq"]),
        (8, False, ["gptq_v2", "compressed-tensors", "gptq_v2"]),
        (4, True, ["compressed-tensors", "gptq_v2", "gptq", "compressed-tensors"]),
        (4, False, ["gptq_v2", "llmq", "awq", "llmq", "gptq_v2"]),
        (8, False, ["llmq", "gptq_v2", "compressed-tensors", "llmq"]),
        (3, True, ["compressed-tensors-padded", "llmq", "compressed-tensors-padded"]),
        (4, True, ["gptq", "auto-round", "awq", "auto-round", "gptq"]),
        (3, False, ["gptq_v2", "auto-round-v2", "llmq", "gptq_v2"]),
        (8, True, ["auto-round", "gptq", "compressed-tensors", "auto-round"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_round_trip_ends_with_the_bytes_it_began_with(
    bits: int, symmetric: bool, way: list[str], dtype: torch.dtype
) -> None:
    spec = QuantSpec(bits, 128, symmetric, way[0], dtype)
    start = FORMATS[way[0]].pack(random_weight(spec, 64, 256), spec)
    tensors = start
    for here, there in pairwise(way):
        # of a file that is all known is its label, and awq's does not say whether it is symmetric
        label = QuantSpec(bits, 128, symmetric and here != "awq", here)
        weight, spec = read(tensors, label)
        tensors = FORMATS[there].pack(weight, replace(spec, format=there))
    assert header_of(tensors) == header_of(start)
    assert all(torch.equal(tensors[local], tensor) for local, tensor in start.items())
