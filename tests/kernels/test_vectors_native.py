"""Native products with codebooks of vectors against float64, on every path that a processor can take through them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import AT_THE_END, SCALE_DTYPES, Packed, assert_product, needs_compiler
from torch import Tensor

from llmq import ops
from llmq.formats import bits as bitstream
from llmq_kernels.native import build, vectors

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
KINDS = [(2, 2), (2, 4), (2, 6), (2, 8), (4, 4), (4, 8), (8, 8)]  # columns, bits of a code
# what the same source is on lesser processors
PATHS = {"no products of pairs": ("-mno-avx512bf16",), "plain C": ("-O1", "-mno-avx512f")}
CPU = torch.device("cpu")
pytestmark = [pytest.mark.usefixtures("poisoned_empty"), needs_compiler]


def random_weight(n: int, k: int, d: int, bits: int, group_size: int, seed: int) -> tuple[Packed, Tensor]:
    """Return a weight, summed up entry by entry, and its codebook, which has all of int8."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, -(-k // d)), generator=draw).to(torch.uint8)
    book = torch.randint(-128, 128, (2**bits, d), generator=draw).to(torch.int8)
    shape = n, -(-k // group_size)
    scales = (torch.rand(shape, generator=draw) + 0.5) * torch.where(torch.rand(shape, generator=draw) < 0.5, -1, 1)
    scales = (scales / 64).bfloat16().to(SCALE_DTYPES[seed % 3])
    dense = torch.empty(n, k, dtype=torch.float64)
    for column in range(k):
        entries = book[codes[:, column // d].long(), column % d]
        dense[:, column] = entries.double() * scales[:, column // group_size].double()
    return Packed((bitstream.pack(codes, bits), scales, None), dense, bits, group_size), book


def draw_x(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).to(dtype)


def product(x: Tensor, weight: Packed, book: Tensor, bias: Tensor | None = None) -> Tensor:
    words, scales, _ = weight.tensors
    return vectors.matmul(x, words, scales, book, bias, weight.group_size)


def check(m: int, n: int, k: int, kind: tuple[int, int], group_size: int, dtype: torch.dtype, seed: int) -> None:
    """Compare a product: entries are exact in bfloat16, and scales are applied to sums."""
    weight, book = random_weight(n, k, *kind, group_size, seed)
    x = draw_x(m, k, dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) if seed % 2 else None
    assert_product(product(x, weight, book, bias), x, weight, bias, rounded=False)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 41), st.integers(1, 1200)),
    quarters=st.sampled_from([1, 2, 3, 4, 8, None]),
    m=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_product_is_that_of_float64(
    kind: tuple[int, int], shape: tuple[int, int], quarters: int | None, m: int, dtype: torch.dtype, seed: int
) -> None:
    n, k = shape
    check(m, n, k, kind, k if quarters is None else 16 * kind[0] * quarters, dtype, seed)


@pytest.fixture(scope="module")
def lesser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache for what tests alone compile."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_that_of_float64(path: str, lesser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(lesser))
    try:
        kernels = vectors.load(PATHS[path])
    except build.BuildError as error:
        pytest.skip(f"this compiler has no such path: {error}")
    monkeypatch.setattr(vectors, "_library", lambda: kernels)
    for seed in range(42):
        kind, k = KINDS[seed % 7], 1 + seed * 67 % 790
        group_size = k if seed % 3 else 16 * kind[0] * (1 + seed % 4)
        check(1 + seed % 13, 1 + seed * 5 % 21, k, kind, group_size, DTYPES[seed % 3], seed)
    # this compiler may have no more than that
    plain = vectors.path(torch.bfloat16) == "rows in cache, plain C, float32"
    assert plain or path != "plain C"
    assert vectors.is_slow(13, torch.float32) == plain
    assert vectors.is_slow(13, torch.bfloat16)
    assert not vectors.is_slow(12, torch.bfloat16)
    assert plain or vectors.path(torch.bfloat16) == "rows in cache, float32"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_code_at_every_place(kind: tuple[int, int], dtype: torch.dtype) -> None:
    """A token of one 1 reads a column; products of powers of two and int8 are exact."""
    d, bits = kind
    k = 16 * d * 5 + d - 1
    weight, book = random_weight(2**bits + 3, k, d, bits, k, 0)
    x = torch.eye(k)[:: 2 * d + 1].to(dtype)
    words, scales, _ = weight.tensors
    y = vectors.matmul(x, words, torch.ones_like(scales), book, None, k)
    unscaled = weight.dense / scales.double()
    assert torch.equal(y.double(), unscaled.T[:: 2 * d + 1])


@pytest.mark.parametrize(
    ("dtype", "kind", "k"), [(torch.bfloat16, (4, 8), 9000), (torch.float32, (2, 6), 60000)], ids=str
)
def test_tokens_are_taken_some_at_a_time(dtype: torch.dtype, kind: tuple[int, int], k: int) -> None:
    """A second-level cache holds 54 tokens of 9000 columns, and 4 of 60000: then 24 are taken."""
    weight, book = random_weight(5, k, *kind, k, 1)
    x = draw_x(61, k, dtype)
    assert_product(product(x, weight, book), x, weight, None, rounded=False)


def test_scales_are_applied_in_float32() -> None:
    """Sums of 240 thousand are beyond float16, and a scale's last bits beyond bfloat16."""
    weight, book = random_weight(4, 64, 4, 8, 64, 0)
    book.fill_(127)
    words = weight.tensors[0]
    scales = torch.full((4, 1), 1.001e-3)
    y = vectors.matmul(torch.full((1, 64), 30.0, dtype=torch.float16), words, scales, book, None, 64)
    assert torch.equal(y, torch.full((1, 4), 64 * 30 * 127 * 1.001e-3, dtype=torch.float16))


def test_results_are_rounded_to_bfloat16_as_pytorch_does() -> None:
    """257 and 259 are halfway, and go to 256 and 260; a NaN of all bits is none once it is rounded like a number."""
    book = torch.tensor([[127, 127, 3, 0], [127, 127, 5, 0], [0, 0, 0, 0], [0, 0, 0, 0]] * 4, dtype=torch.int8)
    words = bitstream.pack(torch.tensor([[0], [1], [2]], dtype=torch.uint8), 4)
    bias = torch.tensor([0, 0, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    y = vectors.matmul(torch.ones(1, 4, dtype=torch.bfloat16), words, torch.ones(3, 1), book, bias, 4)
    assert y[0, :2].tolist() == [256, 260]
    assert y[0, 2].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_token(dtype: torch.dtype) -> None:
    weight, book = random_weight(9, 70, 4, 8, 70, 0)
    x = draw_x(8, 70, dtype)
    clean = product(x, weight, book)
    x[1, 50], x[7, 69] = torch.nan, torch.inf
    y = product(x, weight, book)
    assert not y[[1, 7]].isfinite().any()
    whole = [0, 2, 3, 4, 5, 6]
    assert torch.equal(y[whole], clean[whole])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_any_strides(dtype: torch.dtype) -> None:
    weight, book = random_weight(19, 100, 2, 8, 100, 0)
    flat = draw_x(1, 401, dtype)[0]
    views = {
        "off alignment": flat[1:301].view(3, 100),
        "transposed": draw_x(100, 3, dtype).T,
        "every second row": draw_x(6, 100, dtype)[::2],
        "one row repeated": draw_x(1, 100, dtype).expand(3, 100),
        "none": draw_x(0, 100, dtype),
    }
    for name, x in views.items():
        y = product(x, weight, book)
        assert y.shape == (len(x), 19)
        assert torch.equal(y, product(x.contiguous(), weight, book)), name


@pytest.mark.parametrize("group_size", [320, 64])
def test_threads_change_nothing(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_GRAIN", 1)
    weight, book = random_weight(101, 320, 4, 8, group_size, 0)
    before = torch.get_num_threads()
    for m in (1, 11):
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(product(draw_x(m, 320, torch.bfloat16), weight, book))
        torch.set_num_threads(before)
        assert torch.equal(*found)


GUARDED = (
    AT_THE_END
    + """
import sys
from llmq_kernels.native import vectors
if sys.argv[1:]:
    lesser = vectors.load(tuple(sys.argv[1:]))
    vectors._library = lambda: lesser

for d, bits in ((2, 2), (2, 6), (2, 8), (4, 4), (4, 8), (8, 8)):
    book = at_the_end(torch.ones(2**bits, d, dtype=torch.int8))
    for k, group in ((d, d), (33, 33), (64 * d, 64 * d), (65 * d - 1, 16 * d)):
        words = at_the_end(torch.full((6, -(-(-(-k // d) * bits) // 32)), -1, dtype=torch.int32))
        scales, bias = at_the_end(torch.ones(6, -(-k // group))), at_the_end(torch.ones(6))
        for m in (1, 7):
            for dtype in (torch.float32, torch.bfloat16):
                vectors.matmul(at_the_end(torch.ones(m, k, dtype=dtype)), words, scales, book, bias, group)
print("done")
"""
)


@pytest.mark.parametrize("options", [(), PATHS["plain C"]], ids=["native", "plain C"])
def test_nothing_is_read_or_written_behind_the_end_of_a_tensor(options: tuple[str, ...], lesser: Path) -> None:
    command, folder = [sys.executable, "-c", GUARDED, *options], Path(build.__file__).parents[2]
    cache = {"XDG_CACHE_HOME": str(lesser)} if options else {}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **cache}, check=False)
    if "BuildError" in done.stderr:
        pytest.skip(f"this compiler has no such path: {done.stderr.splitlines()[-1]}")
    assert done.stdout == "done\n", done.stderr


def test_what_does_not_fit_is_named() -> None:
    weight, book = random_weight(8, 128, 4, 8, 64, 1)
    words, scales, _ = weight.tensors
    x = draw_x(2, 128, torch.float32)
    cases = {
        r"words torch.int32 \[8, 7\]": (x, words[:, :7], scales, book, None, 64),
        r"words torch.int64": (x, words.long(), scales, book, None, 64),
        r"scales torch.float16 \[8, 1\] .* needs \[8, 2\]": (x, words, scales[:, :1], book, None, 64),
        r"book \[255, 3\]": (x, words, scales, book[1:, :3], None, 64),
        r"book torch.int8 \[255, 4\]": (x, words, scales, book[1:], None, 64),
        r"book torch.float32": (x, words, scales, book.float(), None, 64),
        r"bias \[1\]": (x, words, scales, book, torch.ones(1), 64),
        r"groups of 32: needs a multiple of 64": (x, words, scales, book, None, 32),
        r"groups of 0": (x, words, scales, book, None, 0),
        r"x torch.float64": (x.double(), words, scales, book, None, 64),
        r"x torch.float32 \[128\]": (x[0], words, scales, book, None, 64),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            vectors.matmul(*arguments)  # type: ignore[arg-type]


def test_the_row_refuses_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ops.Layer(2, 64, True, 8, 128, "vq4")
    row = ops.KERNELS["cpu_vectors"]
    assert row.refuses(layer, CPU, torch.bfloat16) is None
    assert row.refuses(layer._replace(group_size=128, in_features=100), CPU, torch.float32) is None
    assert row.refuses(layer._replace(group_size=32), CPU, torch.float32) == "group_size 32: needs a multiple of 64"
    assert row.refuses(layer, torch.device("cuda"), torch.float32) == "runs on a CPU, not on cuda"
    assert "multiplies float32, bfloat16 and float16" in str(row.refuses(layer, CPU, torch.float64))
    assert "looks up vectors" in str(row.refuses(layer._replace(grid="uniform"), CPU, torch.float32))
    assert "no kernel" in str(vectors.refuses(2, 5, 64, 64, torch.float32))
    monkeypatch.setattr(vectors, "_library", lambda: build.BuildError("not in this test"))
    assert row.refuses(layer, CPU, torch.float32) == "not in this test"
    with pytest.raises(build.BuildError, match="not in this test"):
        product(draw_x(1, 64, torch.float32), *random_weight(1, 64, 4, 8, 64, 0))


def test_matrix_units_take_many_tokens_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, row = ops.Layer(2, 100, True, 7, 100, "vq4"), ops.KERNELS["cpu_vectors"]
    weight, book = random_weight(7, 100, 4, 8, 100, 0)
    monkeypatch.setattr(vectors, "_has", lambda what: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert row.path is not None
    assert row.path(layer, 13, torch.bfloat16) == "rows to PyTorch"
    assert row.path(layer, 12, torch.bfloat16) == "rows in cache, bfloat16 pairs"
    assert row.path(layer, 13, torch.float16) == "rows in cache, float32"
    packed = [*weight.tensors[:2], book]
    monkeypatch.setattr(vectors, "matmul", None)  # so that nothing else can have multiplied
    x = draw_x(13, 100, torch.bfloat16)
    y = row.matmul(x, packed, None, layer)  # type: ignore[arg-type]
    assert_product(y, x, weight, None, rounded=True)
