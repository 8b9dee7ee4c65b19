"""Layouts: packing and unpacking, exactly."""

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import random_weight

from llmq_kernels import cpu, w2a16, w4a16, w8a16

BITS = {w2a16: 2, w4a16: 4, w8a16: 8}
triton_modules = pytest.mark.parametrize("module", list(BITS), ids=["w2a16", "w4a16", "w8a16"])
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
# (K, group size): groups of 32, 64, 96, 128, 160 and 256, and one group per row of any length.
columns = st.one_of(
    st.tuples(st.integers(1, 5), st.sampled_from([32, 64, 96, 128, 160, 256])).map(lambda t: (t[0] * t[1], t[1])),
    st.integers(1, 300).map(lambda k: (k, k)),
)


@triton_modules
@given(n=st.integers(1, 140), columns=columns, symmetric=st.booleans(), dtype=dtypes, seed=st.integers(0, 2**16))
def test_unpack_undoes_pack(
    module: ModuleType, n: int, columns: tuple[int, int], symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    k, group_size = columns
    w = random_weight(n, k, group_size, BITS[module], symmetric, seed)
    packed = module.pack(w.codes, w.scales, w.stored_zeros, group_size, dtype)
    codes, scales, zeros = module.unpack(packed.tensors(), n, k, group_size)
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.float32)
    assert torch.equal(codes, w.codes)
    assert torch.equal(scales, w.scales)
    assert (zeros is None) == symmetric
    if zeros is not None:
        assert torch.equal(zeros, w.zeros)


@pytest.mark.parametrize(("k", "group_size", "chunk"), [(128, 32, 64), (256, 128, 128), (192, 96, 64), (200, 200, 128)])
def test_a_word_holds_one_nibble_of_each_plane(k: int, group_size: int, chunk: int) -> None:
    w = random_weight(3, k, group_size, 4, symmetric=True)
    words = w4a16.pack(w.codes, w.scales, None, group_size, torch.float16).weight.tolist()
    depth = chunk // 4
    for n in range(3):
        for column in range(k):
            start, inside = column - column % chunk, column % chunk
            word = words[n][start // 4 + inside % depth]
            assert word >> 4 * (inside // depth) & 15 == w.codes[n, column]


@triton_modules
def test_padding_is_silent(module: ModuleType) -> None:
    w = random_weight(33, 96, 32, BITS[module], symmetric=False)
    packed = module.pack(w.codes, w.scales, w.zeros, 32, torch.float16)
    assert packed.weight.shape[0] == packed.scales.shape[1] == 128
    assert packed.scales.shape[0] * 32 >= packed.weight.shape[1] * module.LAYOUT.columns_per_word
    assert not packed.scales[3:].any()
    assert not packed.scales[:, 33:].any()


@triton_modules
def test_scales_are_stored_rounded_to_the_activations_dtype(module: ModuleType) -> None:
    w = random_weight(5, 64, 64, BITS[module], symmetric=True)
    scales = w.scales * (1 + 2**-10)  # a foreign file's fp16 values
    packed = module.pack(w.codes, scales, None, 64, torch.bfloat16)
    assert torch.equal(module.unpack(packed, 5, 64, 64)[1], scales.bfloat16().float())


def test_pack_names_what_does_not_fit() -> None:
    w = random_weight(4, 64, 32, 4, symmetric=False)
    with pytest.raises(ValueError, match=r"codes: torch\.int32"):
        w4a16.pack(w.codes.int(), w.scales, None, 32, torch.float16)
    with pytest.raises(ValueError, match="codes: largest is 16"):
        w4a16.pack(torch.full_like(w.codes, 16), w.scales, None, 32, torch.float16)
    with pytest.raises(ValueError, match="group_size 16: needs a multiple of 32"):
        w4a16.pack(w.codes, w.scales, None, 16, torch.float16)
    with pytest.raises(ValueError, match=r"scales \[4, 1\]: needs \[4, 2\]"):
        w4a16.pack(w.codes, w.scales[:, :1], None, 32, torch.float16)
    with pytest.raises(ValueError, match=r"scales: not all finite in torch\.float16"):
        w4a16.pack(w.codes, w.scales * 1e8, None, 32, torch.float16)
    for zeros in (w.zeros + 0.5, w.zeros - 17, w.zeros + 17):
        with pytest.raises(ValueError, match=r"zeros: need whole numbers in 0\.\.16"):
            w4a16.pack(w.codes, w.scales, zeros, 32, torch.float16)


@given(
    n=st.integers(1, 9).map(lambda i: 16 * i),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([32, 64, 96, 128, 256, 384, 512]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_unpack_undoes_pack_of_atens_int4(n: int, groups: int, group_size: int, symmetric: bool, seed: int) -> None:
    k = groups * group_size
    w = random_weight(n, k, group_size, 4, symmetric, seed)
    tensors = cpu.pack_int4(w.codes.cpu(), w.scales.cpu(), w.zeros.cpu(), group_size)
    assert tensors[1].shape == (k // min(group_size & -group_size, 256), n, 2)
    codes, scales, zeros = cpu.unpack_int4(*tensors, n, k, group_size)
    assert torch.equal(codes, w.codes.cpu())
    assert torch.equal(scales, w.scales.cpu())
    assert torch.equal(zeros, w.zeros.cpu())


def test_every_zero_is_recovered_at_every_bf16_mantissa() -> None:
    mantissas = (torch.arange(128, dtype=torch.int16) | 0x3C00).view(torch.bfloat16).float()
    scales = torch.cat((mantissas[:, None].expand(128, 17), -mantissas[:, None].expand(128, 17)), dim=1)
    zeros = torch.arange(17.0).repeat(128, 2)
    codes = torch.zeros(128, 34 * 32, dtype=torch.uint8)
    tensors = cpu.pack_int4(codes, scales, zeros, 32)
    assert torch.equal(cpu.unpack_int4(*tensors, 128, 34 * 32, 32)[2], zeros)


def test_a_scale_of_zero_unpacks_with_the_middle_zero() -> None:
    tensors = cpu.pack_int4(torch.ones(16, 32, dtype=torch.uint8), torch.zeros(16, 1), torch.ones(16, 1), 32)
    _, scales, zeros = cpu.unpack_int4(*tensors, 16, 32, 32)
    assert torch.equal(scales, torch.zeros(16, 1))
    assert torch.equal(zeros, torch.full((16, 1), 8.0))


@given(n=st.integers(1, 40), k=st.integers(1, 9).map(lambda i: 16 * i), seed=st.integers(0, 2**16))
def test_unpack_undoes_pack_of_atens_int8(n: int, k: int, seed: int) -> None:
    w = random_weight(n, k, k, 8, symmetric=True, seed=seed)
    tensors = cpu.pack_int8(w.codes.cpu(), w.scales.cpu(), w.zeros.cpu())
    codes, scales, zeros = cpu.unpack_int8(*tensors)
    assert torch.equal(codes, w.codes.cpu())
    assert torch.equal(scales, w.scales.cpu())
    assert torch.equal(zeros, w.zeros.cpu())
