"""Packed words, against loops that move single bits."""

import pytest
import torch
from bits_reference import pack_bit_by_bit, pack_word_by_word, signed, unpack_stream, unpack_three_bits_in_segments
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import SpecError
from llmq.formats.bits import pack, unpack, word_count

every_width = pytest.mark.parametrize("bits", range(1, 9))
both = pytest.mark.parametrize("padded", [False, True], ids=["stream", "padded"])


def random_codes(bits: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


shapes = st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 100))
seeds = st.integers(0, 2**16)


@both
@every_width
@given(shape=shapes, seed=seeds)
def test_unpack_undoes_pack(bits: int, padded: bool, shape: tuple[int, ...], seed: int) -> None:
    codes = random_codes(bits, shape, seed)
    words = pack(codes, bits, padded=padded)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert words.shape == (*shape[:-1], word_count(shape[-1], bits, padded=padded))
    found = unpack(words, bits, shape[-1], padded=padded)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found, codes)


@every_width
@given(seed=seeds, count=st.integers(1, 100))
def test_words_are_those_of_a_loop_over_bits(bits: int, seed: int, count: int) -> None:
    codes = random_codes(bits, (count,), seed)
    words = pack(codes, bits).tolist()
    assert words == pack_bit_by_bit(codes.tolist(), bits)
    assert unpack_stream(words, bits)[:count] == codes.tolist()


@every_width
@given(seed=seeds, count=st.integers(1, 100))
def test_padded_words_are_those_of_a_loop_over_words(bits: int, seed: int, count: int) -> None:
    codes = random_codes(bits, (count,), seed)
    assert pack(codes, bits, padded=True).tolist() == pack_word_by_word(codes.tolist(), bits)


@every_width
@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=2), seed=seeds)
def test_pack_undoes_unpack_on_any_words(bits: int, words: list[int], seed: int) -> None:
    stored = torch.tensor(words, dtype=torch.int32).repeat(bits)  # a whole number of 32 codes
    assert torch.equal(pack(unpack(stored, bits, 32 * len(words)), bits), stored)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@given(count=st.integers(1, 100), seed=seeds)
def test_where_codes_fill_words_both_arrangements_are_one(bits: int, count: int, seed: int) -> None:
    codes = random_codes(bits, (3, count), seed)
    assert torch.equal(pack(codes, bits), pack(codes, bits, padded=True))


@every_width
def test_all_ones_are_all_bits(bits: int) -> None:
    full = torch.full((1, 32), 2**bits - 1, dtype=torch.uint8)
    assert pack(full, bits).tolist() == [[-1] * bits]
    assert unpack(torch.full((1, bits), -1, dtype=torch.int32), bits, 32).tolist() == full.tolist()


def test_published_four_bit_words() -> None:
    # FORMATS 1: codes 0..7 in GPTQ order
    assert pack(torch.arange(32).to(torch.uint8) % 8, 4).tolist() == [0x76543210] * 4
    assert pack(torch.arange(32).to(torch.uint8) % 8 + 8, 4).tolist() == [signed(0xFEDCBA98)] * 4


def test_published_three_bit_words() -> None:
    codes = torch.arange(32).to(torch.uint8) % 8
    words = [signed(0x88FAC688), signed(0xC688FAC6), signed(0xFAC688FA)]
    assert pack(codes, 3).tolist() == words
    assert unpack(torch.tensor(words, dtype=torch.int32), 3, 32).tolist() == codes.tolist()


@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3))
def test_three_bits_are_the_historic_three_segments(words: list[int]) -> None:
    found = unpack(torch.tensor(words, dtype=torch.int32), 3, 32).tolist()
    assert found == unpack_three_bits_in_segments(words)


@pytest.mark.parametrize("bits", range(1, 8))
def test_codes_that_are_too_wide_are_refused(bits: int) -> None:
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[7] = 2**bits
    with pytest.raises(SpecError, match=f"code {2**bits} "):
        pack(codes, bits)


@both
@every_width
@pytest.mark.parametrize("difference", [-1, 1])
def test_words_that_do_not_hold_so_many_codes_are_refused(bits: int, padded: bool, difference: int) -> None:
    words = torch.zeros(word_count(64, bits, padded=padded) + difference, dtype=torch.int32)
    with pytest.raises(SpecError, match=f"do not hold 64 codes of {bits} bits"):
        unpack(words, bits, 64, padded=padded)


@both
@every_width
def test_strides_do_not_matter(bits: int, padded: bool) -> None:
    codes = random_codes(bits, (32, 64), 0)
    words = pack(codes, bits, padded=padded)
    assert torch.equal(pack(codes.T.contiguous().T, bits, padded=padded), words)
    assert torch.equal(unpack(words.T.contiguous().T, bits, 64, padded=padded), codes)
