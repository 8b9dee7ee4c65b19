"""MatMulNBits: bytes against a slow reading of its definition, against onnxruntime's quantizer and its operator."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_cases import dequantized, random_weight
from safetensors import safe_open
from script_loading import load_script
from torch import Tensor

from llmq.errors import SpecError
from llmq.exports import matmul_nbits
from llmq.exports.matmul_nbits import Blocks
from llmq.types import QuantizedWeight

made = load_script("make_golden_formats")
GOLDEN = Path(__file__).parents[1] / "golden" / "onnxruntime-1.31.1.safetensors"
# bits, N, K, columns per group; among them a short last group, a short last block, one group per row, odd sizes
SHAPES = [
    (4, 6, 64, 32),
    (4, 5, 100, 32),
    (4, 3, 96, 48),
    (4, 7, 77, 77),
    (2, 6, 128, 64),
    (2, 5, 72, 16),
    (8, 6, 96, 96),
    (8, 3, 130, 64),
    (4, 2, 600, 512),
    (2, 3, 256, 256),
]


def code_at(blocks: Blocks, row: int, column: int, bits: int) -> int:
    """Return a code bit by bit, as the operator's documentation has it."""
    size = blocks.codes.shape[2] * 8 // bits
    block, inside = divmod(column, size)
    found = 0
    for bit in range(bits):
        byte, shift = divmod(inside * bits + bit, 8)
        found |= (int(blocks.codes[row, block, byte]) >> shift & 1) << bit
    return found


def zero_at(blocks: Blocks, row: int, block: int, bits: int) -> int:
    if blocks.zero_points is None:
        return 2 ** (bits - 1)
    found = 0
    for bit in range(bits):
        byte, shift = divmod(block * bits + bit, 8)
        found |= (int(blocks.zero_points[row, byte]) >> shift & 1) << bit
    return found


def dense(blocks: Blocks, k: int, bits: int) -> Tensor:
    """Return the weight [N, K] that the inputs of a node stand for."""
    n, _, nbytes = blocks.codes.shape
    size = nbytes * 8 // bits
    w = torch.empty(n, k)
    for row in range(n):
        for column in range(k):
            block = column // size
            code, zero = code_at(blocks, row, column, bits), zero_at(blocks, row, block, bits)
            w[row, column] = (code - zero) * blocks.scales[row, block]
    return w


def packed(bits: int, n: int, k: int, group: int, *, symmetric: bool) -> tuple[QuantizedWeight, Blocks]:
    weight = random_weight(n, k, bits, group, symmetric=symmetric)
    return weight, matmul_nbits.pack(weight, matmul_nbits.block_size(bits, group, k), symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("bits", "n", "k", "group"), SHAPES)
def test_blocks_stand_for_the_weight(bits: int, n: int, k: int, group: int, symmetric: bool) -> None:
    assert matmul_nbits.refuses(bits, group, k) is None
    weight, blocks = packed(bits, n, k, group, symmetric=symmetric)
    assert torch.equal(dense(blocks, k, bits), dequantized(weight))
    block = blocks.codes.shape[2] * 8 // bits
    shapes = tuple(tuple(tensor.shape) for tensor in blocks if tensor is not None)
    assert shapes == matmul_nbits.shapes(n, k, bits, block)[: len(shapes)]
    assert (blocks.zero_points is None) == symmetric
    assert all(tensor.is_contiguous() for tensor in blocks if tensor is not None)
    codes, scales, zeros = matmul_nbits.unpack(blocks, k, bits)
    assert torch.equal(codes, weight.codes)
    assert all(map(torch.equal, (scales, zeros), matmul_nbits.per_block(weight, block)))


@pytest.mark.parametrize(
    ("bits", "group", "k", "block"),
    [
        (4, 128, 4096, 128),
        (4, 32, 4096, 32),
        (4, 48, 96, 16),  # 32 is no divisor of 48
        (4, 192, 1536, 64),
        (4, 1024, 4096, 256),  # larger blocks are none of onnxruntime's
        (8, 4100, 4100, 128),  # 33 blocks of 132 bytes, 17 of 260 would be more
        (8, 272, 272, 32),  # 9 blocks of 36 bytes; 17 of 20 would be more
        (4, 64, 40, 16),  # one group per row, since it is longer than that
    ],
)
def test_the_block_that_takes_least_room(bits: int, group: int, k: int, block: int) -> None:
    assert matmul_nbits.block_size(bits, group, k) == block


