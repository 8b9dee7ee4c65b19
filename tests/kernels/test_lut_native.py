"""Native kernels for tables of levels against float64, on every path that a processor can take through them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lut_cases import KINDS, Lut, random_lut
from native_cases import AT_THE_END, Packed, assert_product, needs_compiler
from torch import Tensor

from llmq_kernels import naive, native
from llmq_kernels.native import build

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
FEW = 4  # tokens that meet unscaled levels
# what the same source is on lesser processors; -O1 compiles in half the time
PATHS = {
    "no permutations of bytes": ("-DTABLE", "-O1", "-mno-avx512vbmi"),
    "no products of pairs": ("-DTABLE", "-O1", "-mno-avx512bf16"),
    "no AVX-512": ("-DTABLE", "-O1", "-mno-avx512f"),
}
pytestmark = [pytest.mark.usefixtures("poisoned_empty"), needs_compiler]


def draw_x(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k)).to(dtype)


def check(lut: Lut, m: int, dtype: torch.dtype, seed: int) -> None:
    """Compare a product; levels are exact in bfloat16, so few tokens meet exact weights."""
    n, k = lut.codes.shape
    x = draw_x(m, k, dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) if seed % 2 else None
    weight = lut.packed(seed)
    y = native.matmul(x, weight, bias, lut.bits, lut.group_size)
    pairs = build.has_pairs(build.library(lut.bits, True))
    in_steps = lut.group_size % 32 == 0 or lut.group_size >= k or (lut.group_size == 16 and len(lut.table) == 1)
    rounded = dtype == torch.bfloat16 and ((m > FEW and pairs and in_steps) or m > native._TILES)
    held = Packed((weight.words, torch.empty(0), None), lut.dense(), lut.bits, lut.group_size)
    assert_product(y, x, held, bias, rounded=rounded)


def check_rows(lut: Lut, seed: int) -> None:
    """Compare the numbers of some rows, exactly: the product of scale and level is a float32, rounded if need be."""
    n, k = lut.codes.shape
    first = n // 3
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((n, k), float("nan"), dtype=dtype)
        found = native.dequantize(lut.packed(seed), k, lut.bits, lut.group_size, (first, n), out)
        assert torch.equal(found, lut.dense(torch.float32)[first:].to(dtype))
        assert bool(out[n - first :].isnan().all())


@pytest.mark.parametrize("bits", range(1, 9))
@settings(max_examples=14, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 37), st.integers(1, 300)),
    group_size=st.sampled_from([8, 16, 24, 32, 64, 128, -1]),
    kind=st.sampled_from(KINDS),
    m=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_product_is_that_of_float64(
    bits: int, shape: tuple[int, int], group_size: int, kind: str, m: int, dtype: torch.dtype, seed: int
) -> None:
    lut = random_lut(*shape, bits, shape[1] if group_size < 0 else group_size, kind, seed)
    check(lut, m, dtype, seed)
    check_rows(lut, seed)


@pytest.mark.parametrize("bits", [4, 7])
@pytest.mark.parametrize("k", [16, 48, 64, 90, 117, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_half_a_step(bits: int, k: int, kind: str) -> None:
    for m in (1, 3, 4, 5, 14):
        for dtype in DTYPES:
            check(random_lut(9, k, bits, 16, kind, k), m, dtype, m)
    check_rows(random_lut(9, k, bits, 16, kind, k), k)


@pytest.fixture(scope="module")
def lesser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache for what tests alone compile."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(("path", "bits"), [*zip(PATHS, (3, 7, 1), strict=True)])
def test_every_path_is_that_of_float64(path: str, bits: int, lesser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(lesser))
    try:
        kernels = build.load(bits, PATHS[path])
    except build.BuildError as error:
        pytest.skip(f"this compiler has no such path: {error}")
    monkeypatch.setattr(build, "library", lambda *_: kernels)
    for seed in range(18):
        group_size = [8, 16, 24, 32, 64, 128][seed % 6]
        lut = random_lut(1 + seed * 5 % 21, 1 + seed * 67 % 290, bits, group_size, KINDS[seed // 2 % 3], seed)
        for dtype in DTYPES:
            check(lut, 1 + seed % 13, dtype, seed)
        check_rows(lut, seed)


@pytest.mark.parametrize("bits", [4, 8])
def test_levels_are_rounded_to_bfloat16_for_few_tokens(bits: int) -> None:
    """A level is rounded once, and the scale is applied to the sum."""
    lut = random_lut(9, 64, bits, 32, "one")
    fine = lut.table * (1 + 2**-10)
    weight = lut.packed(0)._replace(table=fine)
    x = torch.eye(64, dtype=torch.bfloat16)[:4]
    y = native.matmul(x, weight, None, bits, 32)
    pairs = build.has_pairs(build.library(bits, True))
    levels = fine.bfloat16().float() if pairs else fine
    wanted = naive.lut_dequantize(lut.codes, lut.scales, levels, None, 32, torch.float32).to(torch.bfloat16)
    assert torch.equal(y, wanted[:, :4].T)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 65504.0, 2.0**-24, -0.0])
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_level_means_what_it_does_to_pytorch(value: float, bits: int, dtype: torch.dtype) -> None:
    lut = random_lut(2, 64, bits, 64, "one")
    lut.table[0, 1::2] = value
    weight = lut.packed(0)._replace(table=lut.table.to(dtype))
    assert lut.scales is not None
    found = native.dequantize(weight, 64, bits, 64, (0, 2), torch.empty(2, 64))
    wanted = lut.table.to(dtype).float()[0][lut.codes.long()] * lut.scales
    assert torch.equal(found.nan_to_num(1e30), wanted.nan_to_num(1e30))
    assert torch.equal(found.signbit()[wanted == 0], wanted.signbit()[wanted == 0])


GUARDED = (
    AT_THE_END
    + """
