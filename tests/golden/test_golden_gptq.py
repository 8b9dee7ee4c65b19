"""llmq writes and reads exactly the bytes that make_gptq.py derived from the layout's description."""

import json

import make_gptq
import pytest
import torch

from llmq.formats import FORMATS
from llmq.grids.uniform import UniformGrid
from llmq.types import QuantizedWeight, QuantSpec

GOLDEN = json.loads(make_gptq.PATH.read_text(encoding="utf-8"))
layers = pytest.mark.parametrize(
    ("name", "version", "bits"), [(name, int(name[1]), int(name[3])) for name in GOLDEN], ids=list(GOLDEN)
)
N, K, GROUP = make_gptq.OUTPUTS, make_gptq.INPUTS, make_gptq.GROUP


def golden_weight(bits: int, version: int) -> QuantizedWeight:
    """Return the weight that the golden layer holds."""
    codes = torch.tensor([[make_gptq.code(o, i, bits) for i in range(K)] for o in range(N)], dtype=torch.uint8)
    scales = torch.tensor([[make_gptq.scale(o, g) for g in range(K // GROUP)] for o in range(N)])
    zeros = torch.tensor([[float(make_gptq.zero(o, g, bits, version)) for g in range(K // GROUP)] for o in range(N)])
    return QuantizedWeight(codes, scales, zeros, UniformGrid(bits, symmetric=False), GROUP)


def spec(bits: int, version: int) -> QuantSpec:
    return QuantSpec(bits, GROUP, False, {1: "gptq", 2: "gptq_v2"}[version])


def test_the_file_is_what_the_script_makes() -> None:
    assert make_gptq.PATH.read_text(encoding="utf-8") == make_gptq.text()


@layers
def test_packed_bytes(name: str, version: int, bits: int) -> None:
    stored = spec(bits, version)
    tensors = FORMATS[stored.format].pack(golden_weight(bits, version), stored)
    assert {key: tensor.numpy().tobytes().hex() for key, tensor in tensors.items()} == GOLDEN[name]


@layers
def test_bytes_are_read_back(name: str, version: int, bits: int) -> None:
    stored = spec(bits, version)
    tensors = {
        key: torch.frombuffer(bytearray.fromhex(GOLDEN[name][key]), dtype=dtype).reshape(shape)
        for key, (shape, dtype) in FORMATS[stored.format].layout(stored, N, K).items()
    }
    found, expected = FORMATS[stored.format].unpack(tensors, stored), golden_weight(bits, version)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.zeros, expected.zeros)
    assert torch.equal(found.scales, expected.scales)
