"""Our own layout: its bytes by hand, what no other format holds, and what a reader must not misread."""

import json

import pytest
import torch
from format_cases import assert_same, random_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.errors import CheckpointError, SpecError
from llmq.formats import FORMATS
from llmq.formats.stored import header_of
from llmq.grids.uniform import UniformGrid
from llmq.types import QuantizedWeight, QuantSpec


def spec_of(bits: int = 4, group_size: int = 2, symmetric: bool = False, name: str = "llmq") -> QuantSpec:
    return QuantSpec(bits, group_size, symmetric, name)


def weight_of(codes: list[list[int]], bits: int, zeros: list[list[float]], group_size: int) -> QuantizedWeight:
    scales = torch.full((len(codes), len(zeros[0])), 0.5)
    grid = UniformGrid(bits, symmetric=False)
    return QuantizedWeight(torch.tensor(codes, dtype=torch.uint8), scales, torch.tensor(zeros), grid, group_size)


# codes, bits, the bytes of each row worked out by hand: code j from bit bits·j of the row on, low bits first
BYTES = [
    (2, [[0, 1, 2, 3, 3]], [[0b11_10_01_00, 0b11]]),
    (3, [[1, 2, 3, 4, 5, 6, 7, 1, 2]], [[0b11_010_001, 0b0_101_100_0, 0b001_111_11, 0b010]]),
    (4, [[1, 2, 3], [4, 5, 15]], [[0x21, 0x03], [0x54, 0x0F]]),
    (5, [[1, 2, 31]], [[0b010_00001, 0b0_11111_00]]),
    (6, [[1, 2, 3, 63, 32]], [[0b10_000001, 0b0011_0000, 0b111111_00, 0b100000]]),
    (7, [[1, 64, 127]], [[0b0_0000001, 0b11_100000, 0b0_0011111]]),
    (8, [[0, 128, 255], [1, 2, 3]], [[0, 128, 255], [1, 2, 3]]),
]


