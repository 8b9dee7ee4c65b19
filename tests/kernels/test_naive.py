import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import random_weight

from llmq_kernels import naive


@given(
    m=st.integers(0, 3),
    n=st.integers(1, 3),
    groups=st.integers(1, 3),
    group_size=st.integers(1, 4),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_naive_is_the_triple_loop(m: int, n: int, groups: int, group_size: int, with_bias: bool, seed: int) -> None:
    k = groups * group_size
    w = random_weight(n, k, group_size, 4, symmetric=False, seed=seed)
    codes, scales, zeros, bias = (t.tolist() for t in (w.codes, w.scales, w.zeros, w.bias))
    x = torch.randn(m, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(w.codes.device)
    expected = [[bias[j] if with_bias else 0.0 for j in range(n)] for _ in range(m)]
    for i in range(m):
        for j in range(n):
            for c in range(k):
                g = c // group_size
                expected[i][j] += x[i, c].item() * (codes[j][c] - zeros[j][g]) * scales[j][g]
    actual = naive.quant_matmul(x, w.codes, w.scales, w.zeros, w.bias if with_bias else None, group_size)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(
        actual.cpu(), torch.tensor(expected, dtype=torch.float64).view(m, n), rtol=1e-12, atol=1e-12
    )


def test_dequantize_takes_a_scale_and_a_zero_from_each_columns_group() -> None:
    codes = torch.tensor([[0, 1, 2, 15]], dtype=torch.uint8)
    w = naive.dequantize(codes, torch.tensor([[2.0, -0.5]]), torch.tensor([[1.0, 8.0]]), 2, torch.float16)
    assert w.dtype == torch.float16
    assert w.tolist() == [[-2.0, 0.0, 3.0, -3.5]]


def test_dequantize_refuses_too_few_groups() -> None:
    with pytest.raises(IndexError):
        naive.dequantize(torch.zeros(1, 8, dtype=torch.uint8), torch.ones(1, 1), torch.ones(1, 1), 4, torch.float32)


@pytest.mark.parametrize("module", ["naive", "cpu"])
def test_torch_only_modules_do_not_import_triton_or_llmq(module: str) -> None:
    kernels = Path(__file__).resolve().parents[2] / "kernels"
    # torch itself may import triton: forget it, and see whether our module asks for it.
    program = (
        f"import sys; sys.path.insert(0, {str(kernels)!r}); import torch\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'triton']: del sys.modules[name]\n"
        f"import llmq_kernels.{module}\n"
        "assert not {'triton', 'llmq'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
