"""The Triton kernels for tables of levels against `naive`, in the interpreter (or on a GPU)."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, random_x
from lut_cases import KINDS, Lut, random_lut
from tolerance import assert_close_to_float64
from torch import Tensor

from llmq_kernels import lut, many, tables
from llmq_kernels.lut_tiles import store_tile
from llmq_kernels.tables import Few, Table, Tile

pytestmark = pytest.mark.usefixtures("poisoned_empty")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Groups of half a chunk, one, several, and one per row; columns that end inside a chunk. A quarter: below.
COLUMNS = [(128, 32), (96, 32), (192, 64), (288, 96), (256, 128), (80, 80), (199, 199), (1, 1)]


@dataclass(frozen=True)
class Case:
    """What is multiplied."""

    dtype: torch.dtype
    bits: int
    kind: str
    m: int
    n: int
    k: int
    group_size: int
    bias: bool
    splits: int

    def weight(self) -> tuple[Lut, lut.Weight, Tensor | None]:
        w = random_lut(self.n, self.k, self.bits, self.group_size, self.kind)
        bias = torch.randn(self.n, generator=torch.Generator().manual_seed(self.n)).to(DEVICE, self.dtype)
        return w, packed(w, self.dtype), bias if self.bias else None


def cases(count: int, largest_m: int) -> list[Case]:
    """Return seeded cases of all bits, kinds and columns."""
    draw = random.Random(7)
    return [
        Case(
            DTYPES[i // 2 % 3],
            1 + i % 8,
            KINDS[i // 3 % 3],
            draw.randint(1, largest_m),
            draw.randint(1, 70),
            *COLUMNS[5 * i // 4 % len(COLUMNS)],
            bias=draw.random() < 0.7,
            splits=draw.randint(1, 2),
        )
        for i in range(count)
    ]


def packed(w: Lut, dtype: torch.dtype) -> lut.Weight:
    """Return the weight as kernels take it, with NaN where rows are padded: they are nobody's business."""
    n, k = w.codes.shape
    on = (None if t is None else t.to(DEVICE) for t in (w.codes, w.scales, w.table, w.picked))
    codes, scales, table, picked = on
    assert codes is not None
    assert table is not None
    found = lut.pack(codes, scales, table, picked, w.bits, w.group_size, dtype)
    if found.scales is not None:
        found.scales[:, n:] = torch.nan
    if found.own:
        found.table.view(-1, len(found.weight), found.table.shape[1])[:, n:] = torch.nan
    return lut.Weight(found, n, k, w.bits, w.group_size)


def strided(x: Tensor) -> Tensor:
    """Return `x` as the rows of a wider tensor, with NaN behind and between them."""
    wide = torch.full((2 * len(x), x.shape[1] + 67), torch.nan, dtype=x.dtype, device=x.device)
    wide[::2, : x.shape[1]] = x
    return wide[::2, : x.shape[1]]


def check(y: Tensor, w: Lut, x: Tensor, bias: Tensor | None) -> None:
    assert y.dtype == x.dtype
    cpu = (None if bias is None else bias.cpu(), len(w.codes[0]))
    assert_close_to_float64(y.cpu(), w.product(x.cpu(), cpu[0]), cpu[1])


@pytest.mark.parametrize("case", cases(24, 4), ids=str)
def test_a_few_tokens_are_naive(case: Case) -> None:
    w, weight, bias = case.weight()
    x = strided(random_x(case.m, case.k, case.dtype))
    check(lut.few(x, weight, bias, Few(4, 16 << case.n % 3, 1 + case.n % 2), case.splits), w, x, bias)


@pytest.mark.parametrize("case", cases(24, 40), ids=str)
def test_tiles_are_naive(case: Case) -> None:
    w, weight, bias = case.weight()
    x = strided(random_x(case.m, case.k, case.dtype))
    for post_scale in (True, False):
        # Scaling weights rounds them to 16 bits, which is in the bound for products of 16 bits.
        row = Tile(512, 16 << case.m % 2, 64, 4, 3, post_scale)
        check(lut.tiled(x, weight, bias, row, case.splits), w, x, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "group_size"), [(64, 16), (80, 16), (96, 48)])
def test_groups_of_a_quarter_of_a_chunk(kind: str, k: int, group_size: int) -> None:
    case = Case(torch.float16, 4, kind, 3, 20, k, group_size, True, 1)
    w, weight, bias = case.weight()
    x = strided(random_x(3, k, torch.float16))
    check(lut.few(x, weight, bias, Few(4, 32, 2), 2), w, x, bias)
    for post_scale in (True, False):
        check(lut.tiled(x, weight, bias, Tile(512, 16, 64, 4, 3, post_scale), 1), w, x, bias)
    assert torch.equal(lut.dequantize(weight, 0, 20).cpu(), w.dense(torch.float16))
    assert str(lut.refuses(20, k, 5, group_size, torch.float16)).startswith(f"group_size {group_size}: needs a mult")
    assert (
        lut.refuses(20, k + 8, 4, group_size, torch.float16) == f"group_size {group_size}: does not divide K = {k + 8}"
    )


