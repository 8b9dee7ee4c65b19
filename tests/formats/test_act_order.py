"""Files of others whose columns are not in the order of their groups."""

import pytest
import torch
from bits_reference import read_gptq
from format_cases import assert_same, random_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import CheckpointError
from llmq.formats import FORMATS
from llmq.formats.stored import header_of
from llmq.types import QuantSpec

INDEX = {"gptq": "g_idx", "gptq_v2": "g_idx", "compressed-tensors": "weight_g_idx"}
indexed = pytest.mark.parametrize("name", INDEX)


def shuffled(
    name: str, bits: int = 4, k: int = 64, group_size: int = 16, seed: int = 0
) -> tuple[QuantSpec, dict[str, Tensor]]:
    """Return the tensors of a layer of act-order, made here from one in order, and its spec."""
    spec = QuantSpec(bits, group_size, False, name)
    tensors = FORMATS[name].pack(random_weight(spec, 32, k, seed), spec)
    place = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    tensors[INDEX[name]] = (torch.arange(k) // group_size)[place].int()
    return spec, tensors


@indexed
@settings(max_examples=30)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64]),
    seed=st.integers(0, 99),
)
def test_packing_what_was_unpacked_gives_the_same_bytes(
    name: str, bits: int, groups: int, group_size: int, seed: int
) -> None:
    spec, tensors = shuffled(name, bits, groups * group_size, group_size, seed)
    columns = FORMATS[name].columns(tensors, spec)
    packed = FORMATS[name].pack(FORMATS[name].unpack(tensors, spec), spec, columns)
    assert header_of(packed) == header_of(tensors)
    assert all(torch.equal(packed[local], tensor) for local, tensor in tensors.items())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_sorted_weight_times_permuted_inputs_is_the_layer(version: int, bits: int) -> None:
    name = {1: "gptq", 2: "gptq_v2"}[version]
    spec, tensors = shuffled(name, bits)
    columns = FORMATS[name].columns(tensors, spec)
    assert columns is not None
    weight = FORMATS[name].unpack(tensors, spec).dequantize().double()
    expected = torch.tensor(read_gptq(tensors, bits, version)[2], dtype=torch.float64)
    assert torch.equal(weight, expected[:, columns])
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x[..., columns] @ weight.T, x @ expected.T)


def test_columns_of_one_group_keep_their_order() -> None:
    g_idx = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    spec = QuantSpec(4, 2, True, "gptq")
    assert FORMATS["gptq"].columns({"g_idx": g_idx}, spec).tolist() == [1, 3, 0, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_an_index_in_order_needs_no_permutation(name: str) -> None:
    spec = QuantSpec(4, 32, True, name)
    weight = random_weight(spec, 32, 64)
    tensors = FORMATS[name].pack(weight, spec)
    assert FORMATS[name].columns(tensors, spec) is None
    for changed in (tensors | {"g_idx": tensors["g_idx"].long()}, {k: t for k, t in tensors.items() if k != "g_idx"}):
        assert FORMATS[name].columns(changed, spec) is None
        assert_same(FORMATS[name].unpack(changed, spec), weight)
        assert FORMATS[name].recognize(spec, header_of(changed), changed.__getitem__).layout == header_of(changed)


def test_an_index_that_was_never_filled_is_none() -> None:
    # compressed-tensors makes it of -1 and takes it for an order only without any
    spec = QuantSpec(4, 32, True, "compressed-tensors")
    weight = random_weight(spec, 32, 64)
    tensors = FORMATS[spec.format].pack(weight, spec)
    tensors["weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    assert FORMATS[spec.format].columns(tensors, spec) is None
    assert_same(FORMATS[spec.format].unpack(tensors, spec), weight)


@indexed
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g + 1, "puts 16 of 64 columns into group 1; expected groups 0 to 3 of 16 columns"),
        (lambda g: g * 0, "puts 64 of 64 columns into group 0"),
        (lambda g: g.clamp(max=2), "puts 32 of 64 columns into group 2"),
        (lambda g: g * 10**8, "into group 100000000"),
        (lambda g: torch.where(g == 0, -5, g), "into group -5"),
        (lambda g: g[:-1], "[63]"),
        (lambda g: g[None], "[1, 64]"),
        (lambda g: g.float(), "torch.float32"),
        (lambda g: g[0], "[]"),
    ],
    ids=["shifted", "zero", "unequal", "huge", "negative", "short", "matrix", "float", "scalar"],
)
def test_what_is_no_index_of_equal_groups_is_named(name: str, change: object, message: str) -> None:
    spec, tensors = shuffled(name)
    tensors[INDEX[name]] = change(tensors[INDEX[name]])  # type: ignore[operator]
    with pytest.raises(CheckpointError) as error:
        FORMATS[name].unpack(tensors, spec)
    assert INDEX[name] in str(error.value)
    assert message in str(error.value)
    if message != "[63]":  # alone it may be the index of a smaller layer
        with pytest.raises(CheckpointError):
            FORMATS[name].columns({INDEX[name]: tensors[INDEX[name]]}, spec)
