"""What only a GPU can show of the Triton kernels: graphs, streams and memory (TRITON_INTERPRET=0, -m gpu)."""

from types import ModuleType

import pytest
import torch
from kernel_cases import random_weight, random_x
from torch import Tensor

from llmq_kernels import many, w4a16, w8a16
from llmq_kernels.layout import Packed

N, K, GROUP = 1024, 4096, 128
pytestmark = pytest.mark.gpu
modules = pytest.mark.parametrize(("module", "bits"), [(w4a16, 4), (w8a16, 8)], ids=["w4a16", "w8a16"])
tokens = pytest.mark.parametrize("m", [1, 4, 16, 600])


def packed_weight(module: ModuleType, bits: int) -> Packed:
    w = random_weight(N, K, GROUP, bits, symmetric=False)
    packed: Packed = module.pack(w.codes, w.scales, w.zeros, GROUP, torch.bfloat16)
    return packed


def multiply(module: ModuleType, x: Tensor, packed: Packed) -> Tensor:
    y: Tensor = module.matmul(x, packed, None, N, K, GROUP)
    return y


@modules
@tokens
def test_a_captured_product_replays(module: ModuleType, bits: int, m: int) -> None:
    packed, x = packed_weight(module, bits), random_x(m, K, torch.bfloat16)
    multiply(module, x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = multiply(module, x, packed)
        second = multiply(module, x, packed)  # in the same scratch
    x.copy_(random_x(m, K, torch.bfloat16, seed=7))
    graph.replay()
    expected = multiply(module, x, packed)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


@modules
@tokens
def test_streams_do_not_share_a_scratch(module: ModuleType, bits: int, m: int) -> None:
    weights = [packed_weight(module, bits), packed_weight(module, bits)]
    x = random_x(m, K, torch.bfloat16)
    expected = [multiply(module, x, packed) for packed in weights]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        found = []
        for stream, packed in zip(streams, weights, strict=True):
            with torch.cuda.stream(stream):
                found.append(multiply(module, x, packed))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@modules
def test_the_scratch_is_all_that_many_tokens_take(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, bits: int
) -> None:
    monkeypatch.setattr(many, "SLAB", 256 * K)
    packed, x = packed_weight(module, bits), random_x(600, K, torch.bfloat16)
    multiply(module, x, packed)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = multiply(module, x, packed)
    torch.cuda.synchronize()
    # cuBLAS has had its workspace before; the allocator rounds each block up to 512 bytes.
    assert torch.cuda.max_memory_allocated() - before <= 2 * 256 * K + y.nbytes + 1024
