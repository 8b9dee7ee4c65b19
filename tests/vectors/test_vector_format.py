"""Codebooks in files: the bytes, the way back, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_cases import ALL, packed_weight, spec_of

from llmq.errors import CheckpointError, SpecError
from llmq.formats import FORMATS, llmq_layout, streams
from llmq.grids import make_grid
from llmq.grids.vq import VectorGrid, VectorWeight
from llmq.types import Affine
from llmq.weights import chosen, of_parts, parts_of, select_rows, stacked


@settings(max_examples=50)
@given(st.sampled_from(ALL), st.integers(1, 9), st.integers(1, 40), st.sampled_from([-1, 1, 3]), st.integers(0, 99))
def test_what_is_packed_is_unpacked(grid: VectorGrid, n: int, k: int, groups: int, seed: int) -> None:
    size = -1 if groups == -1 else groups * grid.columns
    weight, spec = packed_weight(grid, n, k, size, seed), spec_of(grid, size)
    tensors = llmq_layout.pack(weight, spec)
    layout = llmq_layout.layout(spec, n, k)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == layout
    found = llmq_layout.unpack(tensors, spec)
    assert isinstance(found, VectorWeight)
    same = replace(weight, group_size=min(weight.group_size, k))
    assert (found.grid, found.group_size, found.in_features) == (same.grid, same.group_size, k)
    assert all(torch.equal(part, parts_of(weight)[name]) for name, part in parts_of(found).items())
    assert torch.equal(found.dequantize(), weight.dequantize())
    stream = streams.from_stored(tensors, spec, k)
    assert stream is not None
    other = streams.of(weight, grid.bits, symmetric=True)
    assert all(
        torch.equal(a.to(b.dtype), b) for a, b in zip(stream, other, strict=True) if a is not None and b is not None
    )


def test_these_are_the_bytes() -> None:
    """Codes of 4 bits, five to a row: 1, 2, 3, 4, 5 are the bytes 21 43 05."""
    codes = torch.tensor([[1, 2, 3, 4, 5], [15, 0, 15, 0, 15]], dtype=torch.uint8)
    book = torch.arange(-16, 16).float().view(16, 2)
    scales = torch.tensor([[0.5], [2.0]])
    weight = VectorWeight(codes, scales, torch.zeros(2, 1), VectorGrid(2, 2), 9, codebook=book, in_features=9)
    found = llmq_layout.pack(weight, spec_of(VectorGrid(2, 2)))
    assert found["shape"].tolist() == [2, 9]
    assert found["codes"].tolist() == [[0x21, 0x43, 0x05], [0x0F, 0x0F, 0x0F]]
    assert found["codebook"].flatten().tolist() == list(range(-16, 16))
    assert found["codebook"].dtype == torch.int8
    assert found["scales"].tolist() == [[0.5], [2.0]]
    assert weight.dequantize()[0].tolist() == [-7, -6.5, -6, -5.5, -5, -4.5, -4, -3.5, -3]


def test_the_configuration_says_which() -> None:
    specs = {"a.x": spec_of(VectorGrid(2, 4)), "a.y": spec_of(VectorGrid(1, 8), 16)}
    config = llmq_layout.config(specs, [])
    assert config["schemes"][0]["grid"] == "vq4"  # type: ignore[index]
    assert llmq_layout.specs(config, list(specs)) == specs


def test_every_other_format_refuses() -> None:
    for name, format in FORMATS.items():
        if format is not llmq_layout:
            spec = replace(spec_of(VectorGrid(1, 4)), format=name)
            assert "vq4" in str(format.refuses(spec, 32, 32)), name


def broken(tensors: dict[str, torch.Tensor], name: str, value: Any) -> dict[str, torch.Tensor]:
    return {key: t for key, t in tensors.items() if key != name} if value is None else tensors | {name: value}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shape", None),
        ("codes", None),
        ("codebook", None),
        ("scales", None),
        ("shape", torch.tensor([4, 16], dtype=torch.int32)),
        ("shape", torch.tensor([4, 25])),
        ("shape", torch.tensor([5, 16])),
        ("shape", torch.tensor([4, 0])),
        ("shape", torch.tensor([4, -16])),
        ("codes", torch.zeros(4, 9, dtype=torch.uint8)),
        ("codes", torch.zeros(4, 4, dtype=torch.int32)),
        ("codebook", torch.zeros(255, 4, dtype=torch.int8)),
        ("codebook", torch.zeros(256, 4)),
        ("codebook", torch.full((256, 4), -128, dtype=torch.int8)),
        ("scales", torch.ones(4, 2, dtype=torch.float16)),
        ("scales", torch.ones(4, 1, dtype=torch.int32)),
        ("zeros", torch.ones(4, 1, dtype=torch.uint8)),
        ("levels", torch.ones(1, 4)),
        ("permutation", torch.arange(16, dtype=torch.int32)),
    ],
    ids=str,
)
def test_damaged_layers_are_refused(name: str, value: Any) -> None:
    grid = VectorGrid(2, 4)
    tensors = llmq_layout.pack(packed_weight(grid, 4, 16), spec_of(grid))
    with pytest.raises(CheckpointError, match=name if name != "shape" else r"shape|codes|columns|scales"):
        llmq_layout.unpack(broken(tensors, name, value), spec_of(grid))


def test_a_codebook_of_others_is_no_plain_stream() -> None:
    tensors = llmq_layout.pack(packed_weight(VectorGrid(2, 4), 4, 16), spec_of(VectorGrid(2, 4)))
    tensors["codebook"][3, 1] = -128
    assert streams.from_stored(tensors, spec_of(VectorGrid(2, 4)), 16) is None


def test_weights_that_do_not_fit_are_refused() -> None:
    grid = VectorGrid(2, 4)
    weight = packed_weight(grid, 4, 16)
    with pytest.raises(SpecError, match="stored as vq4"):
        llmq_layout.pack(packed_weight(VectorGrid(1, 4), 4, 16), spec_of(grid))
    with pytest.raises(SpecError, match="whole number"):
        llmq_layout.pack(replace(weight, codebook=weight.codebook + 0.5), spec_of(grid))
    with pytest.raises(SpecError, match="whole number"):
        llmq_layout.pack(replace(weight, codebook=weight.codebook * 2), spec_of(grid))
    with pytest.raises(SpecError, match="not exact"):
        llmq_layout.pack(replace(weight, scales=weight.scales * 1.0001), spec_of(grid))
    with pytest.raises(SpecError, match="out of order"):
        llmq_layout.pack(weight, spec_of(grid), torch.arange(16))
    assert "multiple" in str(llmq_layout.refuses(spec_of(grid, 6), 4, 16))
    assert llmq_layout.refuses(spec_of(grid, 6), 4, 5) is None  # one group
    assert "not 3" in str(llmq_layout.refuses(replace(spec_of(grid), bits=3), 4, 16))


def test_bits_that_no_code_has_are_refused() -> None:
    for name, bits in (("vq2", 5), ("vq4", 3), ("vq8", 2), ("vq4", 0)):
        with pytest.raises(SpecError, match=f"{name} grid: bits is {bits}"):
            make_grid(name, bits, True)
    with pytest.raises(SpecError, match="--sym"):
        make_grid("vq4", 2, False)


def test_single_weights_have_no_place_on_it() -> None:
    grid, w = make_grid("vq4", 2, True), torch.ones(2, 4)
    at = Affine(w[:, :1], w[:, :1])
    for call in (lambda: grid.fit(w), lambda: grid.encode(w, at), lambda: grid.decode(w, at), lambda: grid.storable(w)):
        with pytest.raises(SpecError, match="vectors"):
            call()
    assert grid.adapted(w) is grid
    assert (grid.name, grid.symmetric, grid.zeros, grid.tables, grid.learns) == ("vq4", True, (0, 0), None, False)


def test_rows_of_one_codebook_are_joined_and_divided() -> None:
    grid = VectorGrid(2, 4)
    whole = packed_weight(grid, 6, 10)
    parts = [select_rows(whole, slice(0, 2)), select_rows(whole, torch.tensor([2, 3, 4, 5]))]
    assert torch.equal(stacked(parts).dequantize(), whole.dequantize())
    other = packed_weight(grid, 6, 10, seed=1)
    assert chosen(torch.ones(6, dtype=torch.bool), whole, other) is whole
    assert chosen(torch.zeros(6, dtype=torch.bool), whole, other) is other
    with pytest.raises(AssertionError):
        stacked([whole, other])
    with pytest.raises(AssertionError):
        chosen(torch.arange(6) > 2, whole, other)


def test_parts_make_the_weight_again() -> None:
    whole = packed_weight(VectorGrid(1, 8), 3, 20, 16)
    again = of_parts(parts_of(whole), whole.grid, 16, 20)
    assert isinstance(again, VectorWeight)
    assert torch.equal(again.dequantize(), whole.dequantize())
