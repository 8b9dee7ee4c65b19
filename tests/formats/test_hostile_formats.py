"""Files that are damaged or made to hurt: one error of ours, which says what and where, and no crash."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from format_cases import random_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import CheckpointError
from llmq.formats import FORMATS, METHODS
from llmq.formats.stored import header_of
from llmq.types import QuantSpec

every_format = pytest.mark.parametrize("name", FORMATS)
N, K = 32, 64
CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda t: None,
    "other-dtype": lambda t: t.float().double(),
    "other-integers": lambda t: t.to(torch.int16),
    "booleans": lambda t: t.bool(),
    "flat": lambda t: t.flatten() if t.dim() > 1 else t[None],
    "scalar": lambda t: t.flatten()[0],
    "empty": lambda t: t[:0],
    "short": lambda t: t[:-1],
    "long": lambda t: torch.cat([t, t[-1:]]),
    "wide": lambda t: torch.cat([t, t], dim=-1),
    "narrow": lambda t: t[..., :-1],
}


def layer(name: str) -> tuple[QuantSpec, dict[str, Tensor]]:
    spec = QuantSpec(4, 16, False, name)
    return spec, FORMATS[name].pack(random_weight(spec, N, K), spec)


def refused(spec: QuantSpec, tensors: dict[str, Tensor]) -> str:
    """Return the error of unpacking, which recognizing has, too."""
    layout = FORMATS[spec.format]
    with pytest.raises(CheckpointError) as first:
        layout.recognize(spec, header_of(tensors), tensors.__getitem__)
    with pytest.raises(CheckpointError) as second:
        layout.unpack(tensors, spec)
    assert str(first.value) == str(second.value)
    assert "\n" not in str(first.value)
    return str(first.value)


@every_format
@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_that_is_not_as_it_should_be_is_named(name: str, change: str) -> None:
    spec, tensors = layer(name)
    for local, tensor in tensors.items():
        changed = CHANGES[change](tensor)
        damaged = {key: other for key, other in tensors.items() if key != local}
        if changed is not None:
            damaged[local] = changed
        elif local == "g_idx":
            continue
        message = refused(spec, damaged)
        # from the codes sizes are told, so that what is wrong with them may show in what should fit them
        assert local in message or (local == FORMATS[name].marker and any(part in message for part in tensors))


@every_format
@pytest.mark.parametrize("bits", [-4, 0, 1, 5, 9, 32, 10**30])
def test_bits_that_do_not_fit_are_refused(name: str, bits: int) -> None:
    spec, tensors = layer(name)
    assert refused(replace(spec, bits=bits), tensors)


@every_format
@pytest.mark.parametrize("group_size", [-(10**30), -16, 0, 1, 15, 32, K, 10**30, -1])
def test_group_sizes_that_do_not_fit_are_refused(name: str, group_size: int) -> None:
    spec, tensors = layer(name)
    assert refused(replace(spec, group_size=group_size), tensors)


@every_format
@pytest.mark.parametrize("group_size", [K + 1, 10**9, 10**30])
def test_a_group_larger_than_the_layer_is_the_layer(name: str, group_size: int) -> None:
    spec = QuantSpec(4, -1, False, name)
    weight = random_weight(spec, N, K)
    found = FORMATS[name].unpack(FORMATS[name].pack(weight, spec), replace(spec, group_size=group_size))
    assert found.group_size == K
    assert torch.equal(found.dequantize(), weight.dequantize())  # in no more memory than that


@every_format
@given(sizes=st.lists(st.integers(0, 2**70), max_size=4))
def test_codes_of_any_shape_are_refused(name: str, sizes: list[int]) -> None:
    spec, tensors = layer(name)
    header = {**header_of(tensors), FORMATS[name].marker: (tuple(sizes), torch.int32)}
    if header == header_of(tensors):
        return
    with pytest.raises(CheckpointError):
        FORMATS[name].recognize(spec, header, tensors.__getitem__)


@pytest.mark.parametrize(
    "shape",
    [[N, K + 1], [N + 1, K], [N, 0], [0, 0], [-N, -K], [N, -K], [K, N], [2**62, 2**62], [1, 2**63 - 1], [math.nan, K]],
)
def test_a_weight_shape_that_lies_is_refused(shape: list[float]) -> None:
    spec, tensors = layer("compressed-tensors")
    assert refused(spec, tensors | {"weight_shape": torch.tensor(shape)})


# ----------------------------------------------------------------------------------------------------------------------

plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["re:(", "-:.*", "Linear", "group", 4, -1, 2**64])
)
anything = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def paths(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the keys that lead to each value within `value`."""
    inner = [p for key, one in value.items() for p in paths(one, (*path, key))] if isinstance(value, dict) else []
    return [path, *inner] if path else inner


@pytest.mark.parametrize("name", [name for name in METHODS if name in FORMATS])
@settings(max_examples=300)
@given(data=st.data())
def test_any_value_anywhere_in_a_config_is_read_or_refused(name: str, data: st.DataObject) -> None:
    packed = {"model.layers.0.a": QuantSpec(4, 16, False, name), "model.layers.0.b": QuantSpec(4, 32, False, name)}
    if name == "awq":
        packed["model.layers.0.b"] = packed["model.layers.0.a"]
    config: dict[str, Any] = json.loads(json.dumps(FORMATS[name].config(packed, ["lm_head"])))
    path = data.draw(st.sampled_from(paths(config)))
    place = config
    for key in path[:-1]:
        place = place[key]
    if data.draw(st.booleans()):
        place[path[-1]] = data.draw(anything)
    else:
        place[data.draw(st.text(max_size=5))] = place.pop(path[-1])
    message, found = outcome(name, config, list(packed))
    if found is None:
        assert "\n" not in message
        assert len(message) < 400
    else:
        assert list(found) == list(packed)
        assert all(spec.bits in range(2, 9) for spec in found.values())
        assert all(spec.group_size == -1 or spec.group_size > 0 for spec in found.values())


def outcome(name: str, config: dict[str, Any], modules: list[str]) -> tuple[str, dict[str, QuantSpec] | None]:
    """Return the error of reading a configuration, or what was read."""
    try:
        return "", METHODS[name].specs(config, modules)
    except CheckpointError as error:
        return str(error), None
