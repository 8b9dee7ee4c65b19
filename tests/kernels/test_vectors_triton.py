"""The Triton kernels for codebooks of vectors against float64, in the interpreter (or on a GPU)."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, random_x
from ptx_cases import WORDS, Registers, halves, run_ptx
from tolerance import assert_close_to_float64
from torch import Tensor

from llmq import ops
from llmq.errors import KernelError
from llmq.formats import FORMATS
from llmq.formats import bits as bitstream
from llmq.formats.streams import Stream
from llmq.grids.vq import VectorWeight
from llmq.nn import QuantLinear
from llmq.rows.vectors import TRITON_VECTORS, grid_of
from llmq.types import QuantSpec
from llmq_kernels import many, tables, vector_entries, vector_product
from llmq_kernels.tables import Few, Table, Tile
from llmq_kernels.vector_product import Kind, Weight

pytestmark = pytest.mark.usefixtures("poisoned_empty")
KINDS = [(2, 2), (2, 4), (2, 6), (2, 8), (4, 4), (4, 8), (8, 8)]  # columns, bits of a code
DTYPES = (torch.float16, torch.bfloat16)
SCALES = (torch.float16, torch.float32, torch.bfloat16)
# Groups of a quarter of a chunk, of half of one, of one and of several, a short last one, and one per row; columns that
# end inside a chunk, a byte, an entry.
COLUMNS = [(128, 32), (96, 32), (192, 64), (160, 64), (256, 128), (300, 256), (200, 200), (37, 37), (1, 1), (7, 100)]


@dataclass(frozen=True)
class Numbers:
    """A weight, and what it is, float64 [N, K], column by column."""

    codes: Tensor
    book: Tensor
    scales: Tensor
    kind: Kind
    dense: Tensor


def numbers(kind: Kind, seed: int = 0) -> Numbers:
    """Return a weight of this kind that uses all of int8 and scales of both signs."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**kind.code_bits, (kind.n, -(-kind.k // kind.columns)), generator=draw).to(torch.uint8)
    book = torch.randint(-128, 128, (2**kind.code_bits, kind.columns), generator=draw).to(torch.int8)
    scales = torch.rand(kind.n, kind.groups, generator=draw) + 0.5
    scales *= torch.where(torch.rand(scales.shape, generator=draw) < 0.5, -1, 1) / 64
    scales = scales.bfloat16().to(SCALES[seed % 3])
    dense = torch.empty(kind.n, kind.k, dtype=torch.float64)
    for column in range(kind.k):
        entries = book[codes[:, column // kind.columns].long(), column % kind.columns]
        dense[:, column] = entries.double() * scales[:, column // kind.group_size].double()
    return Numbers(codes, book, scales, kind, dense)


def packed(w: Numbers) -> Weight:
    """Return the weight as kernels take it; of rows and columns that are padded the values are nobody's business."""
    found = vector_product.pack(*(t.to(DEVICE) for t in (w.codes, w.book, w.scales)), w.kind)
    found.scales[:, w.kind.n :] = torch.nan
    found.weight[:, -(-w.kind.k // w.kind.width) :] = found.book.shape[1] - 1
    return Weight(found, w.kind)


@dataclass(frozen=True)
class Case:
    """What is multiplied."""

    kind: Kind
    dtype: torch.dtype
    m: int
    bias: bool
    splits: int
    seed: int

    def operands(self) -> tuple[Numbers, Weight, Tensor, Tensor | None]:
        """Return the weight twice, activations with NaN around them, and the bias."""
        w = numbers(self.kind, self.seed)
        bias = torch.randn(self.kind.n, generator=torch.Generator().manual_seed(self.seed)).to(DEVICE, self.dtype)
        x = strided(random_x(self.m, self.kind.k, self.dtype, self.seed))
        return w, packed(w), x, bias if self.bias else None


def cases(count: int, largest_m: int) -> list[Case]:
    """Return seeded cases of all kinds, columns, dtypes of activations and of scales."""
    draw, found = random.Random(7), []
    for i in range(count):
        k, group_size = COLUMNS[3 * i % len(COLUMNS)]
        kind = Kind(draw.randint(1, 70), k, *KINDS[i % len(KINDS)], group_size)
        m, bias, splits = draw.randint(1, largest_m), draw.random() < 0.7, draw.randint(1, 2)
        found.append(Case(kind, DTYPES[i // 2 % 2], m, bias, splits, i))
    return found


def strided(x: Tensor) -> Tensor:
    """Return `x` as the rows of a wider tensor, with NaN behind and between them."""
    wide = torch.full((2 * len(x), x.shape[1] + 67), torch.nan, dtype=x.dtype, device=x.device)
    wide[::2, : x.shape[1]] = x
    return wide[::2, : x.shape[1]]


def check(y: Tensor, w: Numbers, x: Tensor, bias: Tensor | None) -> None:
    assert y.dtype == x.dtype
    truth = x.cpu().double() @ w.dense.T
    assert_close_to_float64(y.cpu(), truth if bias is None else truth + bias.cpu().double(), w.kind.k)


@pytest.mark.parametrize("case", cases(28, 4), ids=str)
def test_a_few_tokens_are_those_of_float64(case: Case) -> None:
    w, weight, x, bias = case.operands()
    row = Few(4, 16 << case.seed % 3, 1 + case.seed % 2)
    check(vector_product.few(x, weight, bias, row, case.splits), w, x, bias)


@pytest.mark.parametrize("case", cases(28, 40), ids=str)
def test_tiles_are_those_of_float64(case: Case) -> None:
    w, weight, x, bias = case.operands()
    # Scaling weights rounds them to 16 bits: half an epsilon each, of which sums over columns keep less.
    row = Tile(512, 16 << case.m % 2, 64, 4, 3, case.seed // 7 % 2 == 0)
    check(vector_product.tiled(x, weight, bias, row, case.splits), w, x, bias)


@pytest.mark.parametrize("case", cases(21, 1), ids=str)
def test_dequantizing_rounds_once(case: Case) -> None:
    w, weight, _, _ = case.operands()
    truth = w.dense.to(case.dtype)
    if case.dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter rounds by cutting off bits
        truth = (w.dense.float().view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()
    n, rest = case.kind.n, case.kind.n // 2
    assert torch.equal(vector_product.dequantize(weight, 0, n, case.dtype).cpu(), truth)
    assert torch.equal(vector_product.dequantize(weight, n - rest, rest, case.dtype).cpu(), truth[n - rest :])


@pytest.mark.parametrize("case", cases(21, 1), ids=str)
def test_unpacking_returns_what_was_packed(case: Case) -> None:
    w, weight, _, _ = case.operands()
    found = vector_product.unpack(weight.operands, case.kind)
    for tensor, wanted in zip(found, (w.codes, w.book, w.scales), strict=True):
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor.cpu(), wanted)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_entry_is_multiplied_as_it_is(kind: tuple[int, int]) -> None:
    """A token of one 1 reads a column, exactly: of powers of two and int8 nothing is rounded."""
    d, bits = kind
    w = numbers(Kind(2**bits, 4 * d, *kind, 4 * d))
    w.codes.copy_(torch.arange(2**bits)[:, None] + torch.tensor([0, 5, 11, 2]) & 2**bits - 1)
    w.scales.fill_(1 / 64)
    weight, x = packed(w), torch.eye(4 * d, dtype=torch.float16, device=DEVICE)
    wanted = w.book[w.codes.int()].flatten(1).T.double() / 64
    tiles = vector_product.tiled(x, weight, None, Tile(512, 16, 128, 4, 3, True))
    assert torch.equal(tiles.cpu().double(), wanted)
    few = torch.cat([vector_product.few(row, weight, None, Few(4, 128, 2)) for row in x.split(4)])
    assert torch.equal(few.cpu().double(), wanted)


@pytest.mark.parametrize(("dtype", "asm"), [(torch.float16, "FP16"), (torch.bfloat16, "BF16")], ids=str)
def test_assembly_is_the_number_of_every_byte(dtype: torch.dtype, asm: str) -> None:
    text = getattr(vector_entries, f"NUMBERS_{asm}").value
    other = WORDS[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]  # the upper half of a word
    registers: Registers = {"$4": (WORDS.long() & 0xFFFF) | (other.long() & 0xFFFF) << 16}
    # a register moved to two halves is kept whole here
    run_ptx(text.replace("{$0, $1}", "$0").replace("{$2, $3}", "$2"), registers, dtype)
    for target, shift in (("$0", 0), ("$2", 8)):
        for half, source in zip(halves(registers[target], dtype), (WORDS, other), strict=True):
            assert torch.equal(half.double(), (source.long() >> shift & 255).double() - 128)


def test_sums_are_scaled_in_float32() -> None:
    """Sums of 240 thousand are beyond float16, and a scale's last bits beyond bfloat16."""
    w = numbers(Kind(4, 64, 4, 8, 64))
    scales = torch.full((4, 1), 1.001e-3)
    found = vector_product.pack(w.codes.to(DEVICE), w.book.fill_(127).to(DEVICE), scales.to(DEVICE), w.kind)
    x = torch.full((2, 64), 30.0, dtype=torch.float16, device=DEVICE)
    wanted = torch.full((2, 4), 64 * 30 * 127 * 1.001e-3, dtype=torch.float16)
    assert torch.equal(vector_product.few(x, Weight(found, w.kind), None, Few(4, 32, 2)).cpu(), wanted)
    assert torch.equal(vector_product.tiled(x, Weight(found, w.kind), None, Tile(16, 16, 64, 4, 3, True)).cpu(), wanted)


@pytest.mark.parametrize("kind", [(2, 8), (4, 8), (8, 8)], ids=str)
def test_activations_of_any_strides(kind: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    w = numbers(Kind(19, 72, *kind, 72))
    weight, flat = packed(w), random_x(1, 401, torch.bfloat16)[0]
    monkeypatch.setattr(tables, "for_device", lambda *_: Table((Few(4, 32, 2),), (), many_from=5))
    views = {
        "off alignment": flat[1:217].view(3, 72),
        "rows off alignment": random_x(3, 73, torch.bfloat16)[:, :72],
        "transposed": random_x(72, 3, torch.bfloat16).T,
        "one row repeated": flat[:72].expand(3, 72),
        "aligned": flat[4:220].view(3, 72),
    }
    for name, x in views.items():
        y = vector_product.matmul(x, weight.operands, None, w.kind)
        assert torch.equal(y, vector_product.matmul(x.clone().contiguous(), weight.operands, None, w.kind)), name
        check(y, w, x, None)


@pytest.mark.skipif(DEVICE != "cpu", reason="memory of others, on a CPU")
def test_activations_in_memory_of_others_are_copied_to_where_words_may_lie() -> None:
    room = bytearray(1000)
    starts = (torch.frombuffer(room, dtype=torch.bfloat16, offset=start) for start in range(0, 8, 2))
    flat = next(tensor for tensor in starts if tensor.data_ptr() % 8 == 2)
    flat.copy_(random_x(1, len(flat), torch.bfloat16)[0])
    for x in (flat[:216].view(3, 72), flat[3:219].view(3, 72)):  # off alignment; aligned, at an odd place
        words = vector_product._in_words(x, 4)
        assert words.data_ptr() % 8 == 0
        assert torch.equal(words.view(torch.bfloat16), x)


@pytest.mark.parametrize("slab", [1, 2**26])
def test_many_tokens_are_those_of_float64(monkeypatch: pytest.MonkeyPatch, slab: int) -> None:
    monkeypatch.setattr(many, "SLAB", slab)
    w = numbers(Kind(33 + 128, 96, 2, 6, 32))
    x, bias = strided(random_x(7, 96, torch.float16)), torch.linspace(-9, 9, 33 + 128, device=DEVICE)
    check(vector_product.by_rows(x, packed(w), bias), w, x, bias)


def test_the_number_of_tokens_chooses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    tile = Tile(512, 16, 64, 4, 3, True)
    monkeypatch.setattr(tables, "for_device", lambda *_: Table((Few(2, 32, 2),), (tile,), many_from=6))
    for name in ("few", "tiled", "by_rows"):
        original = getattr(vector_product, name)

        def call(*args: Any, name: str = name, original: Any = original) -> Tensor:
            ran.append(name)
            found: Tensor = original(*args)
            return found

        monkeypatch.setattr(vector_product, name, call)
    w = numbers(Kind(33, 96, 4, 8, 32))
    operands = packed(w).operands
    for m in (0, 2, 3, 6):
        x = random_x(m, 96, torch.float16)
        y = vector_product.matmul(x.T.contiguous().T, operands, None, w.kind)
        assert y.shape == (m, 33)
        check(y, w, x, None)
    assert ran == ["few", "tiled", "by_rows"]


def far(rows: Tensor, stride: int) -> Tensor:
    """Return `rows` at this stride, uninitialized between them: the system lends pages only for what is written."""
    count, width = rows.shape
    spread = torch.empty_strided((count, width), (stride, 1), dtype=rows.dtype, device=DEVICE)
    return spread.copy_(rows)


@pytest.mark.parametrize("what", ["few", "tiled", "rows"])
def test_more_than_two_to_the_31_elements(what: str) -> None:
    w, x = numbers(Kind(64, 128, 4, 8, 64)), random_x(3, 128, torch.float16)
    weight = packed(w)
    codes = far(weight.operands.weight[:64], 2**31 // 63 // 16 * 16 + 16)
    weight = weight._replace(operands=weight.operands._replace(weight=codes))
    for tokens in (x, far(x, 2**30 + 16)):
        if what == "few":
            y = vector_product.few(tokens, weight, None, Few(4, 32, 2))
        elif what == "tiled":
            y = vector_product.tiled(tokens, weight, None, Tile(512, 16, 64, 4, 3, True))
        else:
            y = vector_product.by_rows(tokens, weight, None)
        check(y, w, x, None)


def test_a_step_takes_as_many_columns_as_a_group_allows_and_registers_hold() -> None:
    chunks = {32: 32, 96: 32, 64: 64, 192: 64, 128: 128, 384: 128, 4096: 128, 5000: 128}
    assert {size: Kind(8, 4096, 4, 8, size).chunk for size in chunks} == chunks
    for kind, sums, tiles in (((2, 8), 32, 64), ((2, 6), 32, 64), ((2, 4), 32, 32), ((4, 8), 32, 32), ((2, 2), 16, 16)):
        weight = packed(numbers(Kind(1, 128, *kind, 128)))
        assert vector_product.few_constants(weight, Few(4, 64, 2), 1, torch.float16)["CODES"] == sums
        assert vector_product.tile_constants(weight, Tile(16, 16, 64, 4, 3, True), torch.float16)["CODES"] == tiles
        assert weight.operands.weight.shape == (128, 128 // weight.kind.width)
        assert weight.operands.book.shape == (2 if kind == (2, 2) else 1, 64 if kind == (2, 6) else 256)


def test_what_does_not_fit_is_named() -> None:
    w = numbers(Kind(33, 96, 4, 4, 32))
    plain = w.codes, w.book, w.scales, w.kind
    wrong: dict[str, tuple[Any, ...]] = {
        "codes of 5 bits for 4 columns: there is no kernel": (*plain[:3], w.kind._replace(code_bits=5)),
        "codes of 8 bits for 16 columns": (*plain[:3], w.kind._replace(columns=16, code_bits=8)),
        r"weight \[33, 0\]: is empty": (*plain[:3], w.kind._replace(k=0)),
        "group_size 48: needs a multiple of 32": (*plain[:3], w.kind._replace(group_size=48)),
        "group_size 0: ": (*plain[:3], w.kind._replace(group_size=0)),
        r"codes torch.int32 \[33, 24\]: needs torch.uint8 \[33, 24\]": (w.codes.int(), *plain[1:]),
        r"codes torch.uint8 \[33, 23\]": (w.codes[:, 1:], *plain[1:]),
        r"book torch.int8 \[15, 4\]: needs torch.int8 \[16, 4\]": (w.codes, w.book[1:], *plain[2:]),
        r"scales torch.float16 \[33, 2\]: .* \[33, 3\]": (*plain[:2], w.scales[:, 1:], w.kind),
        "scales torch.float64": (*plain[:2], w.scales.double(), w.kind),
        "scales: not all finite": (*plain[:2], w.scales * torch.inf, w.kind),
        "codes: largest is 16, too large for 4 bits": (w.codes.clamp(min=16), *plain[1:]),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            vector_product.pack(*arguments)


def test_operands_that_do_not_fit_are_named() -> None:
    w = numbers(Kind(33, 96, 8, 8, 32))
    found, x = packed(w).operands, random_x(2, 96, torch.float16)
    wrong: dict[str, tuple[Any, ...]] = {
        r"codes: torch.uint8 \[127, 12\] .* needs contiguous torch.uint8 \[128, 12\]": (
            x,
            found._replace(weight=found.weight[1:]),
        ),
        r"book: torch.int32 \[1, 256\] .* \[2, 256\]": (x, found._replace(book=found.book[:1])),
        "book: torch.int64": (x, found._replace(book=found.book.long())),
        r"scales: .* \[3, 128\]": (x, found._replace(scales=found.scales[1:])),
        "torch.float32 activations: multiplies float16 and bfloat16": (x.float(), found),
        r"x \[2, 95\]: needs \[M, 96\]": (x[:, 1:], found),
        r"x \[96\]": (x[0], found),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            vector_product.matmul(*arguments, None, w.kind)
    with pytest.raises(ValueError, match=r"bias \[3\]"):
        vector_product.matmul(x, found, torch.ones(3, device=DEVICE), w.kind)
    with pytest.raises(ValueError, match="group_size 48"):
        vector_product.matmul(x, found, None, w.kind._replace(group_size=48))


def layer_of(w: Numbers) -> ops.Layer:
    """Return what the table of kernels calls a layer with this weight."""
    kind = w.kind
    bits = kind.code_bits // kind.columns
    return ops.Layer(bits, min(kind.group_size, kind.k), True, kind.n, kind.k, f"vq{kind.columns}")


def stream_of(w: Numbers) -> Stream:
    words = bitstream.pack(w.codes, w.kind.code_bits)
    return Stream(words.to(DEVICE), w.scales.to(DEVICE), None, w.book.to(DEVICE))


@pytest.mark.parametrize("case", cases(7, 3), ids=str)
def test_the_row_keeps_what_it_is_given(case: Case) -> None:
    w, _, x, bias = case.operands()
    layer = layer_of(w)
    arranged = TRITON_VECTORS.pack(stream_of(w), layer, case.dtype)
    found = TRITON_VECTORS.unpack(arranged, layer)
    assert isinstance(found, VectorWeight)
    assert torch.equal(found.codes.cpu(), w.codes)
    assert torch.equal(found.codebook.cpu(), w.book.float())
    assert torch.equal(found.scales.cpu(), w.scales.float())
    assert torch.equal(found.dequantize().cpu().double(), w.dense)
    assert found.grid == grid_of(layer)
    check(TRITON_VECTORS.matmul(x, arranged, bias, layer), w, x, bias)


def test_the_row_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses, gpu = ops.KERNELS["triton_vectors"].refuses, torch.device("cuda")
    layer = ops.Layer(2, 64, True, 8, 192, "vq4")
    assert refuses(layer, torch.device("cpu"), torch.float16) == "runs on an NVIDIA GPU, not on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert refuses(layer, gpu, torch.float16) == "needs compute capability 8.0 or newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert refuses(layer, gpu, torch.float16) is None
    assert refuses(layer, gpu, torch.bfloat16) is None
    assert "looks up vectors" in str(refuses(layer._replace(grid="uniform"), gpu, torch.float16))
    assert str(refuses(layer, gpu, torch.float32)).startswith("torch.float32 activations: ")
    odd = layer._replace(group_size=48)
    assert refuses(odd, gpu, torch.float16) == "group_size 48: needs a multiple of 32, or one group per row"
    assert ops.choose(layer, gpu, torch.float16) == "triton_vectors"
    assert ops.choose(odd, gpu, torch.float16) == "vectors"
    monkeypatch.setattr(ops, "KERNELS", {"triton_vectors": TRITON_VECTORS})
    with pytest.raises(KernelError, match="triton_vectors: group_size 48"):
        ops.choose(odd, gpu, torch.float16)


@pytest.mark.skipif(DEVICE != "cpu", reason="a layer on a GPU takes the row anyway: tests/kernels/test_on_gpu.py")
def test_a_layer_on_the_row_is_the_layer_that_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "KERNELS", {"triton_vectors": TRITON_VECTORS._replace(refuses=lambda *_: None)})
    w = numbers(Kind(9, 45, 2, 4, 45))
    scales = (w.scales.float() * 1.003).half()  # bfloat16 does not hold them
    w = replace(w, scales=scales, dense=w.dense / w.scales.double() * scales.double())
    spec = QuantSpec(2, -1, True, "llmq", torch.float16, "vq2")
    layer = QuantLinear(45, 9, spec, bias=False, dtype=torch.float16, device="cpu")
    read = TRITON_VECTORS.unpack(TRITON_VECTORS.pack(stream_of(w), layer.layer, torch.float16), layer.layer)
    stored = FORMATS["llmq"].pack(read, spec, None)
    layer.fill_(stored)
    x = random_x(3, 45, torch.float16)
    check(layer(x), w, x, None)
    arranged = layer.packed()
    layer.bfloat16()
    check(layer(x.bfloat16()), w, x.bfloat16(), None)
    assert layer.kernel == "triton_vectors"
    assert all(torch.equal(a, b) for a, b in zip(layer.packed(), arranged, strict=True))
    assert "exact_scales" not in dict(layer.named_buffers())  # none were rounded
    assert all(torch.equal(layer.state_dict()[name], stored[name]) for name in stored)
    torch.library.opcheck(ops.quant_matmul, (x, arranged, None, "triton_vectors", 2, 45, True, 9, "vq2"))
