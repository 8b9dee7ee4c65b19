"""Native kernels against float64, on every path that a processor can take through them."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import AT_THE_END, Packed, assert_product, needs_compiler, random_packed
from torch import Tensor

from llmq_kernels import naive, native
from llmq_kernels.native import build

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
FEW = 4  # tokens that meet codes without an intermediate bfloat16 weight
# what the same source is on lesser processors; -O1 compiles in half the time
PATHS = {
    "no permutations of bytes": ("-O1", "-mno-avx512vbmi"),
    "no products of pairs": ("-O1", "-mno-avx512bf16"),
    "no AVX-512": ("-O1", "-mno-avx512f"),
}
pytestmark = [pytest.mark.usefixtures("poisoned_empty"), needs_compiler]
shapes = st.tuples(st.integers(1, 37), st.integers(1, 300))  # N, K
group_sizes = st.sampled_from([8, 16, 24, 32, 64, 96, 128, -1])
drawn = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def draw_x(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).to(dtype)


def check(weight: Packed, m: int, dtype: torch.dtype, with_bias: bool) -> None:
    n, k = weight.dense.shape
    x = draw_x(m, k, dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) if with_bias else None
    y = native.matmul(x, weight.tensors, bias, weight.bits, weight.group_size)
    pairs = build.has_pairs(build.library(weight.bits))
    in_steps = weight.group_size % 32 == 0 or weight.group_size >= k
    by_rows = m > FEW and pairs and in_steps
    assert_product(y, x, weight, bias, rounded=dtype == torch.bfloat16 and (by_rows or m > native._TILES))


def check_rows(weight: Packed) -> None:
    n, k = weight.dense.shape
    for dtype in (torch.float32, torch.bfloat16):
        first = n // 3
        out = torch.full((n, k), float("nan"), dtype=dtype)
        found = native.dequantize(weight.tensors, k, weight.bits, weight.group_size, (first, n), out)
        assert torch.equal(found, weight.dense[first:].to(dtype))
        assert bool(out[n - first :].isnan().all())


@pytest.mark.parametrize("bits", native.BITS)
@drawn
@given(
    shape=shapes,
    group_size=group_sizes,
    symmetric=st.booleans(),
    m=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_product_is_that_of_float64(
    bits: int,
    shape: tuple[int, int],
    group_size: int,
    symmetric: bool,
    m: int,
    dtype: torch.dtype,
    with_bias: bool,
    seed: int,
) -> None:
    group_size = shape[1] if group_size < 0 else group_size
    weight = random_packed(*shape, bits, group_size, symmetric, seed)
    check(weight, m, dtype, with_bias)
    check_rows(weight)


@pytest.fixture(scope="module")
def lesser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache for what tests alone compile."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_that_of_float64(path: str, bits: int, lesser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(lesser))
    try:
        kernels = build.load(bits, PATHS[path])
    except build.BuildError as error:
        pytest.skip(f"this compiler has no such path: {error}")
    monkeypatch.setattr(build, "library", lambda *_: kernels)
    for seed in range(18):
        group_size = [8, 24, 32, 64, 96, 128][seed % 6]
        n, k = 1 + seed * 5 % 21, 1 + seed * 67 % 290
        weight = random_packed(n, k, bits, group_size, seed % 5 < 2, seed)
        for dtype in DTYPES:
            check(weight, 1 + seed % 13, dtype, with_bias=seed % 2 == 0)
        check_rows(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows(dtype: torch.dtype) -> None:
    weight = random_packed(20, 5000, 4, 128, symmetric=False)
    for m in (1, 9):
        check(weight, m, dtype, with_bias=False)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("m", [126, 127, 260])
def test_tokens_are_taken_some_at_a_time(m: int, dtype: torch.dtype) -> None:
    weight = random_packed(5, 4500, 4, 4500, symmetric=True)  # activations of 126 tokens are more than 1 MiB
    check(weight, m, dtype, with_bias=True)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 65504.0, 2.0**-24])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_scale_means_what_it_does_to_pytorch(value: float, scale_dtype: torch.dtype) -> None:
    words = random_packed(3, 32, 4, 32, symmetric=True).tensors[0]
    scales = torch.tensor([[value], [-value], [1.0]]).to(scale_dtype)
    found = native.dequantize((words, scales, None), 32, 4, 32, (0, 3), torch.empty(3, 32))
    shifts = torch.arange(0, 32, 4)
    codes = (words.long()[..., None] >> shifts & 15).flatten(1)
    assert torch.equal(found.nan_to_num(1e30), ((codes - 8) * scales.float()).nan_to_num(1e30))
    y = native.matmul(torch.ones(1, 32, dtype=torch.bfloat16), (words, scales, None), None, 4, 32)
    assert torch.equal(y[0].isfinite(), scales[:, 0].float().isfinite() | (y[0] == 0))


def test_a_missing_weight_is_missing_in_bfloat16() -> None:
    words = random_packed(1, 16, 4, 8, symmetric=True).tensors[0]
    scales = torch.tensor([[0x7FFFFFFF, 0x3F800000]], dtype=torch.int32).view(torch.float32)  # a NaN of ones alone
    found = native.dequantize((words, scales, None), 16, 4, 8, (0, 1), torch.empty(1, 16, dtype=torch.bfloat16))
    assert found[0].isnan().tolist() == [True] * 8 + [False] * 8


GUARDED = (
    AT_THE_END
    + """
