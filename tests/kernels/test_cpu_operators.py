import pytest
import torch
from kernel_cases import Weight, random_weight, random_x
from tolerance import assert_close_to_float64
from torch import Tensor

from llmq_kernels import cpu, naive

pytestmark = pytest.mark.usefixtures("poisoned_empty")
int4_shapes = pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [(16, 32, 32), (48, 192, 64), (112, 96, 96), (64, 256, 128), (80, 1024, 512), (32, 384, 384), (128, 2048, 128)],
)


def cpu_case(n: int, k: int, group_size: int, bits: int, symmetric: bool) -> Weight:
    """Return a weight on the CPU, wherever the other kernels are tested."""
    w = random_weight(n, k, group_size, bits, symmetric)
    stored = None if w.stored_zeros is None else w.stored_zeros.cpu()
    return Weight(w.codes.cpu(), w.scales.cpu(), w.zeros.cpu(), stored, w.bias.cpu(), group_size)


def bf16_x(m: int, k: int) -> Tensor:
    return random_x(m, k, torch.bfloat16).cpu()


@int4_shapes
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("m", [1, 4, 5, 17])
def test_int4_matmul_is_naive(n: int, k: int, group_size: int, symmetric: bool, m: int) -> None:
    assert cpu.int4_refuses(n, k, 4, group_size, torch.bfloat16) is None
    w = cpu_case(n, k, group_size, 4, symmetric)
    tensors = cpu.pack_int4(w.codes, w.scales, w.stored_zeros, group_size)
    x = bf16_x(m, k)
    y = cpu.int4_matmul(x, *tensors, w.bias, n, k, group_size)
    assert_close_to_float64(y, naive.quant_matmul(x, w.codes, w.scales, w.zeros, w.bias, group_size), k)


@pytest.mark.parametrize(("n", "k"), [(1, 16), (33, 48), (48, 512)])
@pytest.mark.parametrize("m", [1, 5, 17])
def test_int8_matmul_is_naive(n: int, k: int, m: int) -> None:
    assert cpu.int8_refuses(n, k, 8, k, torch.bfloat16) is None
    w = cpu_case(n, k, k, 8, symmetric=True)
    tensors = cpu.pack_int8(w.codes, w.scales, w.zeros)
    x = bf16_x(m, k)
    y = cpu.int8_matmul(x, *tensors, w.bias, n, k)
    assert_close_to_float64(y, naive.quant_matmul(x, w.codes, w.scales, w.zeros, w.bias, k), k)


def awkward(m: int, k: int) -> dict[str, Tensor]:
    """Return activations that aten would crash on, or read wrongly."""
    flat = bf16_x(1, (m + 1) * k + 1)[0]
    return {
        "2 bytes off alignment": flat[1 : m * k + 1].view(m, k),
        "transposed": bf16_x(k, m).T,
        "every second column": bf16_x(m, 2 * k)[:, ::2],
        "one row repeated": bf16_x(1, k).expand(m, k),
        "none": bf16_x(0, k),
    }


@pytest.mark.parametrize("name", list(awkward(5, 64)))
def test_activations_of_any_alignment_and_strides(name: str) -> None:
    x = awkward(5, 64)[name]
    int4 = cpu_case(16, 64, 32, 4, symmetric=False)
    y = cpu.int4_matmul(x, *cpu.pack_int4(int4.codes, int4.scales, int4.zeros, 32), None, 16, 64, 32)
    assert_close_to_float64(y, naive.quant_matmul(x, int4.codes, int4.scales, int4.zeros, None, 32), 64)
    int8 = cpu_case(17, 64, 64, 8, symmetric=True)
    y = cpu.int8_matmul(x, *cpu.pack_int8(int8.codes, int8.scales, None), None, 17, 64)
    assert_close_to_float64(y, naive.quant_matmul(x, int8.codes, int8.scales, int8.zeros, None, 64), 64)


@pytest.mark.parametrize("mean", [0.0, 0.3, 3.0])
def test_rounding_the_zero_term_stays_in_bounds_on_gaussian_weights(mean: float) -> None:
    # All activations on one side add up the rounding of (8 - zero) * scale, while the product itself cancels.
    n, k, group_size = 64, 4096, 64
    groups = (torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02).view(n, -1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).bfloat16().float()
    zeros = (-low / scales).round()
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15).to(torch.uint8).view(n, k)
    x = (random_x(9, k, torch.float32).cpu() + mean).bfloat16()
    y = cpu.int4_matmul(x, *cpu.pack_int4(codes, scales, zeros, group_size), None, n, k, group_size)
    assert_close_to_float64(y, naive.quant_matmul(x, codes, scales, zeros, None, group_size), k)


