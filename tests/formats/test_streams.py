"""Stored tensors as streams for kernels, against unpacking them and packing them again."""

from collections.abc import Iterator

import pytest
import torch
from format_cases import bits_of, random_weight

from llmq.formats import FORMATS, streams
from llmq.formats.streams import Stream
from llmq.types import QuantSpec


def cases() -> Iterator[tuple[QuantSpec, int, int]]:
    for name in FORMATS:
        for bits in bits_of(name):
            for symmetric in (True, False):
                for group_size, n, k in ((32, 32, 64), (-1, 96, 32), (64, 64, 192)):
                    spec = QuantSpec(bits, group_size, symmetric, name)
                    if FORMATS[name].refuses(spec, n, k) is None:
                        yield spec, n, k


CASES = [pytest.param(*case, id=f"{case[0].format}-{case[0].bits}-{case[0].symmetric}-{case[1:]}") for case in cases()]


def assert_same(found: Stream, expected: Stream) -> None:
    assert found.words.dtype == torch.int32
    assert torch.equal(found.words, expected.words)
    assert found.words.is_contiguous()
    assert torch.equal(found.scales.float(), expected.scales.float())
    assert (found.zeros is None) == (expected.zeros is None)
    if found.zeros is not None and expected.zeros is not None:
        assert found.zeros.dtype == expected.zeros.dtype
        assert torch.equal(found.zeros, expected.zeros)


@pytest.mark.parametrize(("spec", "n", "k"), CASES)
def test_the_stream_of_stored_tensors_is_that_of_the_weight(spec: QuantSpec, n: int, k: int) -> None:
    weights = [random_weight(spec, n, k, seed) for seed in range(3)]
    stored = [FORMATS[spec.format].pack(weight, spec) for weight in weights]
    expected = [streams.of(weight, spec.bits, symmetric=spec.symmetric) for weight in weights]
    plain = spec.format != "compressed-tensors-padded" or 32 % spec.bits == 0
    for tensors, wanted in zip(stored, expected, strict=True):
        found = streams.from_stored(tensors, spec, k)
        assert (found is not None) == plain
        if found is not None:
            assert_same(found, wanted)
    together = streams.from_stored({name: torch.stack([x[name] for x in stored]) for name in stored[0]}, spec, k)
    assert (together is not None) == plain
    if together is not None:
        for number, wanted in enumerate(expected):
            assert_same(Stream(*(None if part is None else part[number] for part in together)), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_zeros_of_another_version_are_not_plain(name: str, bits: int) -> None:
    spec = QuantSpec(bits, 32, True, name)
    other = QuantSpec(bits, 32, True, {"gptq": "gptq_v2", "gptq_v2": "gptq"}[name])
    tensors = FORMATS[name].pack(random_weight(other, 32, 64), other)
    assert streams.from_stored(tensors, spec, 64) is None
    one = FORMATS[name].pack(random_weight(spec, 32, 64), spec)
    one["qzeros"][-1, -1] ^= 1
    assert streams.from_stored(one, spec, 64) is None


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_columns_out_of_order_are_not_plain(name: str) -> None:
    spec = QuantSpec(4, 32, True, name)
    columns = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    tensors = FORMATS[name].pack(random_weight(spec, 32, 64), spec, columns)
    assert streams.from_stored(tensors, spec, 64) is None


def test_a_symmetric_label_of_awq_over_other_zeros_is_not_plain() -> None:
    spec = QuantSpec(4, 32, False, "awq")
    tensors = FORMATS["awq"].pack(random_weight(spec, 32, 64), spec)
    assert streams.from_stored(tensors, QuantSpec(4, 32, True, "awq"), 64) is None


def test_zeros_up_to_256_of_version_1_keep_their_value() -> None:
    spec = QuantSpec(8, 32, False, "gptq")
    tensors = FORMATS["gptq"].pack(random_weight(spec, 32, 64), spec)
    tensors["qzeros"].fill_(-1)  # 255, stored for 256
    found = streams.from_stored(tensors, spec, 64)
    assert found is not None
    assert found.zeros is not None
    assert bool((found.zeros == 256).all())
