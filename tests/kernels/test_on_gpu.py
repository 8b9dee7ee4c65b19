"""What only a GPU can show of the Triton kernels: graphs, streams, devices, memory, compilers.

``TRITON_INTERPRET=0 scripts/test -m gpu``. A new product joins by a line in `PRODUCTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from kernel_cases import DEVICE, random_x
from tolerance import assert_close_to_float64
from torch import Tensor

from llmq import expert_ops, ops
from llmq.formats import bits as bitstream
from llmq.formats.streams import Stream
from llmq.grids.vq import vector_grid
from llmq_kernels import gptq_block, many, naive, pack_bits, scale_search

N, K = 1024, 4096
BF16 = torch.bfloat16
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(DEVICE == "cpu", reason="kernels are interpreted; set TRITON_INTERPRET=0"),
]


class Product(NamedTuple):
    """A kernel that multiplies, and random operands for it."""

    pack: Callable[[int, torch.device], list[Tensor]]  # of this seed, on this device
    multiply: Callable[[Tensor, list[Tensor]], Tensor]  # x [M, K] bfloat16; [M, N]
    expected: Callable[[Tensor, list[Tensor]], Tensor]  # the same in float64
    row: str = ""  # of ops.KERNELS
    layer: ops.Layer | None = None


def of_row(row: str, layer: ops.Layer) -> Product:
    """Return the product of a row of the table of kernels."""
    kernel = ops.KERNELS[row]

    def pack(seed: int, device: torch.device) -> list[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        codes = torch.randint(2**layer.bits, (N, K), generator=draw).to(torch.uint8)
        groups = (N, K // layer.group_size)
        scales = ((torch.rand(groups, generator=draw) + 0.5) * 2.0**-6).bfloat16().half()
        zeros = None
        if not layer.symmetric:
            zeros = torch.randint(2**layer.bits, groups, generator=draw)
            zeros = zeros.to(torch.uint8 if layer.bits < 8 else torch.int16).to(device)
        return kernel.pack(Stream(bitstream.pack(codes, layer.bits).to(device), scales.to(device), zeros), layer, BF16)

    return Product(
        pack,
        lambda x, packed: kernel.matmul(x, packed, None, layer),
        lambda x, packed: x.double() @ kernel.unpack(packed, layer).dequantize().double().T,
        row,
        layer,
    )


def of_vectors(layer: ops.Layer) -> Product:
    """Return the product with a weight on a codebook of vectors."""
    row, grid = ops.KERNELS["triton_vectors"], vector_grid(layer.grid, layer.bits)

    def pack(seed: int, device: torch.device) -> list[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        codes = torch.randint(grid.entries, (N, grid.codes_in(K)), generator=draw).to(torch.uint8)
        book = torch.randint(-127, 128, (grid.entries, grid.columns), generator=draw).to(torch.int8)
        scales = ((torch.rand((N, K // layer.group_size), generator=draw) + 0.5) * 2.0**-12).half()
        words = bitstream.pack(codes, grid.code_bits).to(device)
        return row.pack(Stream(words, scales.to(device), None, book.to(device)), layer, BF16)

    return Product(
        pack,
        lambda x, packed: row.matmul(x, packed, None, layer),
        lambda x, packed: x.double() @ row.unpack(packed, layer).dequantize().double().T,
        "triton_vectors",
        layer,
    )


def of_experts(row: str, layer: ops.Layer) -> Product:
    """Return the products of tokens that each go to one of four experts, which lie as a row of the table has them."""
    one = of_row(row, layer)

    def pack(seed: int, device: torch.device) -> list[Tensor]:
        each = [one.pack(4 * seed + number, device) for number in range(4)]
        return [torch.stack(tensors) for tensors in zip(*each, strict=True)]

    def multiply(x: Tensor, packed: list[Tensor]) -> Tensor:
        stack = expert_ops.Stack(row, layer, packed, None, 1)
        return expert_ops.matmul(x, stack, expert_ops.route(torch.arange(len(x), device=x.device) % 4, stack))

    def expected(x: Tensor, packed: list[Tensor]) -> Tensor:
        truth = x.new_empty(len(x), N, dtype=torch.float64)
        for number in range(4):
            truth[number::4] = one.expected(x[number::4], [tensor[number] for tensor in packed])
        return truth

    return Product(pack, multiply, expected)


PRODUCTS = {
    "w4a16": of_row("triton_w4a16", ops.Layer(4, 128, False, N, K)),
    "w4a16 g32": of_row("triton_w4a16", ops.Layer(4, 32, True, N, K)),
    "w4a16 row": of_row("triton_w4a16", ops.Layer(4, K, True, N, K)),
    "w8a16": of_row("triton_w8a16", ops.Layer(8, 128, False, N, K)),
    "w8a16 row": of_row("triton_w8a16", ops.Layer(8, K, True, N, K)),
    "w3a16": of_row("triton_w3a16", ops.Layer(3, 128, False, N, K)),
    "w2a16": of_row("triton_w2a16", ops.Layer(2, 64, False, N, K)),
    "experts w4a16": of_experts("triton_w4a16", ops.Layer(4, 128, False, N, K)),
    "experts w8a16": of_experts("triton_w8a16", ops.Layer(8, 128, True, N, K)),
    "lut nf4": of_row("triton_lut", ops.Layer(4, 64, True, N, K, "nf4")),
    "vq2": of_vectors(ops.Layer(3, K, True, N, K, "vq2")),
    "vq4": of_vectors(ops.Layer(2, 128, True, N, K, "vq4")),
    "vq8": of_vectors(ops.Layer(1, K, True, N, K, "vq8")),
}
products = pytest.mark.parametrize("name", PRODUCTS)
tokens = pytest.mark.parametrize("m", [1, 4, 16, 64, 600])


def test_every_row_of_the_kernel_table_that_runs_on_a_gpu_is_here() -> None:
    rows = {row for row in ops.KERNELS if row.startswith("triton")}
    assert rows == {product.row for product in PRODUCTS.values() if product.row}


def gpu_test(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a GPU."""
    for mark in on_gpu:
        test = mark(test)
    return test