@pytest.mark.parametrize(("bits", "codes", "expected"), BYTES, ids=lambda value: str(value)[:6])
def test_codes_are_a_stream_whose_rows_begin_bytes(
    bits: int, codes: list[list[int]], expected: list[list[int]]
) -> None:
    groups = -(-len(codes[0]) // 2)
    weight = weight_of(codes, bits, [[1.0] * groups] * len(codes), 2)
    tensors = FORMATS["llmq"].pack(weight, spec_of(bits))
    assert tensors["codes"].tolist() == expected
    assert tensors["shape"].tolist() == [len(codes), len(codes[0])]
    assert tensors["zeros"].tolist() == [[1] * groups] * len(codes)
    assert tensors["zeros"].dtype == (torch.int16 if bits == 8 else torch.uint8)
    assert tensors["scales"].tolist() == [[0.5] * groups] * len(codes)
    assert FORMATS["llmq"].unpack(tensors, spec_of(bits)).codes.tolist() == codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_above_the_largest_code_is_held(bits: int) -> None:
    # readers of version 1 of gptq make it of the largest stored field
    weight = weight_of([[0, 1, 2, 3]], bits, [[2.0**bits, 0.0]], 2)
    there = FORMATS["llmq"].unpack(FORMATS["llmq"].pack(weight, spec_of(bits)), spec_of(bits))
    assert there.zeros.tolist() == [[2.0**bits, 0.0]]
    old = spec_of(bits, 32, name="gptq")
    wide = random_weight(old, 32, 64)
    wide.zeros[3, 1] = 2.0**bits
    one = FORMATS["gptq"].unpack(FORMATS["gptq"].pack(wide, old), old)
    ours = spec_of(bits, 32)
    assert_same(FORMATS["llmq"].unpack(FORMATS["llmq"].pack(one, ours), ours), wide)


@settings(max_examples=60)
@given(
    bits=st.integers(2, 8),
    n=st.integers(1, 9),
    k=st.integers(1, 70),
    group_size=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_any_size_and_group(bits: int, n: int, k: int, group_size: int, seed: int) -> None:
    for symmetric in (True, False):
        spec = spec_of(bits, group_size, symmetric)
        assert FORMATS["llmq"].refuses(spec, n, k) is None
        tensors = FORMATS["llmq"].pack(random_weight(spec, n, k, seed), spec)
        found = FORMATS["llmq"].recognize(spec, header_of(tensors), tensors.__getitem__)
        assert (found.out_features, found.in_features) == (n, k)
        weight = FORMATS["llmq"].unpack(tensors, spec)
        assert torch.equal(weight.codes, random_weight(spec, n, k, seed).codes)
        assert weight.group_size == min(group_size, k)


@pytest.mark.parametrize("foreign", ["gptq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_act_order_of_others_goes_there_and_back(foreign: str, bits: int) -> None:
    spec, ours = spec_of(bits, 16, name=foreign), spec_of(bits, 16)
    tensors = FORMATS[foreign].pack(random_weight(spec, 32, 64), spec)
    local = str(FORMATS[foreign].index)
    tensors[local] = (torch.arange(64) // 16)[torch.randperm(64, generator=torch.Generator().manual_seed(bits))].int()
    weight, order = FORMATS[foreign].unpack(tensors, spec), FORMATS[foreign].columns(tensors, spec)
    assert order is not None
    held = FORMATS["llmq"].pack(weight, ours, order)
    found = FORMATS["llmq"].recognize(ours, header_of(held), held.__getitem__)
    assert found.layout == header_of(held)
    assert_same(FORMATS["llmq"].unpack(held, ours), weight)
    again = FORMATS["llmq"].columns(held, ours)
    assert again is not None
    assert torch.equal(again, order)
    # the weight of each input is the one that the foreign file gives it
    foreign_dense = weight.dequantize()[:, order.argsort()]
    assert torch.equal(
        FORMATS["llmq"].unpack(held, ours).dequantize()[:, held["permutation"].long().argsort()], foreign_dense
    )
    back = FORMATS[foreign].pack(FORMATS["llmq"].unpack(held, ours), spec, again)
    assert header_of(back) == header_of(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.flip(0), "does not rise within a group"),
        (lambda c: torch.where(c == 3, 4, c), "not each of 0 to 7 once"),
        (lambda c: c + 1, "permutation has 1 to 8, not each of 0 to 7"),
        (lambda c: c - 1, "permutation has -1 to 6"),
        (lambda c: c[:-1], "[7]"),
        (lambda c: c[None], "[1, 8]"),
        (lambda c: c.float(), "float32"),
    ],
    ids=["falling", "twice", "shifted", "negative", "short", "matrix", "float"],
)
def test_columns_that_are_no_order_are_refused(change: object, message: str) -> None:
    spec = spec_of(4, 4)
    tensors = FORMATS["llmq"].pack(random_weight(spec, 3, 8), spec, torch.tensor([0, 2, 5, 7, 1, 3, 4, 6]))
    FORMATS["llmq"].unpack(tensors, spec)
    tensors["permutation"] = change(tensors["permutation"])  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="permutation") as error:
        FORMATS["llmq"].unpack(tensors, spec)
    assert message in str(error.value)


@pytest.mark.parametrize("shape", [[3, 9], [4, 8], [3, 0], [3, -8], [3, 2**62], [8, 3], [0, 0]])
def test_a_shape_that_lies_is_refused(shape: list[int]) -> None:
    spec = spec_of(4, 4)
    tensors = FORMATS["llmq"].pack(random_weight(spec, 3, 8), spec)
    with pytest.raises(CheckpointError, match="as shape says"):
        FORMATS["llmq"].unpack(tensors | {"shape": torch.tensor(shape)}, spec)


def test_zeros_and_symmetry_have_to_agree() -> None:
    weight = random_weight(spec_of(4, 4), 3, 8)
    tensors = FORMATS["llmq"].pack(weight, spec_of(4, 4))
    with pytest.raises(CheckpointError, match=r"zeros is there, but config\.json says symmetric"):
        FORMATS["llmq"].unpack(tensors, spec_of(4, 4, symmetric=True))
    with pytest.raises(CheckpointError, match="zeros are 0 to 17; uniform codes of 4 bits have 0 to 16"):
        FORMATS["llmq"].unpack(tensors | {"zeros": torch.tensor([[0, 17]] * 3, dtype=torch.uint8)}, spec_of(4, 4))
    eight = FORMATS["llmq"].pack(random_weight(spec_of(8, 4), 3, 8), spec_of(8, 4))
    with pytest.raises(CheckpointError, match="zeros are -1 to 0"):
        FORMATS["llmq"].unpack(eight | {"zeros": torch.tensor([[0, -1]] * 3, dtype=torch.int16)}, spec_of(8, 4))


MODULES = [f"model.layers.{i}.{part}" for i in range(3) for part in ("q_proj", "down_proj")] + ["model.embed_tokens"]


def mixed() -> dict[str, QuantSpec]:
    found = {name: spec_of(8 if name.endswith("down_proj") else 3, 32, "1" in name) for name in MODULES}
    return found | {"model.embed_tokens": spec_of(8, -1, True)}


def test_several_schemes_are_read_as_they_were_written() -> None:
    found = FORMATS["llmq"].config(mixed(), ["lm_head"])
    assert FORMATS["llmq"].specs(found, MODULES) == mixed()
    assert FORMATS["llmq"].specs(json.loads(json.dumps(found)), MODULES[::-1]) == mixed()
    one = FORMATS["llmq"].config(dict.fromkeys(MODULES, spec_of()), [])
    scheme = {"grid": "uniform", "bits": 4, "group_size": 2, "symmetric": False}
    assert one == {"quant_method": "llmq", "version": 1, "schemes": [scheme]}


@pytest.mark.parametrize(
    ("top", "scheme", "message"),
    [
        ({"version": 2}, {}, "version is 2, this llmq reads up to 1; this folder needs a newer llmq"),
        ({"rotation": "hadamard"}, {}, "'rotation' is unknown to this llmq; this folder needs a newer llmq"),
        ({}, {"grid": "spiral"}, "grid is 'spiral', this llmq reads"),
        ({}, {"grid": "nf4", "symmetric": False}, "symmetric is False, the nf4 grid is not"),
        ({}, {"grid": "nf4", "bits": 3}, "bits is 3; llmq reads 4 of the nf4 grid"),
        ({}, {"levels": "row"}, "schemes: 'levels' is unknown to this llmq; this folder needs a newer llmq"),
        ({"version": None}, {}, "version is None; llmq reads 1"),
        ({"version": 0}, {}, "version is 0; llmq reads 1"),
        ({"version": True}, {}, "version is True"),
        ({"version": "1"}, {}, "version is '1'"),
        ({"schemes": []}, {}, "schemes is []; llmq reads a list of objects"),
        ({"schemes": [3]}, {}, "schemes is [3]"),
        ({}, {"grid": None}, "has no grid"),
        ({}, {"bits": 1}, "bits is 1; llmq reads 2, 3, 4, 5, 6, 7, 8 of the uniform grid"),
        ({}, {"bits": None}, "bits is None"),
        ({}, {"group_size": None}, "has no group_size"),
        ({}, {"group_size": 0}, "group_size is 0"),
        ({}, {"symmetric": None}, "has no symmetric"),
        ({}, {"modules": "q_proj"}, "modules of a scheme are 'q_proj'"),
        ({}, {"modules": ["(a+)+"]}, "schemes has '(a+)+'"),
        ({}, {"modules": ["^other$"]}, "model.q_proj is packed, but the modules of no scheme name it"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_it_does_not_know_is_refused(top: dict[str, object], scheme: dict[str, object], message: str) -> None:
    config = FORMATS["llmq"].config({"model.q_proj": spec_of()}, [])
    [known] = config["schemes"]  # type: ignore[misc]
    config = {**config, "schemes": [{**known, **scheme}], **top}  # type: ignore[dict-item]
    with pytest.raises(CheckpointError) as error:
        FORMATS["llmq"].specs(config, ["model.q_proj"])
    assert message in str(error.value)


def test_of_several_schemes_each_names_its_modules() -> None:
    config = FORMATS["llmq"].config(mixed(), [])
    for scheme in config["schemes"]:  # type: ignore[attr-defined]
        del scheme["modules"]
        break
    with pytest.raises(CheckpointError, match="modules of a scheme are None"):
        FORMATS["llmq"].specs(config, MODULES)


def test_notes_on_how_it_was_made_do_not_matter() -> None:
    config = FORMATS["llmq"].config({"a": spec_of()}, []) | {"meta": {"anything": [1]}}
    assert FORMATS["llmq"].specs(config, ["a"]) == {"a": spec_of()}


def test_zeros_are_whole() -> None:
    for zeros in ([[0.5, 1.0]], [[-1.0, 1.0]], [[17.0, 1.0]]):
        with pytest.raises(SpecError, match="stores whole numbers from 0 to 16 of the uniform grid at 4 bits"):
            FORMATS["llmq"].pack(weight_of([[0, 1, 2, 3]], 4, zeros, 2), spec_of())
