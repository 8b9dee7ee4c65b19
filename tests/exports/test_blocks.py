"""Block types of GGUF against the gguf package's own reading of them, and against bytes put together by hand."""

from dataclasses import replace

import gguf
import pytest
import torch
from export_cases import dequantized, random_weight
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmq.errors import CheckpointError, SpecError
from llmq.exports import blocks
from llmq.types import QuantizedWeight

# where the float16 numbers of a block are
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_0": (0,), "Q4_K": (0, 2), "Q4_1": (0, 2), "Q5_0": (0,), "Q6_K": (208,)}
SIGNED = [name for name, block in blocks.BLOCKS.items() if not block.offset]


def theirs(name: str, raw: Tensor) -> Tensor:
    """Return what the gguf package makes of bytes."""
    return torch.from_numpy(gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name]))


def pack(name: str, weight: QuantizedWeight) -> Tensor:
    return torch.cat(list(blocks.pack(name, weight)))


def fitting(name: str, *, n: int = 3, superblocks: int = 2, seed: int = 0) -> QuantizedWeight:
    """Return a weight with all codes that blocks of this type hold, in the smallest groups that they allow."""
    block = blocks.BLOCKS[name]
    weight = random_weight(n, 256 * superblocks, block.bits, block.columns, symmetric=not block.offset, seed=seed)
    if name == "Q4_1":  # scales of four bits: all products with zeros are exact
        scales = (weight.scales * 2**20).round() % 15 + 1
        weight = replace(weight, scales=scales * 2.0**-12)
    return weight


