"""Laws of every packed format, and the layouts of the two GPTQ versions."""

import dataclasses

import pytest
import torch
from bits_reference import read_gptq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import CheckpointError, SpecError
from llmq.formats import FORMATS
from llmq.grids.uniform import UniformGrid
from llmq.types import QuantizedWeight, QuantSpec

every_format = pytest.mark.parametrize("name", FORMATS)
gptq_formats = pytest.mark.parametrize(("name", "version"), [("gptq", 1), ("gptq_v2", 2)])
STORED_BITS = (2, 3, 4, 8)


def random_weight(spec: QuantSpec, n: int, k: int, seed: int = 0, lowest_zero: int | None = None) -> QuantizedWeight:
    """Return a weight that uses every code and, unless symmetric, every zero from `lowest_zero` up.

    By default that is the lowest the format can store: 1 in version 1 of gptq, else 0.
    """
    draw = torch.Generator().manual_seed(seed)
    shape = (n, spec.groups(k))
    if lowest_zero is None:
        lowest_zero = 1 if spec.format == "gptq" else 0
    codes = torch.randint(0, 2**spec.bits, (n, k), generator=draw).to(torch.uint8)
    scales = (torch.rand(shape, generator=draw) + 0.5) * 2.0 ** torch.randint(-16, 15, shape, generator=draw)
    scales = (scales * torch.where(torch.rand(shape, generator=draw) < 0.5, -1, 1)).bfloat16().float()
    zeros = torch.randint(lowest_zero, 2**spec.bits, shape, generator=draw).float()
    if spec.symmetric:
        zeros = torch.full(shape, 2.0 ** (spec.bits - 1))
    grid = UniformGrid(spec.bits, spec.symmetric)
    return QuantizedWeight(codes, scales, zeros, grid, spec.group_columns(k))


@st.composite
def stored_layers(draw: st.DrawFn) -> tuple[int, int, int, bool, int, int]:
    """Return (bits, N, K, symmetric, group size, seed) that GPTQ-like formats take."""
    group_size = draw(st.sampled_from([32, 64, 128, 16, 48, 1, -1]))
    whole = {16: 32, 48: 96, 1: 32, -1: 32}.get(group_size, group_size)
    k = whole * draw(st.integers(1, 3))
    n = 32 * draw(st.integers(1, 3))
    return draw(st.sampled_from(STORED_BITS)), n, k, draw(st.booleans()), group_size, draw(st.integers(0, 999))


@every_format
@settings(max_examples=60)
@given(layer=stored_layers())
def test_unpack_undoes_pack(name: str, layer: tuple[int, int, int, bool, int, int]) -> None:
    bits, n, k, symmetric, group_size, seed = layer
    spec = QuantSpec(bits, group_size, symmetric, name)
    assert FORMATS[name].refuses(spec, n, k) is None
    weight = random_weight(spec, n, k, seed)
    tensors = FORMATS[name].pack(weight, spec)
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == FORMATS[name].layout(spec, n, k)
    assert all(t.is_contiguous() for t in tensors.values())
    found = FORMATS[name].unpack(tensors, spec)
    for field in dataclasses.fields(found):
        expected, actual = getattr(weight, field.name), getattr(found, field.name)
        if isinstance(expected, Tensor):
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected), field.name
        else:
            assert actual == expected, field.name
    assert torch.equal(found.dequantize(), weight.dequantize())


@every_format
@pytest.mark.parametrize("bits", STORED_BITS)
def test_config_says_what_is_stored(name: str, bits: int) -> None:
    for symmetric in (True, False):
        found = FORMATS[name].config(QuantSpec(bits, 64, symmetric, name))
        assert (found["bits"], found["group_size"], found["sym"]) == (bits, 64, symmetric)
        assert found["quant_method"] in name


@every_format
@pytest.mark.parametrize(
    ("spec", "n", "k", "reason"),
    [
        ((5, 32), 32, 32, "5"),
        ((1, 32), 32, 32, "1"),
        ((4, 32), 32, 48, "in_features 48"),
        ((4, 32), 40, 64, "out_features 40"),
        ((4, 128), 32, 192, "group_size 128 does not divide in_features 192"),
        ((4, 64), 32, 32, "group_size 64"),
    ],
    ids=["5-bit", "1-bit", "inputs", "outputs", "ragged-group", "group-beyond-row"],
)
def test_refusals_say_why(name: str, spec: tuple[int, int], n: int, k: int, reason: str) -> None:
    bits, group_size = spec
    refusal = FORMATS[name].refuses(QuantSpec(bits, group_size, True, name), n, k)
    assert refusal is not None
    assert reason in refusal


@every_format
@pytest.mark.parametrize("bits", STORED_BITS)
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_usual_layers_are_taken(name: str, bits: int, group_size: int) -> None:
    assert FORMATS[name].refuses(QuantSpec(bits, group_size, True, name), 96, 128) is None


# ----------------------------------------------------------------------------------------------------------------------