@pytest.mark.parametrize("case", cases(21, 1), ids=str)
def test_dequantizing_rounds_once(case: Case) -> None:
    w, weight, _ = case.weight()
    truth = w.dense(case.dtype)
    if case.dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter rounds by cutting off bits
        truth = (w.dense(torch.float32).view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()
    rest = case.n // 2
    assert torch.equal(lut.dequantize(weight, 0, case.n).cpu(), truth)
    assert torch.equal(lut.dequantize(weight, case.n - rest, rest).cpu(), truth[case.n - rest :])


@pytest.mark.parametrize("case", cases(21, 1), ids=str)
def test_unpacking_returns_what_was_packed(case: Case) -> None:
    w, weight, _ = case.weight()
    codes, scales, table, picked = lut.unpack(weight.operands, case.n, case.k, case.bits, case.group_size)
    assert torch.equal(codes.cpu(), w.codes)
    assert torch.equal(table.cpu(), w.table)
    for found, wanted in ((scales, w.scales), (picked, w.picked)):
        assert (found is None) == (wanted is None)
        assert found is None or (wanted is not None and torch.equal(found.cpu(), wanted))


def test_levels_of_float32_keep_their_last_bits() -> None:
    w = random_lut(9, 96, 4, 32, "own")
    fine = replace(w, table=w.table * (1 + 2**-20))
    assert torch.equal(lut.dequantize(packed(fine, torch.float32), 0, 9).cpu(), fine.dense(torch.float32))


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize(("slab", "parts"), [(1, [128, 33]), (96 * 130, [128, 33]), (96 * 256, [161])])
def test_many_tokens_are_naive(monkeypatch: pytest.MonkeyPatch, bits: int, slab: int, parts: list[int]) -> None:
    monkeypatch.setattr(many, "SLAB", slab)
    rows, real = [], lut.dequantize
    monkeypatch.setattr(lut, "dequantize", lambda *a: rows.append(a[2]) or real(*a))
    w = random_lut(33 + 128, 96, bits, 32, "picked")
    x, bias = strided(random_x(7, 96, torch.float16)), torch.arange(33.0 + 128, device=DEVICE)
    check(lut._by_rows(x, packed(w, torch.float16), bias), w, x, bias)
    assert rows == parts


def test_the_number_of_tokens_chooses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    tile = Tile(512, 16, 64, 4, 3, True)
    monkeypatch.setattr(tables, "for_device", lambda *_: Table((Few(2, 32, 2),), (tile,), many_from=6))
    for name in ("few", "tiled", "_by_rows"):
        original = getattr(lut, name)

        def call(*args: Any, name: str = name, original: Any = original) -> Tensor:
            ran.append(name)
            found: Tensor = original(*args)
            return found

        monkeypatch.setattr(lut, name, call)
    w = random_lut(33, 96, 4, 32, "one")
    operands = packed(w, torch.float16).operands
    for m in (0, 2, 3, 6):
        x = random_x(m, 96, torch.float16)
        y = lut.matmul(x.T.contiguous().T, operands, None, 33, 96, 4, 32)
        assert y.shape == (m, 33)
        check(y, w, x, None)
    assert ran == ["few", "tiled", "_by_rows"]


def far(rows: Tensor, stride: int) -> Tensor:
    """Return `rows` at this stride, uninitialized between them: the system lends pages only for what is written."""
    count, width = rows.shape
    spread = torch.empty_strided((count, width), (stride, 1), dtype=rows.dtype, device=DEVICE)
    return spread.copy_(rows)


def product(what: str, x: Tensor, weight: lut.Weight) -> Tensor:
    """Return the product of up to four tokens, by one of the three kernels."""
    if what == "few":
        return lut.few(x, weight, None, Few(4, 32, 2))
    if what == "tiled":
        return lut.tiled(x, weight, None, Tile(512, 16, 64, 4, 3, True))
    return lut._by_rows(x, weight, None)


@pytest.mark.parametrize("what", ["few", "tiled", "rows"])
@pytest.mark.parametrize("bits", [4, 8])
def test_more_than_two_to_the_31_elements(what: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = random_lut(64, 96, bits, 32, "one"), random_x(2, 96, torch.float16)
    weight = packed(w, torch.float16)
    words = far(weight.operands.weight[:64], 2**31 // 63 // 16 * 16 + 16)
    weight = lut.Weight(weight.operands._replace(weight=words), 64, 96, bits, 32)
    monkeypatch.setattr(lut.Weight, "pointers", with_stride(128))
    check(product(what, x, weight), w, x, None)
    check(product(what, far(x, 2**31), weight), w, x, None)
    # groups of rows that lie 2**31 / 2**bits tables apart
    w = random_lut(64, 64, bits, 32, "own")
    found, apart = packed(w, torch.float16), 2**31 // 2**bits
    rows = found.operands.table.view(2, 128, 2**bits)[:, :64].reshape(2, -1)
    table = far(rows, apart * 2**bits).as_strided((apart + 64, 2**bits), (2**bits, 1))
    weight = lut.Weight(found.operands._replace(table=table), 64, 64, bits, 32)
    monkeypatch.setattr(lut.Weight, "pointers", with_stride(apart))
    x = random_x(2, 64, torch.float16)
    check(product(what, x, weight), w, x, None)


@triton.jit
def store_ones(o_ptr, M, N):  # type: ignore[no-untyped-def]
    """Store 16 rows of 16 columns of ones in each part of o [splits, M, N]; grid (splits,)."""
    b_acc = tl.full((16, 16), 1.0, tl.float32)
    store_tile(o_ptr, None, b_acc, tl.arange(0, 16), tl.arange(0, 16), tl.program_id(0), M, N)


def test_a_result_of_more_than_two_to_the_31_elements() -> None:
    m, n = 2**15, 2**16
    out = torch.empty_strided((m * n + 16 * n,), (1,), dtype=torch.float16, device=DEVICE)  # written only in part
    out.as_strided((16, 16), (n, 1), m * n).zero_()
    store_ones[(2,)](out, m, n)
    assert bool((out.as_strided((16, 16), (n, 1), m * n) == 1).all())


def with_stride(stride: int) -> Any:
    """Return `Weight.pointers` with this many outputs between two groups."""
    original = lut.Weight.pointers
    return lambda weight: original(weight) | {"stride_sg": stride}


def test_what_does_not_fit_is_named() -> None:
    w = random_lut(33, 96, 4, 32, "picked")
    assert w.scales is not None
    assert w.picked is not None
    plain = 4, 32, torch.float16
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        ("needs uint8", (w.codes.int(), w.scales, w.table, w.picked, *plain)),
        ("group_size 24: ", (w.codes, w.scales, w.table, w.picked, 4, 24, torch.float16)),
        ("bits 9: looks up codes of 1 to 8 bits", (w.codes, w.scales, w.table, w.picked, 9, 32, torch.float16)),
        ("too large for 3 bits", (w.codes, w.scales, w.table, w.picked, 3, 32, torch.float16)),
        (r"scales \[33, 2\]: needs \[33, 3\]", (w.codes, w.scales[:, :2], w.table, w.picked, *plain)),
        (r"picked \[33, 2\]: needs \[33, 3\]", (w.codes, w.scales, w.table, w.picked[:, :2], *plain)),
        ("table: not all finite in torch.float16", (w.codes, w.scales, w.table * 1e6, w.picked, *plain)),
        *(
            ("picked: needs whole numbers in 0..4", (w.codes, w.scales, w.table, wrong_picks, *plain))
            for wrong_picks in (w.picked + 1, w.picked.int() - 1, w.picked + 0.5)
        ),
        (r"table \[300, 16\]: needs \[256, 16\]", (w.codes, w.scales, w.table[:1].repeat(300, 1), w.picked, *plain)),
        (r"table \[5, 15\]: needs \[5, 16\]", (w.codes, w.scales, w.table[:, :15], w.picked, *plain)),
        (r"table \[5, 16\]: needs \[99, 16\]", (w.codes, w.scales, w.table, None, *plain)),
    ]
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=message):
            lut.pack(*arguments)


def test_operands_that_do_not_fit_are_named() -> None:
    w = random_lut(33, 96, 4, 32, "one")
    found, x = packed(w, torch.float16).operands, random_x(2, 96, torch.float16)
    plain = 33, 96, 4, 32
    assert found.scales is not None
    own = packed(random_lut(33, 96, 4, 32, "own"), torch.float16).operands
    short = own._replace(table=own.table[:-1])
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        (r"weight: torch.int16 \[127, 32\]", (x, found._replace(weight=found.weight[:127]), None, *plain)),
        (r"table: torch.float16 \[1, 15\]", (x, found._replace(table=found.table[:, :15]), None, *plain)),
        ("table: torch.float32", (x, found._replace(table=found.table.float()), None, *plain)),
        (
            r"scales: .* needs contiguous torch.float16 \[4, 128\]",
            (x, found._replace(scales=found.scales[:3]), None, *plain),
        ),
        ("picked: torch.float16", (x, found._replace(picked=found.scales), None, *plain)),
        ("scales: .* needs contiguous", (x, found._replace(scales=found.scales.T.contiguous().T), None, *plain)),
        (r"table: .* \[511, 16\] .* needs contiguous torch.float16 \[512, 16\]", (x, short, None, *plain)),
        (r"x \[2, 95\]", (x[:, :95], found, None, *plain)),
        (r"bias \[3\]", (x, found, torch.ones(3, device=DEVICE), *plain)),
        (r"bias \[33\] .*: needs contiguous", (x, found, torch.ones(66, device=DEVICE)[::2], *plain)),
        ("group_size 24", (x, found, None, 33, 96, 4, 24)),
    ]
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=message):
            lut.matmul(*arguments)
