"""The layouts of the two GPTQ versions, and labels that do not fit."""

import pytest
import torch
from bits_reference import read_gptq
from format_cases import random_weight

from llmq.errors import CheckpointError, SpecError
from llmq.formats import FORMATS
from llmq.formats.gptq import mislabelled
from llmq.types import QuantSpec

versions = pytest.mark.parametrize(("name", "version"), [("gptq", 1), ("gptq_v2", 2)])
widths = pytest.mark.parametrize("bits", [2, 3, 4, 8])


@versions
@widths
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_tensors_read_one_code_at_a_time(name: str, version: int, bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits, 32, symmetric, name)
    weight = random_weight(spec, 64, 96, seed=bits)
    codes, zeros, weights = read_gptq(FORMATS[name].pack(weight, spec), bits, version)
    assert codes == weight.codes.tolist()
    assert zeros == weight.zeros.tolist()
    # 16 significant bits: exact in float32 as in Python's float
    assert weights == weight.dequantize().double().tolist()


@versions
@pytest.mark.parametrize(
    ("bits", "n", "k", "reason"),
    [(5, 32, 32, "5"), (4, 32, 48, "in_features 48"), (4, 40, 64, "out_features 40")],
    ids=["5-bit", "inputs", "outputs"],
)
def test_what_does_not_fill_words_is_refused(name: str, version: int, bits: int, n: int, k: int, reason: str) -> None:
    refusal = FORMATS[name].refuses(QuantSpec(bits, 16, True, name), n, k)
    assert refusal is not None
    assert reason in refusal


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


@widths
def test_the_versions_differ_in_their_zeros_alone(bits: int) -> None:
    old, new = QuantSpec(bits, 32, False, "gptq"), QuantSpec(bits, 32, False, "gptq_v2")
    weight = random_weight(old, 32, 64)
    a, b = FORMATS["gptq"].pack(weight, old), FORMATS["gptq_v2"].pack(weight, new)
    assert [key for key in a if not torch.equal(a[key], b[key])] == ["qzeros"]
    misread = FORMATS["gptq"].unpack(b, old)
    assert torch.equal(misread.zeros, weight.zeros + 1)


@widths
def test_version_1_refuses_a_zero_of_zero_and_version_2_keeps_it(bits: int) -> None:
    old, new = QuantSpec(bits, 32, False, "gptq"), QuantSpec(bits, 32, False, "gptq_v2")
    weight = random_weight(new, 32, 64, lowest_zero=0)
    weight.zeros[17, 1] = 0
    with pytest.raises(SpecError, match=r"zero of 0.*gptq_v2"):
        FORMATS["gptq"].pack(weight, old)
    assert FORMATS["gptq_v2"].unpack(FORMATS["gptq_v2"].pack(weight, new), new).zeros[17, 1] == 0


@widths
def test_version_1_keeps_its_largest_field_which_is_one_past_the_last_code(bits: int) -> None:
    spec = QuantSpec(bits, 32, False, "gptq")
    tensors = FORMATS["gptq"].pack(random_weight(spec, 32, 32), spec)
    tensors["qzeros"].fill_(-1)
    weight = FORMATS["gptq"].unpack(tensors, spec)
    assert (weight.zeros == 2**bits).all()
    assert (FORMATS["gptq"].pack(weight, spec)["qzeros"] == -1).all()


@versions
def test_a_last_group_that_is_short_is_read(name: str, version: int) -> None:
    spec, even = QuantSpec(4, 48, False, name), QuantSpec(4, 32, False, name)
    tensors = FORMATS[name].pack(random_weight(even, 32, 64), even)
    tensors["g_idx"] = torch.arange(64).int() // 48
    weight = FORMATS[name].unpack(tensors, spec)
    assert weight.dequantize().double().tolist() == read_gptq(tensors, 4, version)[2]


# ----------------------------------------------------------------------------------------------------------------------


@widths
@versions
def test_symmetric_zeros_of_the_other_version_are_named_and_not_read(name: str, version: int, bits: int) -> None:
    spec = QuantSpec(bits, 32, True, name)
    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[name]
    wrong = FORMATS[other].pack(random_weight(spec, 32, 64), QuantSpec(bits, 32, True, other))
    middle = 2 ** (bits - 1)
    own, seen = (middle - 1, middle) if version == 1 else (middle, middle - 1)
    message = (
        f"the label says {name}, whose symmetric zeros are stored as {own}, but all are {seen}, as {other} stores "
        f'them; set checkpoint_format and format to "{other}"'
        ", or packing_format to that of it where the label is auto-round"
    )
    assert mislabelled(wrong["qzeros"], spec) == message
    with pytest.raises(CheckpointError) as error:
        FORMATS[name].unpack(wrong, spec)
    assert str(error.value) == message
    # said to be asymmetric, the same constant is as telling, but may be meant: it is named, and read as labelled
    free = QuantSpec(bits, 32, False, name)
    assert mislabelled(wrong["qzeros"], free) == message
    assert (FORMATS[name].unpack(wrong, free).zeros == (middle + 1 if version == 1 else middle - 1)).all()


@widths
@versions
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_the_right_label_is_not_complained_of(name: str, version: int, bits: int, symmetric: bool) -> None:
    spec = QuantSpec(bits, 32, symmetric, name)
    for seed in range(3):
        assert mislabelled(FORMATS[name].pack(random_weight(spec, 32, 64, seed), spec)["qzeros"], spec) is None


@versions
def test_one_other_zero_makes_a_symmetric_label_wrong(name: str, version: int) -> None:
    free = QuantSpec(4, 32, False, name)
    weight = random_weight(QuantSpec(4, 32, True, name), 32, 64)
    weight.zeros[31, 1] = 9
    tensors = FORMATS[name].pack(weight, free)
    own = 8 - (version == 1)
    with pytest.raises(
        CheckpointError, match=f"zeros are stored as {own}, but they are {own} to {own + 1}; set sym to"
    ):
        FORMATS[name].unpack(tensors, QuantSpec(4, 32, True, name))
    assert mislabelled(tensors["qzeros"], free) is None


@versions
def test_asymmetric_zeros_that_begin_with_that_constant_are_no_sign(name: str, version: int) -> None:
    spec = QuantSpec(4, 32, False, name)
    weight = random_weight(spec, 32, 64, lowest_zero=9 if version == 1 else 7)
    assert mislabelled(FORMATS[name].pack(weight, spec)["qzeros"], spec) is None


@versions
def test_outputs_whose_zeros_fill_no_whole_words_are_named(name: str, version: int) -> None:
    tensors = FORMATS[name].pack(random_weight(QuantSpec(4, 32, True, name), 32, 64), QuantSpec(4, 32, True, name))
    tensors["qweight"], tensors["scales"] = (
        tensors["qweight"].repeat(1, 2)[:, :36],
        tensors["scales"].repeat(1, 2)[:, :36],
    )
    with pytest.raises(CheckpointError, match="36 columns, whose zeros of 4 bits fill no whole words"):
        FORMATS[name].unpack(tensors, QuantSpec(4, 32, True, name))