@gptq_formats
@pytest.mark.parametrize("bits", STORED_BITS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_gptq_tensors_read_one_code_at_a_time(name: str, version: int, bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits, 32, symmetric, name)
    weight = random_weight(spec, 64, 96, seed=bits)
    tensors = FORMATS[name].pack(weight, spec)
    codes, zeros, weights = read_gptq(tensors, bits, version)
    assert codes == weight.codes.tolist()
    assert zeros == weight.zeros.tolist()
    # 16 significant bits: exact in float32 as in Python's float
    assert weights == weight.dequantize().double().tolist()


@pytest.mark.parametrize(
    ("name", "bits", "word"),
    [
        ("gptq", 2, 0x55555555),
        ("gptq", 4, 0x77777777),
        ("gptq", 8, 0x7F7F7F7F),
        ("gptq_v2", 2, 0xAAAAAAAA),
        ("gptq_v2", 4, 0x88888888),
        ("gptq_v2", 8, 0x80808080),
    ],
    ids=str,
)
def test_symmetric_zeros_are_the_constants_that_readers_expect(name: str, bits: int, word: int) -> None:
    spec = QuantSpec(bits, 32, True, name)
    stored = FORMATS[name].pack(random_weight(spec, 32, 64), spec)["qzeros"]
    assert (stored.long() & 0xFFFFFFFF == word).all()


def test_three_bit_symmetric_zeros_are_three_in_version_1() -> None:
    spec = QuantSpec(3, 32, True, "gptq")
    stored = FORMATS["gptq"].pack(random_weight(spec, 32, 32), spec)["qzeros"]
    assert f"{sum((word % 2**32) << 32 * i for i, word in enumerate(stored[0].tolist())):096b}" == "011" * 32


@pytest.mark.parametrize("bits", STORED_BITS)
def test_the_versions_differ_in_their_zeros_alone(bits: int) -> None:
    old, new = QuantSpec(bits, 32, False, "gptq"), QuantSpec(bits, 32, False, "gptq_v2")
    weight = random_weight(old, 32, 64)
    a, b = FORMATS["gptq"].pack(weight, old), FORMATS["gptq_v2"].pack(weight, new)
    assert [key for key in a if not torch.equal(a[key], b[key])] == ["qzeros"]
    misread = FORMATS["gptq"].unpack(b, old)
    assert torch.equal(misread.zeros, weight.zeros + 1)


@pytest.mark.parametrize("bits", STORED_BITS)
def test_version_1_refuses_a_zero_of_zero_and_version_2_keeps_it(bits: int) -> None:
    old, new = QuantSpec(bits, 32, False, "gptq"), QuantSpec(bits, 32, False, "gptq_v2")
    weight = random_weight(new, 32, 64, lowest_zero=0)
    weight.zeros[17, 1] = 0
    with pytest.raises(SpecError, match=r"zero of 0.*gptq_v2"):
        FORMATS["gptq"].pack(weight, old)
    assert FORMATS["gptq_v2"].unpack(FORMATS["gptq_v2"].pack(weight, new), new).zeros[17, 1] == 0


@gptq_formats
@pytest.mark.parametrize("bits", STORED_BITS)
def test_zeros_that_do_not_fit_are_refused(name: str, version: int, bits: int) -> None:
    # version 1 goes up to 2^bits, which readers of it may meet; no format goes further
    spec = QuantSpec(bits, 32, False, name)
    weight = random_weight(spec, 32, 32)
    weight.zeros[3, 0] = 2**bits + (1 if version == 1 else 0)
    with pytest.raises(SpecError):
        FORMATS[name].pack(weight, spec)


@pytest.mark.parametrize("bits", STORED_BITS)
def test_version_1_reads_its_largest_field_as_one_past_the_last_code(bits: int) -> None:
    spec = QuantSpec(bits, 32, False, "gptq")
    tensors = FORMATS["gptq"].pack(random_weight(spec, 32, 32), spec)
    tensors["qzeros"].fill_(-1)
    assert (FORMATS["gptq"].unpack(tensors, spec).zeros == 2**bits).all()


@gptq_formats
@pytest.mark.parametrize("scale", [1 + 2.0**-11, 65536.0, 2.0**-26, float("nan")], ids=str)
def test_scales_that_float16_would_change_are_refused(name: str, version: int, scale: float) -> None:
    spec = QuantSpec(4, 32, True, name)
    weight = random_weight(spec, 32, 64)
    weight.scales[5, 1] = scale
    with pytest.raises(SpecError, match="float16"):
        FORMATS[name].pack(weight, spec)


@gptq_formats
@pytest.mark.parametrize("change", ["act-order", "shifted", "short"])
def test_groups_out_of_order_are_refused(name: str, version: int, change: str) -> None:
    spec = QuantSpec(4, 32, True, name)
    tensors = FORMATS[name].pack(random_weight(spec, 32, 64), spec)
    g_idx = tensors["g_idx"]
    assert g_idx.tolist() == [column // 32 for column in range(64)]
    changed = {"act-order": g_idx.flip(0), "shifted": g_idx + 1, "short": g_idx[:-1]}[change]
    with pytest.raises(CheckpointError, match="g_idx"):
        FORMATS[name].unpack(tensors | {"g_idx": changed}, spec)


@gptq_formats
def test_old_files_without_g_idx_are_read(name: str, version: int) -> None:
    spec = QuantSpec(4, 32, True, name)
    weight = random_weight(spec, 32, 64)
    tensors = FORMATS[name].pack(weight, spec)
    del tensors["g_idx"]
    assert torch.equal(FORMATS[name].unpack(tensors, spec).dequantize(), weight.dequantize())


@gptq_formats
def test_gptq_config_has_the_keys_of_all_readers(name: str, version: int) -> None:
    # FORMATS 1.1: older readers know checkpoint_format, newer ones format, vLLM requires desc_act and sym
    found = FORMATS[name].config(QuantSpec(4, -1, version == 1, name))
    assert found == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": -1,
        "desc_act": False,
        "sym": version == 1,
        "lm_head": False,
        "checkpoint_format": name,
        "format": name,
        "pack_dtype": "int32",
    }
