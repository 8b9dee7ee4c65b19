"""The kernels for codebooks of vectors that scripts/sass_report.py compiles beside those for single weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sass import ARCHITECTURES, Report, Source, compile_kernel


@dataclass(frozen=True)
class Codebook:
    """One kernel for codebooks of vectors, compiled one way; `row` is that of `sass_report.Variant`."""

    grid: str  # key of GRIDS
    arch: int
    dtype: str  # "fp16" or "bf16"
    columns: str  # key of COLUMNS
    row: str

    def __str__(self) -> str:
        """Return the name of its line."""
        return f"{self.grid} sm_{self.arch} {self.dtype} {self.columns} {self.row}"


GRIDS = {"vq2": (2, 8), "vq2-6": (2, 6), "vq4": (4, 8), "vq8": (8, 8)}  # columns per code, bits of a code
COLUMNS = {"g64": (4096, 64), "g128": (4096, 128), "row": (4096, 4096), "ragged": (4075, 4075)}  # K and group size
# Every codebook and kind of group on sm_80 and sm_90, and a cross-section elsewhere.
CASES = (
    ("vq4", "bf16", "row"),
    ("vq8", "bf16", "g128"),
    ("vq2", "fp16", "row"),
    ("vq4", "fp16", "g128"),
    ("vq2-6", "bf16", "g64"),
    ("vq4", "fp16", "ragged"),
)

SAMPLE: tuple[Codebook, ...] = (
    Codebook("vq4", 90, "bf16", "row", "#0"),
    Codebook("vq8", 80, "bf16", "g128", "#3"),
    Codebook("vq2", 90, "fp16", "row", "#2"),
    Codebook("vq8", 89, "bf16", "g128", "M=1"),
    Codebook("vq4", 80, "fp16", "ragged", "M=2"),
    Codebook("vq4", 100, "bf16", "row", "dense"),
    Codebook("vq8", 75, "fp16", "g128", "M=4"),
)


def jobs(arch: int) -> Iterator[Codebook]:
    """Yield all that is compiled for one architecture; Turing has no tiles, and no bfloat16."""
    tiles, whole = bool(ARCHITECTURES[arch].mma), arch in (80, 90)
    rows = ("#0", "#1", "#2", "#3", "M=1", "M=2", "dense") if whole else ("#0", "#3", "M=1", "dense")
    for grid, dtype, columns in CASES if whole else CASES[:2]:
        for row in rows if tiles else ("M=1", "M=4", "dense"):
            yield Codebook(grid, arch, dtype if tiles else "fp16", columns, row)


def is_shown(name: str) -> bool:
    """Return whether a line of this name is one for docs/bench/aot.md."""
    return name.startswith("vq") and (" row " in name or "vq8" in name)


def compile_job(job: Codebook) -> Report:
    """Return what `job` compiles to, with its faults."""
    report = compile_kernel(source(job), job.arch)
    report.expect(ARCHITECTURES[job.arch].mma if job.row[0] == "#" else None)
    return report


def source(job: Codebook) -> Source:
    """Return what to compile for `job`: the row of the table that its architecture uses."""
    import torch

    from llmq_kernels import launch, many, tables
    from llmq_kernels import vector_product as product

    k, group_size = COLUMNS[job.columns]
    kind = product.Kind(4096, k, *GRIDS[job.grid], group_size)
    nothing = torch.empty(0, 256 if kind.code_bits == 8 else 64)
    weight = product.Weight(product.Packed(nothing, nothing, nothing), kind)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[job.dtype]
    table = tables.read(tables.family((job.arch // 10, job.arch % 10)), product.NAME)
    constants: dict[str, Any]
    moved, options = 1 / kind.width + 2 / group_size, {}
    pointers = dict.fromkeys(("x_ptr", "b_ptr", "o_ptr"), f"*{job.dtype}")
    pointers |= {"w_ptr": "*u8", "t_ptr": "*i32", "s_ptr": "*fp16"}
    if job.row == "dense":
        kernel, warps, constants = product.dequantize_vectors_kernel, many.NUM_WARPS, product.row_constants(weight)
        tile, moved = f"{many.BLOCK_N} w{warps}", moved + dtype.itemsize
    elif job.row[0] == "M":
        m = int(job.row[2:])
        row = next(row for row in table.few if m <= row.max_m)
        kernel, warps, tile = product.few_vectors_kernel, row.num_warps, f"{row.block_n}x{m} w{row.num_warps}"
        constants = product.few_constants(weight, row, m, dtype)
        pointers["x_ptr"] = "*i32" if kind.width == 2 else "*i64"
    else:
        tiled = table.tiles[int(job.row[1:])]
        kernel, warps, options = product.vectors_kernel, tiled.num_warps, {"num_stages": tiled.num_stages}
        constants = product.tile_constants(weight, tiled, dtype)
        tile = f"{tiled.block_n}x{tiled.block_m} w{warps} s{tiled.num_stages}"
    options = {**options, "num_warps": warps, **launch.COMPILE_OPTIONS}
    weights = constants["BLOCK_N"] * constants["CODES"] * constants["D"] / (32 * warps)
    return Source(str(job), tile, kernel, constants, pointers, options, weights, moved)