@pytest.mark.parametrize("bits", [1, 3, 5, 6, 7])
def test_other_widths_are_refused(bits: int) -> None:
    assert matmul_nbits.refuses(bits, 32, 64) == (
        f"MatMulNBits of onnxruntime has codes of 2, 4 and 8 bits, these have {bits}"
    )


@pytest.mark.parametrize("group", [1, 8, 24, 40])
def test_groups_that_blocks_cannot_make_up_are_refused(group: int) -> None:
    expected = f"its blocks hold multiples of 16 columns, the groups of this layer {group}"
    assert matmul_nbits.refuses(4, group, 64) == expected
    assert matmul_nbits.refuses(4, group, group) is None  # one group per row


@pytest.mark.parametrize(("bits", "zero"), [(4, 16), (8, 256), (2, 4)])
def test_a_zero_above_all_codes_is_refused(bits: int, zero: int) -> None:
    weight = random_weight(2, 32, bits, 32, symmetric=False)
    weight.zeros[1, 0] = zero
    with pytest.raises(SpecError, match=f"has a zero of {zero}, above all codes of {bits} bits"):
        matmul_nbits.pack(weight, 32, symmetric=False)


def golden() -> dict[str, Blocks]:
    with safe_open(GOLDEN, framework="pt") as file:
        assert file.metadata() == {"writer": "onnxruntime-1.31.1"}
        names = sorted({key.split("/")[0] for key in file.keys()})  # noqa: SIM118  the file itself is no mapping
        held = set(file.keys())
        return {
            name: Blocks(
                file.get_tensor(f"{name}/codes"),
                file.get_tensor(f"{name}/scales"),
                file.get_tensor(f"{name}/zero_points") if f"{name}/zero_points" in held else None,
            )
            for name in names
        }


@pytest.mark.parametrize(("name", "theirs"), golden().items())
def test_bytes_are_those_of_onnxruntimes_quantizer(name: str, theirs: Blocks) -> None:
    _, width, symmetry, *short = name.split("-")
    bits, symmetric, k = int(width), symmetry == "sym", made.K - made.GROUP // 2 if short else made.K
    expected = made.codes(bits)[:, :k]
    expected[:, 0 :: made.GROUP], expected[:, 1 :: made.GROUP] = 0, 2**bits - 1
    codes, scales, zeros = matmul_nbits.unpack(theirs, k, bits)
    assert torch.equal(codes.long(), expected)
    assert torch.equal(scales, made.scales().abs())
    assert torch.equal(zeros, made.zeros(bits, symmetric))
    grid = random_weight(1, made.GROUP, bits, made.GROUP, symmetric=symmetric).grid
    ours = matmul_nbits.pack(QuantizedWeight(codes, scales, zeros, grid, made.GROUP), made.GROUP, symmetric=symmetric)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_their_bytes_are_all_there() -> None:
    assert len(golden()) == 12


def node(blocks: Blocks, k: int, bits: int) -> onnxruntime.InferenceSession:
    """Return a session of one MatMulNBits."""
    names = ["codes", "scales", "zero_points"]
    arrays = {name: tensor.numpy() for name, tensor in zip(names, blocks, strict=True) if tensor is not None}
    attributes: dict[str, Any] = {"K": k, "N": len(blocks.codes), "bits": bits, "accuracy_level": 1}
    attributes["block_size"] = blocks.codes.shape[2] * 8 // bits
    made_node = onnx.helper.make_node("MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", **attributes)
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [made_node],
        "one",
        [onnx.helper.make_tensor_value_info("x", floats, ["m", k])],
        [onnx.helper.make_tensor_value_info("y", floats, ["m", len(blocks.codes)])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("bits", "n", "k", "group"), SHAPES)
def test_onnxruntime_multiplies_by_the_weight(bits: int, n: int, k: int, group: int, symmetric: bool) -> None:
    weight, blocks = packed(bits, n, k, group, symmetric=symmetric)
    session = node(blocks, k, bits)
    for m in (1, 2, 7):  # one row has kernels of its own
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        y = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        w = weight.dequantize().double()
        # a sum of K products in float32, in any order: K · 2^-24 of the sum of magnitudes, and the rounding of w
        bound = (k + 2) * 2.0**-24 * (x.double().abs() @ w.abs().T)
        assert ((y - x.double() @ w.T).abs() <= bound).all()
        assert np.isfinite(y.numpy()).all()