@pytest.mark.parametrize("name", blocks.BLOCKS)
def test_numbers_and_sizes_are_those_of_the_gguf_package(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    assert (blocks.BLOCKS[name].columns, blocks.BLOCKS[name].nbytes) == gguf.GGML_QUANT_SIZES[kind]
    assert blocks.BLOCKS[name].number == kind.value


def test_smaller_types_come_first_and_the_last_holds_what_any_holds() -> None:
    sizes = [block.nbytes / block.columns for block in blocks.BLOCKS.values()]
    assert sizes == sorted(sizes)
    assert list(blocks.BLOCKS)[-1] == "Q8_0"
    assert all(blocks.refuses("Q8_0", fitting(name)) is None for name in blocks.BLOCKS)


@pytest.mark.parametrize("name", blocks.BLOCKS)
def test_any_bytes_are_read_as_the_gguf_package_reads_them(name: str) -> None:
    block = blocks.BLOCKS[name]
    raw = torch.randint(0, 256, (64, block.nbytes), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for at in HALVES.get(name, (0,)):
        raw[:, at + 1] &= 0xBF  # no infinities and NaN: their exponent is all ones
    q, scales, least = block.unpack(raw)
    steps = q.float() - (0 if block.offset else 2 ** (block.bits - 1))
    values = steps.reshape(64, scales.shape[1], -1) * scales[:, :, None] - least[:, :, None]
    assert torch.equal(values.reshape(64, -1), theirs(name, raw))


@given(
    st.sampled_from(list(blocks.BLOCKS)),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([32, 64, 128, 256, 512]),
    st.integers(0, 99),
)
def test_what_is_not_refused_is_held_exactly(name: str, bits: int, symmetric: bool, size: int, seed: int) -> None:
    weight = random_weight(2, 512, bits, size, symmetric=symmetric, seed=seed)
    if blocks.refuses(name, weight) is not None:
        with pytest.raises(SpecError, match=f"GGUF type {name} cannot hold the codes: "):
            pack(name, weight)
        return
    raw = pack(name, weight)
    assert torch.equal(theirs(name, raw), dequantized(weight))
    back = blocks.unpack(name, raw)
    assert torch.equal(back.dequantize(), dequantized(weight))


@pytest.mark.parametrize("name", blocks.BLOCKS)
def test_codes_come_back_as_they_were(name: str) -> None:
    weight = fitting(name)
    assert blocks.refuses(name, weight) is None
    back = blocks.unpack(name, pack(name, weight))
    assert torch.equal(back.codes, weight.codes)
    repeats = weight.group_size // back.group_size
    assert torch.equal(back.scales, weight.scales.repeat_interleave(repeats, dim=1))
    assert torch.equal(back.zeros, weight.zeros.repeat_interleave(repeats, dim=1))
    assert (back.grid.bits, back.grid.symmetric) == (blocks.BLOCKS[name].bits, weight.grid.symmetric)


def one_block(codes: Tensor, scale: float, zero: float, like: str) -> QuantizedWeight:
    weight = fitting(like, n=1, superblocks=1)
    columns = blocks.BLOCKS[like].columns
    one = torch.ones(1, 1)
    return replace(weight, codes=codes[None, :columns].to(torch.uint8), scales=one * scale, zeros=one * zero)


NIBBLES = "00112233445566778899aabbccddeeff"  # 16 bytes with the codes j and j + 16 of 4 bits, or j and j + 32


@pytest.mark.parametrize(
    ("name", "zero", "golden"),
    [
        # weight j has the code j (of its bits); the scale 1.5 is 0x3e00
        ("Q4_0", 8, "003e" + NIBBLES),
        ("Q4_1", 4, "003e" + "00c6" + NIBBLES),  # -6 is 0xc600
        ("Q5_0", 16, "003e" + "0000ffff" + NIBBLES),
        ("Q8_0", 128, "003e" + "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f"),
        ("Q2_K", 3, "31" * 16 + "0055aaff" * 16 + "003e" * 2),
        ("Q3_K", 4, "00000000ffffffff" * 4 + "0055aaff" * 16 + "11" * 8 + "aa" * 4 + "003e"),
        ("Q4_K", 5, "003e" * 2 + "01" * 4 + "05" * 4 + "51" * 4 + NIBBLES * 8),
        # a byte has the upper two bits of the weights j, j + 32, j + 64 and j + 96, whose codes are j % 64
        ("Q6_K", 32, NIBBLES * 8 + ("88" * 16 + "dd" * 16) * 2 + "01" * 16 + "003e"),
    ],
)
def test_golden_bytes(name: str, zero: int, golden: str) -> None:
    block = blocks.BLOCKS[name]
    codes = (torch.arange(block.columns) % 2**block.bits).to(torch.uint8)
    one = torch.ones(1, 1)
    weight = replace(fitting(name), codes=codes[None], scales=one * 1.5, zeros=one * zero)
    assert pack(name, weight).numpy().tobytes().hex() == golden


@pytest.mark.parametrize("name", SIGNED)
def test_the_difference_of_code_and_zero_counts_not_the_code(name: str) -> None:
    bits = blocks.BLOCKS[name].bits
    half = 2 ** (bits - 1)
    more = 5 if bits < 8 else 0  # codes of a grid with more bits, that uses a part of them
    codes = (torch.arange(256) % 2**bits + more).to(torch.uint8)[None]
    weight = replace(random_weight(1, 256, 8, 256, symmetric=False), codes=codes)
    for shift in (-1, 0, 1):
        reason = blocks.refuses(name, replace(weight, zeros=torch.full((1, 1), half + more + shift * 1.0)))
        seen = f"code - zero is {-half - shift} to {half - 1 - shift}, it holds {-half} to {half - 1}"
        assert reason == (seen if shift else None)


TORN = "a block of {} weights has one scale of 8 significant bits, groups have {} weights"
ROUNDED = "it stores {} in float16, and not all are exact there"
EXCEEDED = "codes are up to {} and zeros {} to {}, it holds 0 to {}"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("Q4_0", {"codes": torch.zeros(3, 48).byte()}, "a block has 32 weights, which do not divide in_features 48"),
        ("Q4_0", {"group_size": 48}, TORN.format(32, 48)),
        ("Q4_K", {"group_size": 128}, TORN.format(256, 128)),
        ("Q4_0", {"scales": torch.full((3, 16), 1 + 2.0**-11)}, ROUNDED.format("scales")),
        ("Q4_0", {"scales": torch.full((3, 16), 2.0**17)}, ROUNDED.format("scales")),
        ("Q8_0", {"scales": torch.full((3, 16), float("inf"))}, ROUNDED.format("scales")),
        ("Q8_0", {"scales": torch.full((3, 16), float("nan"))}, ROUNDED.format("scales")),
        (
            "Q4_1",
            {"scales": torch.full((3, 16), 255 / 128), "zeros": torch.full((3, 16), 15.0)},
            ROUNDED.format("zero * scale"),
        ),
        ("Q4_1", {"zeros": torch.full((3, 16), 16.0)}, EXCEEDED.format(15, 16, 16, 15)),
        ("Q4_1", {"zeros": torch.full((3, 16), -1.0)}, EXCEEDED.format(15, -1, -1, 15)),
        ("Q2_K", {"codes": torch.full((3, 512), 4).byte()}, EXCEEDED.format(4, 0, 3, 3)),
    ],
)
def test_refusals_say_what_is_seen_and_what_is_held(name: str, change: dict[str, Tensor], reason: str) -> None:
    assert blocks.refuses(name, replace(fitting(name), **change)) == reason