from llmq_kernels import native

for bits in (3, 4, 8):
    for k, group in ((4, 4), (33, 33), (70, 32), (100, 24), (41, 8), (9, 9)):
        n, g = 6, -(-k // group)
        words = at_the_end(torch.ones(n, -(-k * bits // 32), dtype=torch.int32))
        weight = words, at_the_end(torch.ones(n, g).half()), at_the_end(torch.ones(n, g, dtype=torch.uint8))
        for dtype in (torch.float32, torch.bfloat16):
            for m in (1, 3, 7, 14):
                native.matmul(at_the_end(torch.ones(m, k, dtype=dtype)), weight, at_the_end(torch.ones(n)), bits, group)
            native.dequantize(weight, k, bits, group, (0, n), at_the_end(torch.ones(n, k, dtype=dtype)))
print("done")
"""
)


def test_nothing_is_read_or_written_behind_the_end_of_a_tensor() -> None:
    command = [sys.executable, "-c", GUARDED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(native.__file__).parents[2], check=False)
    assert done.stdout == "done\n", done.stderr


def awkward(m: int, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    flat = draw_x(1, (m + 1) * k + 1, dtype)[0]
    return {
        "off alignment": flat[1 : m * k + 1].view(m, k),
        "transposed": draw_x(k, m, dtype).T,
        "every second column": draw_x(m, 2 * k, dtype)[:, ::2],
        "every second row": draw_x(2 * m, k, dtype)[::2],
        "one row repeated": draw_x(1, k, dtype).expand(m, k),
        "none": draw_x(0, k, dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [3, 7])
@pytest.mark.parametrize("name", list(awkward(2, 3, torch.float32)))
def test_activations_of_any_alignment_and_strides(name: str, m: int, dtype: torch.dtype) -> None:
    weight = random_packed(19, 100, 4, 32, symmetric=True)
    x = awkward(m, 100, dtype)[name]
    y = native.matmul(x, weight.tensors, None, 4, 32)
    assert_product(y, x, weight, None, rounded=dtype == torch.bfloat16 and m > FEW)


def test_infinite_and_missing_activations_stay_in_their_row() -> None:
    weight = random_packed(9, 70, 4, 32, symmetric=True)
    for m in (3, 8):
        for dtype in DTYPES:
            x = draw_x(m, 70, dtype)
            x[1, 5] = float("nan")
            y = native.matmul(x, weight.tensors, None, 4, 32)
            assert bool(y[1].isnan().all())
            assert bool(y[[0, 2]].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_threads_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_GRAIN", 1)
    weight = random_packed(301, 320, 4, 64, symmetric=False)
    before = torch.get_num_threads()
    for m in (1, 11):
        x, found = draw_x(m, 320, dtype), []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(native.matmul(x, weight.tensors, None, 4, 64))
        torch.set_num_threads(before)
        assert_product(found[0], x, weight, None, rounded=dtype == torch.bfloat16 and m > FEW)
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_small_work_is_left_to_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert native._threads(64 * 256 * 5) == 1
    assert native._threads(4096 * 4096 * 5) == 8


def test_calls_at_once_do_not_meet() -> None:
    weights = [random_packed(160, 512, 4, 128, symmetric=False, seed=seed) for seed in range(4)]
    work = [(weight, draw_x(m, 512, dtype)) for weight in weights for m in (1, 6) for dtype in DTYPES]

    def run(job: tuple[Packed, Tensor]) -> Tensor:
        return native.matmul(job[1], job[0].tensors, None, 4, 128)

    alone = [run(job) for job in work]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(alone, pool.map(run, work), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slabs_are_the_same_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_SLAB", 4000)  # several slabs, the last of them short
    weight = random_packed(37, 200, 3, 32, symmetric=False)
    x, bias = draw_x(21, 200, dtype), torch.randn(37)
    y = native.by_slabs(x, weight.tensors, bias, 3, 32)
    # PyTorch's product has no fixed order of summation, and bias is rounded to bfloat16 before it is added
    assert_product(y, x, weight, bias, rounded=dtype == torch.bfloat16)


def test_matrix_units_are_used_from_some_tokens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(native, "by_slabs", lambda *_: "slabs")
    weight = random_packed(8, 64, 4, 32, symmetric=True)
    narrow = not build.is_wide(build.library(4))
    for m, dtype, expected in [(13, torch.bfloat16, True), (12, torch.bfloat16, False), (13, torch.float32, narrow)]:
        found = native.matmul(draw_x(m, 64, dtype), weight.tensors, None, 4, 32)
        assert isinstance(found, str) == expected


def test_a_weight_of_more_than_two_to_the_31_bytes(tmp_path: Path) -> None:
    """Only the last rows are touched; the rest are holes of a sparse file."""
    n, k = 2**20 + 3, 4096
    words = torch.from_file(str(tmp_path / "words"), shared=True, size=n * k // 8, dtype=torch.int32).view(n, k // 8)
    weight = random_packed(3, k, 4, k, symmetric=True)
    words[-3:] = weight.tensors[0]
    scales = torch.zeros(n, 1)
    scales[-3:] = weight.tensors[1].float()
    found = native.dequantize((words, scales, None), k, 4, k, (n - 3, n), torch.empty(3, k))
    assert torch.equal(found, weight.dense.float())


MEMORY = """
import resource, sys, torch
from llmq_kernels import native
n, k = 16384, 8192
words, scales = torch.zeros(n, k // 8, dtype=torch.int32).fill_(0x12345678), torch.ones(n, k // 128).half()
x = torch.ones(int(sys.argv[1]), k, dtype=getattr(torch, sys.argv[2]))
native.matmul(x, (words[:16], scales[:16], None), None, 4, 128)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = native.matmul(x, (words, scales, None), None, 4, 128)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - y.nbytes)
"""


@pytest.mark.parametrize(("m", "dtype"), [(24, "bfloat16"), (2, "float32")])
def test_no_dense_copy_lives(m: int, dtype: str) -> None:
    """The weight is 64 MiB packed, 256 in bfloat16 and 512 in float32."""
    command = [sys.executable, "-c", MEMORY, str(m), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(native.__file__).parents[2])
    assert int(done.stdout) < 8 << 20


def test_what_does_not_fit_is_named() -> None:
    words, scales, _ = random_packed(8, 64, 4, 32, symmetric=True).tensors
    x = draw_x(2, 64, torch.float32)
    cases = {
        r"words torch.int32 \[8, 4\]": (words[:, :4], scales, None),
        r"words torch.int64": (words.long(), scales, None),
        r"words .* contiguous": (words.repeat(1, 2)[:, ::2], scales, None),
        r"scales torch.float32 \[8, 1\]": (words, scales[:, :1], None),
        r"scales torch.float64": (words, scales.double(), None),
        r"zeros torch.float32": (words, scales, scales),
    }
    for message, tensors in cases.items():
        with pytest.raises(ValueError, match=message):
            native.matmul(x, tensors, None, 4, 32)
    with pytest.raises(ValueError, match=r"bias \[3\]: needs \[8\]"):
        native.matmul(x, (words, scales, None), torch.ones(3), 4, 32)
    with pytest.raises(ValueError, match="in groups of 20"):
        native.matmul(x, (words, scales, None), None, 4, 20)
    with pytest.raises(ValueError, match="rows 2 to 9 of 8"):
        native.dequantize((words, scales, None), 64, 4, 32, (2, 9), torch.empty(8, 64))
    with pytest.raises(ValueError, match=r"in torch.float32 \[2, 64\]"):
        native.dequantize((words, scales, None), 64, 4, 32, (2, 8), torch.empty(2, 64))


def test_refusals_say_why() -> None:
    assert native.refuses(4, 64, 32, torch.bfloat16) is None
    assert native.refuses(4, 20, 20, torch.bfloat16) is None
    assert native.refuses(9, 64, 32, torch.bfloat16) == "bits 9: multiplies with codes of 2 to 8 bits"
    assert native.refuses(4, 64, 20, torch.bfloat16) == "group_size 20: needs a multiple of 8"
    assert native.refuses(4, 64, 32, torch.float64) == (
        "torch.float64 activations: multiplies float32, bfloat16 and float16"
    )


def test_naive_agrees_with_the_reference_of_these_tests() -> None:
    weight = random_packed(5, 40, 4, 16, symmetric=False)
    x = draw_x(3, 40, torch.float64)
    groups = weight.tensors[2]
    assert groups is not None
    assert torch.equal(x @ weight.dense.T, naive.quant_matmul(x, *unpacked(weight), None, 16))


def unpacked(weight: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes by one shift per code, scales and zeros."""
    words, scales, zeros = weight.tensors
    assert zeros is not None
    shifts = torch.arange(0, 32, 4)
    codes = (words.long()[..., None] >> shifts & 15).flatten(1)[:, : weight.dense.shape[1]]
    return codes, scales, zeros