@pytest.mark.parametrize(
    ("n", "k", "bits", "group_size", "dtype", "reason"),
    [
        (64, 64, 8, 32, torch.bfloat16, "bits 8: this operator multiplies with 4-bit codes"),
        (64, 64, 4, 32, torch.float32, "torch.float32 activations: computes in bfloat16 only"),
        (64, 64, 4, 32, torch.float16, "torch.float16 activations: computes in bfloat16 only"),
        (33, 64, 4, 32, torch.bfloat16, "N = 33: needs a multiple of 16"),
        (64, 100, 4, 32, torch.bfloat16, "group_size 32: does not divide K = 100"),
        (64, 64, 4, 16, torch.bfloat16, "group_size 16: needs a multiple of 32"),
        (64, 48, 4, 48, torch.bfloat16, "group_size 48: needs a multiple of 32"),
    ],
)
def test_int4_refusals_say_why(n: int, k: int, bits: int, group_size: int, dtype: torch.dtype, reason: str) -> None:
    assert cpu.int4_refuses(n, k, bits, group_size, dtype) == reason


@pytest.mark.parametrize(
    ("n", "k", "bits", "group_size", "dtype", "reason"),
    [
        (64, 64, 4, 64, torch.bfloat16, "bits 4: this operator multiplies with 8-bit codes"),
        (64, 64, 8, 64, torch.float16, "torch.float16 activations: computes in bfloat16 only"),
        (64, 100, 8, 100, torch.bfloat16, "K = 100: needs a multiple of 16"),
        (64, 40, 8, 40, torch.bfloat16, "K = 40: needs a multiple of 16"),
        (64, 64, 8, 32, torch.bfloat16, "group_size 32: needs one group per row, 64 columns"),
    ],
)
def test_int8_refusals_say_why(n: int, k: int, bits: int, group_size: int, dtype: torch.dtype, reason: str) -> None:
    assert cpu.int8_refuses(n, k, bits, group_size, dtype) == reason


def test_what_is_refused_is_not_run() -> None:
    int4 = cpu_case(16, 64, 32, 4, symmetric=False)
    packed4 = cpu.pack_int4(int4.codes, int4.scales, int4.zeros, 32)
    with pytest.raises(ValueError, match="computes in bfloat16 only"):
        cpu.int4_matmul(bf16_x(1, 64).float(), *packed4, None, 16, 64, 32)
    with pytest.raises(ValueError, match="scales_and_zeros"):
        cpu.int4_matmul(bf16_x(1, 64), *packed4, None, 16, 64, 64)
    with pytest.raises(ValueError, match=r"x \[1, 32\]"):
        cpu.int4_matmul(bf16_x(1, 32), *packed4, None, 16, 64, 32)
    with pytest.raises(ValueError, match=r"bias \[3\]"):
        cpu.int4_matmul(bf16_x(1, 64), *packed4, torch.ones(3), 16, 64, 32)
    int8 = cpu_case(3, 40, 40, 8, symmetric=True)
    with pytest.raises(ValueError, match="K = 40: needs a multiple of 16"):
        cpu.pack_int8(int8.codes, int8.scales, None)
    with pytest.raises(ValueError, match="K = 40: needs a multiple of 16"):
        cpu.int8_matmul(bf16_x(1, 40), torch.zeros(3, 40, dtype=torch.int8), torch.ones(3).bfloat16(), None, 3, 40)
    with pytest.raises(ValueError, match="zeros: this operator has none"):
        cpu.pack_int8(int8.codes[:, :32], int8.scales, int8.zeros + 1)


def test_unpacking_checks_the_shape() -> None:
    w = cpu_case(64, 64, 32, 4, symmetric=True)
    weight, scales_and_zeros = cpu.pack_int4(w.codes, w.scales, None, 32)
    with pytest.raises(ValueError, match=r"weight \[64, 16\]: needs \[64, 32\]"):
        cpu.unpack_int4(weight[:, :16], scales_and_zeros, 64, 64, 32)
