"""The kernels with 8-bit activations that scripts/sass_report.py compiles beside the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sass import ARCHITECTURES, Report, Source, compile_kernel

K = {"even": 4096, "ragged": 4080}


@dataclass(frozen=True)
class Int8:
    """The product with 8-bit activations, or what quantizes tokens for it."""

    arch: int
    row: str  # "fused #0", "fused static #1": tokens are quantized by it; "#0": they are; "quantize": what does that
    columns: str  # key of K

    def __str__(self) -> str:
        """Return the name of its line."""
        return f"w8a8 sm_{self.arch} bf16 {self.columns} {self.row}"


ROWS = ("fused #0", "fused #1", "fused static #1", "#0", "#1", "#2", "#3", "quantize")
MMA = {90: "IGMMA.64x", 100: "UTCIMMA"}  # of other architectures, and for tiles of less than 64 outputs: IMMA.16832.S8
SMALL = "fused #0"

SAMPLE: tuple[Int8, ...] = (
    Int8(90, "fused #0", "even"),
    Int8(80, "fused #1", "ragged"),
    Int8(90, "#3", "even"),
    Int8(89, "#2", "even"),
    Int8(75, "quantize", "ragged"),
)


def jobs(arch: int) -> Iterator[Int8]:
    """Yield all that ships for one architecture."""
    for columns in K:
        for row in ROWS:
            ragged = arch in (75, 80, 90) and row in ("fused #0", "fused #1", "quantize")
            if (columns == "even" or ragged) and (row == "quantize" or ARCHITECTURES[arch].mma):
                yield Int8(arch, row, columns)


def is_shown(name: str) -> bool:
    """Return whether a line of this name is one for docs/bench/aot.md."""
    return name.startswith("w8a8") and " even " in name


def compile_job(job: Int8) -> Report:
    """Return what `job` compiles to, with its faults."""
    report = compile_kernel(source(job), job.arch)
    # Sums become floats after the loop, one by one.
    report.faults[:] = [fault for fault in report.faults if "int-to-float" not in fault]
    expected = "IMMA.16832.S8" if job.row == SMALL else MMA.get(job.arch, "IMMA.16832.S8")
    report.expect(None if job.row == "quantize" else expected)
    return report


def source(job: Int8) -> Source:
    """Return what to compile, for activations and results in bfloat16."""
    from llmq_kernels import w8a8

    k = K[job.columns]
    dtype = "*fp16" if job.arch < 80 else "*bf16"
    pointers = {"x_ptr": dtype, "a_ptr": "*fp32", "w_ptr": "*i8", "s_ptr": "*fp32", "b_ptr": dtype, "o_ptr": dtype}
    options: dict[str, Any] = dict(w8a8.COMPILE_OPTIONS)
    if job.row == "quantize":
        constants: dict[str, Any] = {"BLOCK": w8a8.QUANTIZE_BLOCK, "a_ptr": None}
        options["num_warps"] = w8a8.QUANTIZE_WARPS
        pointers |= {"q_ptr": "*i8"}
        return Source(str(job), f"{w8a8.QUANTIZE_BLOCK}", w8a8.quantize_tokens_kernel, constants, pointers, options)
    tiles = w8a8.FUSED if job.row.startswith("fused") else w8a8.TILES
    tile = tiles[int(job.row[-1])]
    constants = dict(w8a8.constants(tile, k))
    if not job.row.startswith("fused"):
        pointers["x_ptr"] = "*i8"
    elif "static" not in job.row:
        constants["a_ptr"] = None
    options |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    name = f"{tile.block_n}x{tile.block_m} w{tile.num_warps} s{tile.num_stages}"
    weights = tile.block_n * w8a8.BLOCK_K / (32 * tile.num_warps)
    return Source(str(job), name, w8a8.w8a8_kernel, constants, pointers, options, weights, 1 + 4 / k)
