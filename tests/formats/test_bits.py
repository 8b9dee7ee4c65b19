"""The bit stream, against one that moves single bits."""

import pytest
import torch
from bits_reference import pack_bit_by_bit, signed, unpack_stream, unpack_three_bits_in_segments
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import SpecError
from llmq.formats.bits import pack, unpack

every_width = pytest.mark.parametrize("bits", range(1, 9))


def random_codes(bits: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


shapes = st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 4).map(lambda blocks: 32 * blocks))
seeds = st.integers(0, 2**16)


@every_width
@given(shape=shapes, seed=seeds)
def test_unpack_undoes_pack(bits: int, shape: tuple[int, ...], seed: int) -> None:
    codes = random_codes(bits, shape, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (*shape[:-1], shape[-1] * bits // 32)
    found = unpack(words, bits)
    assert found.dtype == torch.uint8
    assert torch.equal(found, codes)


@every_width
@given(seed=seeds, blocks=st.integers(1, 3))
def test_words_are_those_of_a_loop_over_bits(bits: int, seed: int, blocks: int) -> None:
    codes = random_codes(bits, (32 * blocks,), seed)
    words = pack(codes, bits).tolist()
    assert words == pack_bit_by_bit(codes.tolist(), bits)
    assert unpack_stream(words, bits) == codes.tolist()


@every_width
@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=2), seed=seeds)
def test_pack_undoes_unpack_on_any_words(bits: int, words: list[int], seed: int) -> None:
    stored = torch.tensor(words, dtype=torch.int32).repeat(bits)  # a whole number of 32 codes
    assert torch.equal(pack(unpack(stored, bits), bits), stored)


@every_width
def test_all_ones_are_all_bits(bits: int) -> None:
    full = torch.full((1, 32), 2**bits - 1, dtype=torch.uint8)
    assert pack(full, bits).tolist() == [[-1] * bits]
    assert unpack(torch.full((1, bits), -1, dtype=torch.int32), bits).tolist() == full.tolist()


def test_published_four_bit_words() -> None:
    # FORMATS 1: codes 0..7 in GPTQ order
    assert pack(torch.arange(32).to(torch.uint8) % 8, 4).tolist() == [0x76543210] * 4
    assert pack(torch.arange(32).to(torch.uint8) % 8 + 8, 4).tolist() == [signed(0xFEDCBA98)] * 4


def test_published_three_bit_words() -> None:
    codes = torch.arange(32).to(torch.uint8) % 8
    words = [signed(0x88FAC688), signed(0xC688FAC6), signed(0xFAC688FA)]
    assert pack(codes, 3).tolist() == words
    assert unpack(torch.tensor(words, dtype=torch.int32), 3).tolist() == codes.tolist()


@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3))
def test_three_bits_are_the_historic_three_segments(words: list[int]) -> None:
    found = unpack(torch.tensor(words, dtype=torch.int32), 3).tolist()
    assert found == unpack_three_bits_in_segments(words)


@every_width
@pytest.mark.parametrize("count", [1, 31, 33])
def test_incomplete_words_are_refused(bits: int, count: int) -> None:
    with pytest.raises(SpecError, match=f"{count} codes"):
        pack(torch.zeros(2, count, dtype=torch.uint8), bits)


@pytest.mark.parametrize("bits", range(1, 8))
def test_codes_that_are_too_wide_are_refused(bits: int) -> None:
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[7] = 2**bits
    with pytest.raises(SpecError, match=f"code {2**bits} "):
        pack(codes, bits)


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_that_hold_no_whole_codes_are_refused(bits: int) -> None:
    with pytest.raises(SpecError, match="whole number"):
        unpack(torch.zeros(bits + 1, dtype=torch.int32), bits)


@every_width
def test_strides_do_not_matter(bits: int) -> None:
    codes = random_codes(bits, (32, 64), 0)
    assert torch.equal(pack(codes.T, bits), pack(codes.T.contiguous(), bits))
    words = pack(codes, bits)
    assert torch.equal(unpack(words.T.contiguous().T, bits), codes)
