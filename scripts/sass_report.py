"""Compile every shipped kernel configuration for seven architectures, without a GPU, and look at the machine code.

    python scripts/sass_report.py [--sample] [--json] [--arch 80 90] [--only TEXT] [--jobs N]
    python scripts/sass_report.py --update --jobs 2

One line per compiled kernel; exit code 1 if any spills registers, needs more shared memory than the GPU allows, or
converts codes to floats one by one; if tiles are multiplied without the tensor core instruction of the architecture, or
weights loaded in pieces below 64 bits; if GPTQ's column loop has lost its exact division or rounding; or if the number
of instructions is not within 5 % of docs/bench/aot.json, which --update writes, with docs/bench/aot.md. Another version
of Triton than that of the table is said, and not compared. Instruction counts say nothing about stalls: a GPU has the
last word on speed, not on these.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Processes that are spawned find the file beside this one, and kernels that are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import sass_experts
import sass_int8
import sass_lut
import sass_quantizing
import sass_vectors
from sass import ARCHITECTURES, Report, Source, compile_kernel, estimate

BENCH = Path(__file__).resolve().parents[1] / "docs" / "bench"
TOLERANCE = 0.05  # of the number of instructions

# K and group size of what is compiled: each kind of group, and columns that end inside a step of the loop.
COLUMNS = {
    "g32": (4096, 32),
    "g64": (4096, 64),
    "g128": (4096, 128),
    "row": (4096, 4096),
    "ragged": (4080, 4080),
}
SHOWN = ("tile", "registers", "shared", "mma", "instructions", "loop", "per_weight")  # of a report, in the table


@dataclass(frozen=True)
class Variant:
    """One weight-only kernel, compiled one way."""

    kernel: str  # module of llmq_kernels
    arch: int
    dtype: str  # "fp16" or "bf16"
    columns: str  # key of COLUMNS
    zeros: bool
    # "#0" to "#3": tiles, a row of the table; "M=1", "M=4": few tokens; "dense": dequantize for many; "experts 16" to
    # "experts 128": tiles of the rows of experts; "experts alone": rows that are not sorted
    row: str

    def __str__(self) -> str:
        """Return the name of its line."""
        zeros = "asym" if self.zeros else "sym"
        return f"{self.kernel} sm_{self.arch} {self.dtype} {self.columns} {zeros} {self.row}"


@dataclass(frozen=True)
class Sum:
    """The kernel that adds split sums, for a single output of a split product."""

    arch: int

    def __str__(self) -> str:
        """Return the name of its line."""
        return f"add_splits sm_{self.arch}"


@dataclass(frozen=True)
class Block:
    """The column loop of GPTQ with a row of its table, or with it for a `single` weight."""

    arch: int
    row: int
    single: bool

    def __str__(self) -> str:
        """Return the name of its line."""
        return f"gptq_block sm_{self.arch} {'single ' if self.single else ''}#{self.row}"


Quantizing = sass_quantizing.Search | sass_quantizing.Bits
Job = Variant | Sum | Block | sass_int8.Int8 | sass_lut.Lookup | sass_vectors.Codebook | Quantizing


def jobs(sample: bool) -> Iterator[Job]:
    """Yield everything that ships, or with `sample` what exercises each constexpr branch and architecture once."""
    if sample:
        yield from SAMPLE
        return
    for kernel in ("w2a16", "w4a16", "w8a16"):
        for arch in ARCHITECTURES:
            for dtype, columns, zeros in cases(arch, kernel):
                tiles = ("#0", "#1", "#2", "#3") if ARCHITECTURES[arch].mma else ()
                for row in (*tiles, "M=1", "M=4", "dense"):
                    yield Variant(kernel, arch, dtype, columns, zeros, row)
        yield from (Variant(kernel, *case) for case in sass_experts.cases(kernel))
    for arch in ARCHITECTURES:
        yield Sum(arch)
        yield from (Block(arch, row, single) for row, single in ((0, False), (1, False), (2, False), (0, True)))
        yield from sass_int8.jobs(arch)
        yield from sass_lut.jobs(arch)
        yield from sass_quantizing.jobs(arch)
        yield from sass_vectors.jobs(arch)


def cases(arch: int, kernel: str) -> Iterator[tuple[str, str, bool]]:
    """Yield dtype, columns and zeros: all on sm_80 and sm_90, a cross-section elsewhere and of 2 and 8 bits."""
    dtypes = ("fp16", "bf16") if arch >= 80 else ("fp16",)  # Turing has no bf16
    if arch in (80, 90) and kernel == "w4a16":
        yield from ((dtype, columns, zeros) for dtype in dtypes for columns in COLUMNS for zeros in (False, True))
        return
    yield from ((dtypes[-1], columns, True) for columns in ("g32", "g128"))
    if kernel == "w4a16" or arch in (75, 80, 90):
        yield dtypes[-1], "ragged", True
        yield "fp16", "g128", False


# Every row of the tables, dtype, kind of columns, branch and architecture; the likeliest spillers are among them.
SAMPLE: tuple[Job, ...] = (
    Variant("w2a16", 90, "bf16", "g128", True, "#0"),
    Variant("w2a16", 80, "bf16", "g32", True, "#1"),
    Variant("w2a16", 89, "bf16", "g128", True, "#3"),
    Variant("w2a16", 75, "fp16", "g128", True, "M=4"),
    Variant("w2a16", 90, "bf16", "ragged", True, "dense"),
    Variant("w4a16", 90, "bf16", "g128", False, "#0"),
    Variant("w4a16", 80, "fp16", "g128", True, "#0"),
    Variant("w4a16", 90, "fp16", "g32", True, "#1"),
    Variant("w4a16", 80, "bf16", "g64", True, "#2"),
    Variant("w4a16", 90, "bf16", "g128", True, "#3"),
    Variant("w4a16", 86, "bf16", "g128", True, "#3"),
    Variant("w4a16", 100, "bf16", "g128", True, "#3"),
    Variant("w4a16", 120, "bf16", "g32", True, "#0"),
    Variant("w4a16", 80, "fp16", "ragged", True, "#3"),
    Variant("w8a16", 90, "bf16", "g128", True, "#0"),
    Variant("w8a16", 80, "fp16", "g128", False, "#1"),
    Variant("w8a16", 90, "bf16", "g32", True, "#2"),
    Variant("w8a16", 80, "bf16", "ragged", True, "#3"),
    Variant("w8a16", 89, "bf16", "g128", True, "#3"),
    Variant("w8a16", 100, "bf16", "g128", True, "#1"),
    Variant("w4a16", 90, "bf16", "g128", True, "M=1"),
    Variant("w4a16", 80, "fp16", "g32", True, "M=4"),
    Variant("w4a16", 75, "fp16", "g128", True, "M=4"),
    Variant("w4a16", 89, "bf16", "ragged", True, "M=1"),
    Variant("w8a16", 75, "fp16", "ragged", True, "M=4"),
    Variant("w8a16", 100, "bf16", "g32", True, "M=1"),
    Variant("w4a16", 75, "fp16", "g32", True, "dense"),
    Variant("w4a16", 90, "bf16", "ragged", False, "dense"),
    Variant("w8a16", 100, "bf16", "g128", True, "dense"),
    Variant("w4a16", 90, "bf16", "g128", True, "experts alone"),
    Variant("w4a16", 80, "bf16", "g32", True, "experts 128"),
    Variant("w8a16", 89, "bf16", "ragged", True, "experts 64"),
    Variant("w8a16", 100, "bf16", "g128", True, "experts 16"),
    *(Sum(arch) for arch in (75, 90)),
    *(Block(arch, 2, False) for arch in (75, 80, 90, 100)),
    Block(86, 0, False),
    Block(89, 1, False),
    Block(90, 0, True),
    *sass_int8.SAMPLE,
    *sass_lut.SAMPLE,
    *sass_quantizing.SAMPLE,
    *sass_vectors.SAMPLE,
)


def compile_job(job: Job) -> Report:
    """Return what `job` compiles to, with its faults."""
    if isinstance(job, Sum):
        return compile_kernel(sum_source(job), job.arch)
    if isinstance(job, Block):
        report = compile_kernel(block_source(job), job.arch)
        if report.calls < 2:
            report.faults.append("a division is not correctly rounded")
        if report.rounders < 2:
            report.faults.append("rounding optimized away")
        return report
    if isinstance(job, sass_int8.Int8):
        return sass_int8.compile_job(job)
    if isinstance(job, sass_lut.Lookup):
        return sass_lut.compile_job(job)
    if isinstance(job, sass_vectors.Codebook):
        return sass_vectors.compile_job(job)
    if isinstance(job, Quantizing):
        return sass_quantizing.compile_job(job)
    report = compile_kernel(source(job), job.arch)
    report.expect(ARCHITECTURES[job.arch].mma if job.row[0] in "#e" else None)
    return report


def source(variant: Variant) -> Source:
    """Return what to compile for `variant`: the row of the table that its architecture uses."""
    import torch

    from llmq_kernels import few, launch, many, tables, tiling, w2a16, w4a16, w8a16
    from llmq_kernels.layout import Packed, Weight

    layout = {"w2a16": w2a16.LAYOUT, "w4a16": w4a16.LAYOUT, "w8a16": w8a16.LAYOUT}[variant.kernel]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant.dtype]
    k, group_size = COLUMNS[variant.columns]
    table = tables.read(tables.family((variant.arch // 10, variant.arch % 10)), variant.kernel)
    per_group = (2 + 2 * variant.zeros) / group_size
    moved = layout.bits / 8 + per_group
    constants: dict[str, Any]
    if variant.row == "dense":
        kernel, warps, options = layout.dequantize, many.NUM_WARPS, {}
        constants = many.constants(layout, k, group_size, dtype)
        tile, moved = f"{many.BLOCK_N} w{warps}", moved + dtype.itemsize
    elif variant.row[0] == "M":
        row = (table.few or tables.read("default", variant.kernel).few)[-1]
        kernel, warps, options = layout.few, row.num_warps, {}
        scales = torch.empty(0, dtype=dtype)
        weight = Weight(layout, Packed(scales, scales), 4096, k, group_size)
        constants = few.constants(weight, row, int(variant.row[2:]))
        tile = f"{row.block_n}x{constants['M']} w{warps}"
    elif variant.row in sass_experts.ROWS:
        kernel, constants, tiled = sass_experts.kernel(layout, table, variant.row, dtype, k, group_size)
        warps, options = tiled.num_warps, {"num_stages": tiled.num_stages}
        tile = f"{tiled.block_n}x{tiled.block_m} w{tiled.num_warps} s{tiled.num_stages}"
    else:
        tiled = table.tiles[int(variant.row[1:])]
        kernel, warps, options = layout.tiled, tiled.num_warps, {"num_stages": tiled.num_stages}
        constants = tiling.constants(layout, tiled, dtype, k, group_size)
        tile = f"{tiled.block_n}x{tiled.block_m} w{warps} s{tiled.num_stages}"
    if not variant.zeros:
        constants["z_ptr"] = None
    pointers = dict.fromkeys(("x_ptr", "s_ptr", "z_ptr", "b_ptr", "o_ptr"), f"*{variant.dtype}")
    pointers |= {"r_ptr": "*i64", "f_ptr": "*i64"}
    pointers["w_ptr"] = {torch.int16: "*i16", torch.uint8: "*u8"}[layout.word]
    options = {**options, "num_warps": warps, **launch.COMPILE_OPTIONS}
    weights = constants["BLOCK_N"] * constants["CHUNK"] / (32 * warps)
    return Source(str(variant), tile, kernel, constants, pointers, options, weights, moved)


def sum_source(job: Sum) -> Source:
    """Return what to compile for the sum of splits."""
    from llmq_kernels import launch, splits

    # 1 is the integer that Triton compiles in, as type and value: the case that code for tensors may not
    # expect.
    constants = {"SPLITS": 8, "BLOCK": splits.BLOCK, "total": 1, "N": 1}
    pointers = {"p_ptr": "*fp32", "b_ptr": "*bf16", "o_ptr": "*bf16"}
    if job.arch < 80:
        pointers |= {"b_ptr": "*fp16", "o_ptr": "*fp16"}
    return Source(str(job), str(splits.BLOCK), splits.add_splits_kernel, constants, pointers, launch.COMPILE_OPTIONS)


def block_source(job: Block) -> Source:
    """Return what to compile for the column loop of GPTQ; for a single weight, every integer is compiled in."""
    from llmq_kernels import gptq_block

    tile, kernel = gptq_block.CONFIGS[job.row], gptq_block.gptq_block_kernel
    # A factor as Cholesky leaves it has contiguous columns.
    constants = {"LOWEST": 0.0, "HIGHEST": 15.0, "BLOCK_B": tile.block_b, "BLOCK_N": tile.block_n, "stride_ri": 1}
    if job.single:
        constants |= {n: 1 for n in kernel.arg_names if n in ("B", "N") or n.startswith("stride_")}
    pointers = {f"{letter}_ptr": "*fp32" for letter in "wyrsze"} | {"g_ptr": "*i64", "c_ptr": "*u8"}
    options = {"num_warps": tile.num_warps, **gptq_block.COMPILE_OPTIONS}
    return Source(str(job), f"{tile.block_n}x{tile.block_b} w{tile.num_warps}", kernel, constants, pointers, options)


def compare(report: Report, table: dict[str, Any]) -> Iterator[str]:
    """Yield what differs between `report` and its entry in the committed `table`."""
    if report.name not in table:
        yield "not in docs/bench/aot.json: run --update"
        return
    expected = table[report.name]["instructions"]
    if abs(report.instructions - expected) > TOLERANCE * expected:
        yield f"{report.instructions} instructions, {expected} in docs/bench/aot.json"


def markdown(committed: dict[str, Any]) -> str:
    """Return the committed table as docs/bench/aot.md: one line for each kernel at groups of 128, asymmetric."""
    lines = [
        f"Triton {committed['triton']}. Written by `python scripts/sass_report.py --update`; README.md explains it.",
        "",
        "| kernel | tile | registers | shared | tensor cores | instructions | in the loop | per weight | estimate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in committed["kernels"].items():
        group_of_128 = "g128 asym" in name and ("bf16" in name or "sm_75" in name)
        others = (module.is_shown(name) for module in (sass_int8, sass_lut, sass_quantizing, sass_vectors))
        if group_of_128 or name.startswith(("add", "gptq")) or any(others):
            cells = [f"{row[key]}" if row[key] else "" for key in SHOWN]
            lines.append(f"| {' | '.join([name.replace(' g128 asym', ''), *cells, row['estimate']])} |")
    return "\n".join(lines) + "\n"


def text(committed: dict[str, Any]) -> str:
    """Return the committed table as docs/bench/aot.json: one line for each kernel."""
    lines = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in committed["kernels"].items())
    body = ",\n".join(lines)
    return f'{{"triton": {json.dumps(committed["triton"])}, "kernels": {{\n{body}\n}}}}\n'


def judged(report: Report, job: Job) -> str:
    """Return what limits a kernel that is there to stream weights, and how far ahead the other limit is."""
    streams = isinstance(job, Variant | sass_lut.Lookup | sass_vectors.Codebook)
    if not streams or job.row not in ("#0", "M=1", "M=2", "M=4", "dense"):
        return ""
    memory, issue = estimate(report)
    limit, ratio = ("memory", issue / memory) if issue >= memory else ("issue", memory / issue)
    return f"{limit}, by {ratio:.1f}"


def show(report: Report) -> str:
    """Return a line of the report."""
    r = report
    return (
        f"{r.name:38} {r.tile:15} {r.registers:4} {r.stack:5} {r.shared:6} {r.mma:18} {r.mma_count:5} {r.i2f:3}"
        f" {r.wide_copies:5} {r.instructions:5} {r.loop:5} {r.per_weight:6.2f}  {'; '.join(r.faults)}"
    )


def compiled(chosen: list[Job], processes: int) -> Iterator[Report]:
    """Yield the report of each job, in order; afresh, so that it is what this compiler makes of these sources."""
    # Read when Triton is imported, by functions above or in processes to come.
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        if processes == 1:
            yield from map(compile_job, chosen)
            return
        with get_context("spawn").Pool(processes) as pool:
            yield from pool.imap(compile_job, chosen)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    summary, *rest = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        description=summary, epilog="\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", action="store_true", help="only one variant per branch of the kernels")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--update", action="store_true", help="write docs/bench/aot.json and aot.md, of everything")
    options = parser.parse_args(arguments)
    options.chosen = [j for j in jobs(options.sample) if j.arch in options.arch and options.only in str(j)]
    if not options.chosen:
        parser.error(f"no variant of this name: {options.only}")
    if options.update and len(options.chosen) < len(list(jobs(sample=False))):
        parser.error("--update takes everything: no --sample, --arch or --only")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 if there are faults."""
    options = parse(arguments)
    import triton

    committed = {"triton": triton.__version__, "kernels": {}}
    if not options.update:
        committed = json.loads((BENCH / "aot.json").read_text(encoding="utf-8"))
    comparable = not options.update and committed["triton"] == triton.__version__
    if not comparable and not options.update:
        print(f"docs/bench/aot.json is of Triton {committed['triton']}: counts not compared", file=sys.stderr)
    if not options.json:
        print(f"{'kernel':38} {'tile':15} regs stack shared mma{'':15} count i2f  wide instr  loop weight", flush=True)
    reports = []
    for job, report in zip(options.chosen, compiled(options.chosen, options.jobs), strict=True):
        reports.append(report)
        if comparable:
            report.faults.extend(compare(report, committed["kernels"]))
        if options.update:
            found = asdict(report)
            committed["kernels"][report.name] = {key: found[key] for key in SHOWN} | {"estimate": judged(report, job)}
        if not options.json:
            print(show(report), flush=True)
    if options.json:
        print(json.dumps([asdict(r) for r in reports], indent=1))
    failed = [r for r in reports if r.faults]
    print(f"{len(reports)} compiled, {len(failed)} with faults", file=sys.stderr)
    if options.update and not failed:
        (BENCH / "aot.json").write_text(text(committed), encoding="utf-8")
        (BENCH / "aot.md").write_text(markdown(committed), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
