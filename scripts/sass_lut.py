"""The kernels for tables of levels that scripts/sass_report.py compiles beside those for equally spaced ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sass import ARCHITECTURES, Report, Source, compile_kernel


@dataclass(frozen=True)
class Lookup:
    """One kernel for tables of levels, compiled one way; `row` is that of `sass_report.Variant`."""

    kernel: str  # "lut4": 16 levels to a table; "lut8": 256
    arch: int
    dtype: str  # "fp16" or "bf16"
    columns: str  # key of COLUMNS
    tables: str  # "one", "picked" of several, or each group's "own"
    row: str

    def __str__(self) -> str:
        """Return the name of its line."""
        return f"{self.kernel} sm_{self.arch} {self.dtype} {self.columns} {self.tables} {self.row}"


COLUMNS = {
    "g16": (4096, 16),
    "g32": (4096, 32),
    "g128": (4096, 128),
    "row": (4096, 4096),
    "ragged": (4080, 4080),
}  # K and group size
ROWS = ("#0", "#1", "#2", "#3", "M=1", "M=4", "dense")
# Every kind of table and of group, on sm_80 and sm_90, and a cross-section elsewhere.
CASES = {
    "lut4": (
        ("bf16", "g128", "one"),
        ("bf16", "g128", "picked"),
        ("fp16", "g32", "own"),
        ("fp16", "ragged", "one"),
        ("bf16", "g16", "one"),
    ),
    "lut8": (("bf16", "g128", "one"), ("fp16", "g32", "picked"), ("bf16", "row", "own")),
}

SAMPLE: tuple[Lookup, ...] = (
    Lookup("lut4", 90, "bf16", "g128", "one", "#0"),
    Lookup("lut4", 80, "fp16", "g32", "own", "#3"),
    Lookup("lut4", 89, "bf16", "g128", "one", "M=1"),
    Lookup("lut4", 75, "fp16", "g128", "one", "dense"),
    Lookup("lut8", 100, "bf16", "g128", "one", "#0"),
    Lookup("lut8", 80, "fp16", "g32", "picked", "#3"),
    Lookup("lut8", 90, "bf16", "row", "own", "M=1"),
)


def jobs(arch: int) -> Iterator[Lookup]:
    """Yield all that is compiled for one architecture; Turing has no tiles, and no bfloat16."""
    tiles = bool(ARCHITECTURES[arch].mma)
    for kernel, cases in CASES.items():
        for dtype, columns, tables in cases if arch in (80, 90) else cases[:1]:
            for row in ROWS if arch in (80, 90) else ("#0", "#3", "M=1", "dense"):
                if tiles or row[0] != "#":
                    yield Lookup(kernel, arch, dtype if tiles else "fp16", columns, tables, row)


def is_shown(name: str) -> bool:
    """Return whether a line of this name is one for docs/bench/aot.md."""
    return name.startswith("lut") and " g128 one " in name


def compile_job(job: Lookup) -> Report:
    """Return what `job` compiles to, with its faults."""
    report = compile_kernel(source(job), job.arch)
    report.expect(ARCHITECTURES[job.arch].mma if job.row[0] == "#" else None)
    return report


def source(job: Lookup) -> Source:
    """Return what to compile for `job`: the row of the table that its architecture uses."""
    import torch

    from llmq_kernels import launch, lut, many, tables

    bits = int(job.kernel[3:])
    layout, dtype = lut.layout_of(bits), {"fp16": torch.float16, "bf16": torch.bfloat16}[job.dtype]
    k, group_size = COLUMNS[job.columns]
    levels = torch.empty(1 if job.tables == "one" else 2, 2**bits, dtype=dtype)
    picked = levels if job.tables == "picked" else None
    weight = lut.Weight(lut.Packed(levels, levels, levels, picked), 4096, k, bits, group_size)
    table = tables.read(tables.family((job.arch // 10, job.arch % 10)), layout.name)
    constants: dict[str, Any]
    per_group = {"one": 2, "picked": 3, "own": 2 * 2**bits}[job.tables] / group_size
    moved, options = bits / 8 + per_group, {}
    if job.row == "dense":
        kernel, warps, constants = layout.dequantize, many.NUM_WARPS, lut.row_constants(weight)
        tile, moved = f"{many.BLOCK_N} w{warps}", moved + dtype.itemsize
    elif job.row[0] == "M":
        row = (table.few or tables.read("default", layout.name).few)[-1]
        kernel, warps, constants = layout.few, row.num_warps, lut.few_constants(weight, row, int(job.row[2:]))
        tile = f"{row.block_n}x{constants['M']} w{warps}"
    else:
        tiled = table.tiles[int(job.row[1:])]
        kernel, warps, constants = layout.tiled, tiled.num_warps, lut.tile_constants(weight, tiled, dtype)
        tile, options = (
            f"{tiled.block_n}x{tiled.block_m} w{warps} s{tiled.num_stages}",
            {"num_stages": tiled.num_stages},
        )
    if job.tables != "picked":
        constants["g_ptr"] = None
    if job.tables == "own":
        constants["s_ptr"] = None
    pointers = dict.fromkeys(("x_ptr", "t_ptr", "s_ptr", "b_ptr", "o_ptr"), f"*{job.dtype}") | {"g_ptr": "*u8"}
    pointers["w_ptr"] = {torch.int16: "*i16", torch.uint8: "*u8"}[layout.word]
    options = {**options, "num_warps": warps, **launch.COMPILE_OPTIONS}
    weights = constants["BLOCK_N"] * constants["CHUNK"] / (32 * warps)
    return Source(str(job), tile, kernel, constants, pointers, options, weights, moved)
