"""The kernels for quantizing that scripts/sass_report.py compiles beside the column loop: scales, and packed bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sass import Report, Source, compile_kernel


@dataclass(frozen=True)
class Search:
    """The search for scales, of symmetric groups (full range) or asymmetric ones, at 4 bits."""

    arch: int
    symmetric: bool
    group_size: int
    norm: float

    def __str__(self) -> str:
        """Return the name of its line."""
        kind = "sym" if self.symmetric else "asym"
        return f"scale_search sm_{self.arch} g{self.group_size} {kind} norm {self.norm:g}"


@dataclass(frozen=True)
class Bits:
    """Packing codes into words, or unpacking them, in rows that are wider than a tile."""

    arch: int
    kernel: str  # "pack" or "unpack"
    bits: int
    padded: bool

    def __str__(self) -> str:
        """Return the name of its line."""
        return f"{self.kernel}_bits sm_{self.arch} {self.bits} bits{' padded' if self.padded else ''}"


# One tile per group and several; tiles of many rows and of few; both kinds of grid and of power.
SEARCHES = ((False, 128, 2.0), (True, 128, 2.0), (False, 128, 2.4), (True, 32, 2.0), (False, 4096, 2.0))
WAYS = ((2, False), (3, False), (4, False), (5, False), (6, False), (7, False), (8, False), (3, True))

SAMPLE: tuple[Search | Bits, ...] = (
    *(Search(arch, False, 128, 2.0) for arch in (75, 80, 90, 100)),
    Search(86, True, 32, 2.0),
    Search(89, False, 4096, 2.0),
    Bits(80, "pack", 3, False),
    Bits(86, "pack", 3, True),
    Bits(89, "unpack", 4, False),
    Bits(90, "unpack", 3, False),
    Bits(100, "pack", 8, False),
)


def jobs(arch: int) -> Iterator[Search | Bits]:
    """Yield all that ships for one architecture."""
    yield from (Search(arch, *search) for search in SEARCHES)
    yield from (Bits(arch, kernel, *way) for kernel in ("pack", "unpack") for way in WAYS)


def is_shown(name: str) -> bool:
    """Return whether a line of this name is one for docs/bench/aot.md: of packing, the streams of 3 and of 4 bits."""
    return name.startswith("scale_search") or ("pack_bits" in name and name.endswith((" 3 bits", " 4 bits")))


def compile_job(job: Search | Bits) -> Report:
    """Return what `job` compiles to, with its faults."""
    if isinstance(job, Bits):
        return compile_kernel(bits_source(job), job.arch)
    report = compile_kernel(search_source(job), job.arch)
    if report.calls < (2 if job.symmetric else 3):
        report.faults.append("a division is not correctly rounded")
    if report.rounders < (2 if job.symmetric else 4):
        report.faults.append("rounding optimized away")
    if job.norm != 2:  # a logarithm takes the exponent out of a float as an integer
        report.faults[:] = [fault for fault in report.faults if "int-to-float" not in fault]
    return report


def search_source(job: Search) -> Source:
    """Return what to compile for the search of scales, in a weight with contiguous rows."""
    from llmq_kernels import scale_search

    levels = scale_search.Levels(0, 15, job.symmetric, -8 if job.symmetric else 15, 2.0**-17, 65280.0)
    constants: dict[str, Any] = {**scale_search.constants(levels, job.group_size, job.norm), "stride_wk": 1}
    pointers = {f"{letter}_ptr": "*fp32" for letter in "wvtsz"}
    block_n, block_s = scale_search.blocks(job.group_size)
    tile = f"{block_n}x{block_s} w{scale_search.NUM_WARPS}"
    weights = scale_search.TILE / (32 * scale_search.NUM_WARPS)
    kernel, options = scale_search.scale_search_kernel, scale_search.COMPILE_OPTIONS
    return Source(str(job), tile, kernel, constants, pointers, options, weights)


def bits_source(job: Bits) -> Source:
    """Return what to compile for packing or unpacking."""
    from llmq_kernels import launch, pack_bits

    size = pack_bits.TILE if job.kernel == "pack" else pack_bits.UNPACKED
    rows, columns = pack_bits.tile(size, size)
    constants: dict[str, Any] = {"BITS": job.bits, "PADDED": job.padded, "BLOCK_R": rows}
    if job.kernel == "pack":
        kernel, pointers = pack_bits.pack_kernel, {"c_ptr": "*u8", "o_ptr": "*i32"}
        constants |= {"BLOCK_W": columns, "stride_cc": 1}
    else:
        kernel, pointers = pack_bits.unpack_kernel, {"w_ptr": "*i32", "o_ptr": "*u8"}
        constants |= {"BLOCK_C": columns, "stride_ww": 1}
    options = {"num_warps": pack_bits.NUM_WARPS, **launch.COMPILE_OPTIONS}
    return Source(str(job), f"{rows}x{columns} w{pack_bits.NUM_WARPS}", kernel, constants, pointers, options)