def test_every_group_counts() -> None:
    codes = (torch.arange(96) % 16).to(torch.uint8)[None]
    scales = torch.ones(1, 3)
    weight = replace(random_weight(1, 96, 4, 32, symmetric=False), codes=codes, scales=scales)
    for zeros, span in (([8, 8, 0], "-8 to 15"), ([8, 15, 8], "-15 to 7"), ([8, 8, 8], None)):
        reason = blocks.refuses("Q4_0", replace(weight, zeros=torch.tensor([zeros]).float()))
        assert reason == (span and f"code - zero is {span}, it holds -8 to 7")


def test_levels_that_are_not_equally_spaced_are_refused() -> None:
    weight = replace(fitting("Q4_0"), grid=object())
    assert blocks.refuses("Q4_0", weight) == "its levels are equally spaced, those of object are not"


def test_a_group_may_end_with_the_row() -> None:
    weight = random_weight(2, 96, 4, 64)  # 64 and 32
    assert torch.equal(theirs("Q4_0", pack("Q4_0", weight)), dequantized(weight))
    whole = random_weight(2, 256, 4, 300, symmetric=False)  # one group, longer than the row
    assert torch.equal(theirs("Q4_K", pack("Q4_K", whole)), dequantized(whole))


def test_large_weights_are_packed_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(5, 64, 4, 32)
    monkeypatch.setattr(blocks, "_PIECE", 2 * 64 + 1)
    parts = list(blocks.pack("Q4_0", weight))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(theirs("Q4_0", torch.cat(parts)), dequantized(weight))
    assert blocks.refuses("Q3_K", weight) is not None


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 2])
def test_numbers_that_are_not_finite_are_refused(number: float, at: int) -> None:
    raw = torch.zeros(1, 20, dtype=torch.uint8)
    raw[0, at : at + 2] = torch.tensor([number]).half().view(torch.uint8)
    with pytest.raises(CheckpointError, match="a scale that is not finite"):
        blocks.unpack("Q4_1", raw)


@pytest.mark.parametrize("least", [0.5, 2.0, -0.75, -16.0])  # above 0, between two levels, below the lowest
def test_least_values_that_are_no_zero_of_a_grid_are_refused(least: float) -> None:
    raw = torch.cat((torch.tensor([1.0, least]).half().view(torch.uint8), torch.zeros(16, dtype=torch.uint8)))[None]
    with pytest.raises(CheckpointError, match="Q4_1 blocks whose least value is not 0 to 15 steps below 0"):
        blocks.unpack("Q4_1", raw)


def test_a_block_of_zeros_is_read() -> None:
    for name in ("Q4_0", "Q4_1"):
        raw = torch.zeros(1, blocks.BLOCKS[name].nbytes, dtype=torch.uint8)
        assert torch.equal(blocks.unpack(name, raw).dequantize(), torch.zeros(1, 32))