from llmq_kernels import native

for bits in (1, 2, 3, 4, 6, 8):
    for k, group in ((4, 4), (33, 33), (70, 32), (41, 8), (48, 16)):
        n, g = 6, -(-k // group)
        words = at_the_end(torch.full((n, -(-k * bits // 32)), -1, dtype=torch.int32))
        for dtype in (torch.float32, torch.float16):
            own = native.Weight(words, None, None, at_the_end(torch.ones(n * g, 2**bits, dtype=dtype)))
            picked = at_the_end(torch.ones(n, g, dtype=torch.uint8))
            table = at_the_end(torch.ones(2, 2**bits, dtype=dtype))
            scales = at_the_end(torch.ones(n, g))
            one = native.Weight(words, scales, None, at_the_end(torch.ones(1, 2**bits, dtype=dtype)))
            for weight in (own, one, native.Weight(words, scales, picked, table)):
                for m in (1, 7):
                    for x in (torch.float32, torch.bfloat16):
                        native.matmul(at_the_end(torch.ones(m, k, dtype=x)), weight, None, bits, group)
print("done")
"""
)


def test_nothing_is_read_or_written_behind_the_end_of_a_tensor() -> None:
    command = [sys.executable, "-c", GUARDED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(native.__file__).parents[2], check=False)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_GRAIN", 1)
    lut = random_lut(101, 320, 4, 64, kind)
    before = torch.get_num_threads()
    for m in (1, 11):
        x, found = draw_x(m, 320, torch.bfloat16), []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(native.matmul(x, lut.packed(0), None, 4, 64))
        torch.set_num_threads(before)
        assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_slabs_are_the_same_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_SLAB", 4000)  # several slabs, the last of them short
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    lut = random_lut(37, 200, 3, 32, kind)
    x = draw_x(21, 200, torch.bfloat16)
    y = native.matmul(x, lut.packed(0), None, 3, 32)
    held = Packed((lut.codes, lut.codes, None), lut.dense(), 3, 32)
    assert_product(y, x, held, None, rounded=True)


def test_what_does_not_fit_is_named() -> None:
    weight = random_lut(8, 64, 4, 32, "one").packed(0)
    assert weight.table is not None
    x = draw_x(2, 64, torch.float32)
    cases = {
        r"table torch.float32 \[1, 15\]": weight._replace(table=weight.table[:, :15]),
        r"table torch.float64": weight._replace(table=weight.table.double()),
        r"table torch.float32 \[5, 16\] .* needs \[16, 16\]": weight._replace(table=weight.table.repeat(5, 1)),
        r"zeros torch.float32": weight._replace(zeros=weight.scales),
        "scales: there are none, and no table": weight._replace(scales=None, table=None),
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            native.matmul(x, wrong, None, 4, 32)
    native.check_tables(None, weight.table)
    native.check_tables(torch.tensor([[0, 1]]), weight.table.repeat(2, 1))
    for wrong_index in (-1, 2):
        with pytest.raises(ValueError, match="are picked: there are 2"):
            native.check_tables(torch.tensor([[0, wrong_index]]), weight.table.repeat(2, 1))


def test_refusals_and_paths_are_those_of_this_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    only = {True: None, False: build.BuildError("not in this test")}
    monkeypatch.setattr(build, "_library", lambda bits, table: only[table])
    assert native.refuses(4, 64, 32, torch.float32, table=True) is None
    assert native.refuses(4, 64, 32, torch.float32) == "not in this test"
    monkeypatch.setattr(build, "has_pairs", lambda _: True)
    monkeypatch.setattr(build, "is_wide", lambda _: True)
    assert native.path(1, 64, 4, 32, torch.bfloat16, table=True) == "from codes, bfloat16 pairs"
    assert native.path(4, 64, 4, 16, torch.bfloat16, table=True) == "rows in cache, float32"
    assert native.path(4, 64, 4, 16, torch.bfloat16, table=True, one=True) == "from codes, bfloat16 pairs"
    assert native.path(4, 64, 4, 16, torch.float32, table=True, one=True) == "rows in cache, float32"


@pytest.mark.parametrize("kind", KINDS)
def test_naive_agrees_with_a_loop(kind: str) -> None:
    lut = random_lut(3, 10, 2, 4, kind)
    for n in range(3):
        for k in range(10):
            group = n * 3 + k // 4
            which = {"one": 0, "own": group}.get(kind)
            if which is None:
                assert lut.picked is not None
                which = int(lut.picked.flatten()[group])
            level = float(lut.table[which, int(lut.codes[n, k])])
            scale = 1.0 if lut.scales is None else float(lut.scales.flatten()[group])
            assert float(lut.dense()[n, k]) == level * scale
    x, bias = torch.ones(2, 10), torch.arange(3.0)
    assert torch.equal(lut.product(x, bias), lut.dense().sum(1).expand(2, 3) + bias)