def case(name: str, m: int, device: str = DEVICE, seed: int = 0) -> tuple[Product, list[Tensor], Tensor]:
    product = PRODUCTS[name]
    return product, product.pack(seed, torch.device(device)), random_x(m, K, BF16, seed + 1).to(device)


@gpu_test
@products
@tokens
def test_products_are_right_and_repeat_themselves(name: str, m: int) -> None:
    product, packed, x = case(name, m)
    found = product.multiply(x, packed)
    assert_close_to_float64(found, product.expected(x, packed), K)
    assert all(torch.equal(product.multiply(x, packed), found) for _ in range(5))


@gpu_test
@products
@tokens
def test_a_captured_product_replays(name: str, m: int) -> None:
    product, packed, x = case(name, m)
    product.multiply(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = product.multiply(x, packed)
        second = product.multiply(x, packed)  # in the same scratch
    x.copy_(random_x(m, K, BF16, seed=7))
    graph.replay()
    expected = product.multiply(x, packed)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


@gpu_test
@products
@tokens
def test_streams_do_not_share_a_scratch(name: str, m: int) -> None:
    product, first, x = case(name, m)
    weights = [first, product.pack(1, x.device)]
    expected = [product.multiply(x, packed) for packed in weights]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        found = []
        for stream, packed in zip(streams, weights, strict=True):
            with torch.cuda.stream(stream):
                found.append(product.multiply(x, packed))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@gpu_test
@products
@tokens
def test_a_product_runs_where_its_operands_are(name: str, m: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    product, packed, x = case(name, m, "cuda:1")
    assert torch.cuda.current_device() == 0
    found = product.multiply(x, packed)
    assert found.device.index == 1
    assert_close_to_float64(found, product.expected(x, packed), K)


@gpu_test
@pytest.mark.filterwarnings("ignore")  # what the compiler has to say about TF32
@products
@pytest.mark.parametrize("m", [1, 16, 600])
def test_the_operator_passes_opcheck_and_compiles_whole(name: str, m: int) -> None:
    product, packed, x = case(name, m)
    if product.layer is None:
        pytest.skip("not a row of the table of kernels: its operator is tested beside it")
    layer = product.layer
    plain = layer.bits, layer.group_size, layer.symmetric, N, layer.grid
    torch.library.opcheck(ops.quant_matmul, (x, packed, None, product.row, *plain))
    with torch.no_grad():
        compiled = torch.compile(
            lambda x, packed: ops.matmul(x, packed, None, product.row, layer), fullgraph=True, mode="reduce-overhead"
        )
        expected = product.multiply(x, packed)
        assert all(torch.equal(compiled(x, packed), expected) for _ in range(3))  # the third is a replay


@gpu_test
@pytest.mark.parametrize("name", ["w4a16", "w8a16", "w2a16"])
def test_the_scratch_is_all_that_many_tokens_take(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(many, "SLAB", 256 * K)
    product, packed, x = case(name, 600)
    product.multiply(x, packed)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = product.multiply(x, packed)
    torch.cuda.synchronize()
    # cuBLAS has had its workspace before; the allocator rounds each block up to 512 bytes.
    assert torch.cuda.max_memory_allocated() - before <= 2 * 256 * K + y.nbytes + 1024


class Quantizing(NamedTuple):
    """A kernel for quantizing: its operands by device, and what it returns."""

    operands: Callable[[torch.device], tuple[Tensor, ...]]
    run: Callable[..., tuple[Tensor, ...]]
    expected: Callable[..., tuple[Tensor, ...]]  # on a CPU


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _block(device: torch.device) -> tuple[Tensor, ...]:
    """Return a block of columns on which float32 is exact in whatever order it adds."""
    w, r = (_draw(128, 512) * 64).round() / 64, (_draw(128, 128) / 2).round().triu(1) / 4 + torch.eye(128)
    scales, zeros = torch.full((1, 512), 0.25), torch.full((1, 512), 8.0)
    operands = w, torch.zeros_like(w), r, scales, zeros, torch.zeros(128, dtype=torch.int64)
    return tuple(tensor.to(device) for tensor in operands)


def _round_block(*operands: Tensor) -> tuple[Tensor, ...]:
    w = operands[0]
    codes, errors = torch.empty_like(w, dtype=torch.uint8), torch.empty_like(w)
    gptq_block.gptq_block(*operands, lowest=0, highest=15, codes=codes, errors=errors)
    return codes, errors


def _naive_block(*operands: Tensor) -> tuple[Tensor, ...]:
    codes, errors = naive.gptq_block(*operands, 0, 15)
    return codes, errors.float()


LEVELS = scale_search.Levels(0, 16, False, 16.0, 2.0**-17, 65280.0)


def _search(w: Tensor, weight: Tensor, spans: Tensor) -> tuple[Tensor, ...]:
    return scale_search.scale_search(scale_search.Operands(w, weight, spans), LEVELS, 128, 2.0)


def _naive_search(w: Tensor, weight: Tensor, spans: Tensor) -> tuple[Tensor, ...]:
    scales, zeros, errors = naive.scale_search(w, weight, spans, LEVELS, 128, 2.0)
    first = (errors == errors.amin(0)).int().argmax(0, keepdim=True)
    return scales.gather(0, first)[0], zeros.gather(0, first)[0]


def _weights(device: torch.device) -> tuple[Tensor, ...]:
    """Return weights, importances and spans for which every sum is exact."""
    w = (_draw(512, 1000) * 16).round().clamp(-64, 64) / 64
    return w.to(device), torch.ones(1000, device=device), torch.tensor([1.0, 0.5, 0.25], device=device)


def _codes(device: torch.device) -> tuple[Tensor, ...]:
    return ((_draw(300, 1000) * 8).abs().clamp(0, 7).to(torch.uint8).to(device),)


def _there_and_back(codes: Tensor) -> tuple[Tensor, ...]:
    words = pack_bits.pack(codes, 3, bitstream.word_count(1000, 3), padded=False)
    return words, pack_bits.unpack(words, 3, 1000, padded=False)


QUANTIZING = {
    "gptq_block": Quantizing(_block, _round_block, _naive_block),
    "scale_search": Quantizing(_weights, _search, _naive_search),
    "pack_bits": Quantizing(_codes, _there_and_back, lambda codes: (bitstream.pack(codes, 3), codes)),
}
quantizing = pytest.mark.parametrize("name", QUANTIZING)


@gpu_test
@quantizing
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_kernels_for_quantizing_run_where_their_operands_are(name: str, device: str) -> None:
    if torch.cuda.device_count() <= int(device[-1]):
        pytest.skip("needs two GPUs")
    kernel = QUANTIZING[name]
    found = kernel.run(*kernel.operands(torch.device(device)))
    expected = kernel.expected(*kernel.operands(torch.device("cpu")))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


@gpu_test
@quantizing
def test_kernels_for_quantizing_can_be_captured(name: str) -> None:
    # A capture fails on whatever waits for the GPU.
    kernel = QUANTIZING[name]
    operands = kernel.operands(torch.device(DEVICE))
    expected = kernel.run(*operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel.run(*operands)
    for tensor in found:
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
