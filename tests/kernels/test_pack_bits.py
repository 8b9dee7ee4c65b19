"""Packing kernels against `naive` and against PyTorch's text, byte for byte (TRITON_INTERPRET=0: on a GPU)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE
from torch import Tensor

from llmq.errors import SpecError
from llmq.formats import bits as bitstream
from llmq_kernels import naive, pack_bits

every_width = pytest.mark.parametrize("bits", range(1, 9))
both = pytest.mark.parametrize("padded", [False, True], ids=["stream", "padded"])


def random_codes(bits: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8).to(DEVICE)


@both
@every_width
@settings(max_examples=10)
@given(shape=st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 100)), seed=st.integers(0, 2**16))
def test_words_and_codes_are_those_of_naive_and_of_pytorch(
    bits: int, padded: bool, shape: tuple[int, ...], seed: int
) -> None:
    codes = random_codes(bits, shape, seed)
    count = bitstream.word_count(shape[-1], bits, padded=padded)
    words = pack_bits.pack(codes, bits, count, padded=padded)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert torch.equal(words, naive.pack_bits(codes, bits, count, padded))
    assert torch.equal(words.cpu(), bitstream.pack(codes.cpu(), bits, padded=padded))
    # bits that no code has are not looked at
    rubbish = words | (naive.pack_bits(torch.full_like(codes, 255), bits, count, padded) ^ -1)
    found = pack_bits.unpack(rubbish, bits, shape[-1], padded=padded)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found, codes)
    assert torch.equal(found, naive.unpack_bits(rubbish, bits, shape[-1], padded))


@pytest.mark.parametrize(
    ("bits", "padded", "rows", "count"),
    [(8, False, 1, 5000), (7, False, 3, 4997), (4, False, 1100, 3), (3, False, 1, 12000), (3, True, 2, 11000)],
)
def test_more_than_a_tile(bits: int, padded: bool, rows: int, count: int) -> None:
    codes = random_codes(bits, (rows, count), bits)
    words = pack_bits.pack(codes, bits, bitstream.word_count(count, bits, padded=padded), padded=padded)
    assert torch.equal(words.cpu(), bitstream.pack(codes.cpu(), bits, padded=padded))
    assert torch.equal(pack_bits.unpack(words, bits, count, padded=padded), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_operands_may_be_slices_and_transposed(bits: int) -> None:
    codes = random_codes(bits, (70, 50), 0)
    expected = naive.pack_bits(codes.T.contiguous(), bits, bitstream.word_count(70, bits), False)
    words = pack_bits.pack(codes.T, bits, expected.shape[1], padded=False)
    assert torch.equal(words, expected)
    by_columns = torch.full((words.shape[0] + 2, 2 * words.shape[1]), -1, dtype=torch.int32, device=DEVICE)
    by_columns[1:-1, ::2] = words
    assert torch.equal(pack_bits.unpack(by_columns[1:-1, ::2], bits, 70, padded=False), codes.T)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_nothing_is_packed_into_nothing(shape: tuple[int, ...]) -> None:
    codes = torch.empty(shape, dtype=torch.uint8, device=DEVICE)
    words = pack_bits.pack(codes, 3, bitstream.word_count(shape[-1], 3), padded=False)
    assert words.shape == (*shape[:-1], -(-shape[-1] * 3 // 32))
    assert pack_bits.unpack(words, 3, shape[-1], padded=False).shape == shape


def test_what_does_not_fit_is_refused() -> None:
    codes = random_codes(4, (2, 8), 0)
    with pytest.raises(ValueError, match=r"torch.int8 \[2, 8\]: needs torch.uint8"):
        pack_bits.pack(codes.char(), 4, 1, padded=False)
    with pytest.raises(ValueError, match=r"torch.uint8 \[2, 8\]: needs torch.int32"):
        pack_bits.unpack(codes, 4, 8, padded=False)
    with pytest.raises(ValueError, match=r"torch.uint8 \[\]: needs"):
        pack_bits.pack(codes[0, 0], 4, 1, padded=False)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"{bits} bits: needs 1 to 8"):
            pack_bits.pack(codes, bits, 1, padded=False)


def test_tiles_hold_as_many_entries_whatever_their_width() -> None:
    assert [pack_bits.tile(length, 1024) for length in (1, 2, 3, 1024, 5000)] == [
        (1024, 1),
        (512, 2),
        (256, 4),
        (1, 1024),
        (1, 1024),
    ]


def test_the_formats_go_through_the_kernels_where_triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(3, (5, 70), 0)
    words = bitstream.pack(codes.cpu(), 3).to(DEVICE)
    made: list[Tensor] = []

    def watched(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            made.append(kernel(*args, **options))
            return made[-1]

        return call

    for name in ("pack", "unpack"):
        monkeypatch.setattr(pack_bits, name, watched(getattr(pack_bits, name)))
    monkeypatch.setattr(bitstream, "runs_triton", lambda device: device == codes.device)
    found = bitstream.pack(codes, 3)
    assert found is made[0]
    assert torch.equal(found, words)
    back = bitstream.unpack(words, 3, 70)
    assert back is made[1]
    assert torch.equal(back, codes)
    with pytest.raises(SpecError, match="code 7 needs more than 2 bits"):
        bitstream.pack(torch.full_like(codes, 7), 2)
