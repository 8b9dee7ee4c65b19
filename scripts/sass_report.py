"""Compile every shipped kernel configuration for sm_80 and sm_90, without a GPU, and look at the machine code.

    python scripts/sass_report.py [--sample] [--json] [--arch 80 90] [--only TEXT]

Triton's wheel brings ptxas and cuobjdump, so this runs anywhere. One line per compiled kernel; exit code 1
if any spills registers, needs more shared memory than the GPU allows, or converts codes to floats one by one; if a
matrix product uses no tensor cores or loads weights in pieces below 64 bits; or if GPTQ's column loop has lost its
exact division or rounding. Instruction counts say nothing about stalls: a GPU has the last word on speed, not on these.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, starmap
from pathlib import Path
from typing import Any

# Shared memory that one program may use, in bytes.
SHARED_LIMIT = {80: 166_912, 90: 232_448}
COUNTED = {
    "mma": r"\b(?:HMMA|HGMMA)\.",
    "i2f": r"\bI2F",
    "wide_copies": r"\bLDG(?:STS)?\.E\S*\.(?:64|128)\b",
    # Only a division that rounds correctly has a subroutine, for what is near the ends of the exponent's range.
    "calls": r"\bCALL\.",
    # 1.5 * 2**23, added and subtracted: see llmq_kernels.gptq_block.
    "rounders": r"\bFADD\S* .*\b-?12582912\b",
}

# K and group size of what is compiled: each kind of group, and columns that end inside a step of the loop.
COLUMNS = {
    "g32": (4096, 32),
    "g64": (4096, 64),
    "g128": (4096, 128),
    "row": (4096, 4096),
    "ragged": (4080, 4080),
}


@dataclass(frozen=True)
class Variant:
    """One kernel, compiled one way."""

    kernel: str  # module of llmq_kernels
    arch: int
    dtype: str  # "fp16" or "bf16"
    columns: str  # key of COLUMNS
    zeros: bool
    config: int  # row of the kernel's table

    def __str__(self) -> str:
        """Return the name of its line."""
        zeros = "asym" if self.zeros else "sym"
        return f"{self.kernel} sm_{self.arch} {self.dtype} {self.columns} {zeros} #{self.config}"


@dataclass(frozen=True)
class Report:
    """What the machine code of a variant looks like."""

    name: str
    tile: str  # BLOCK_N x BLOCK_M, warps, stages
    registers: int
    stack: int  # bytes of spilled registers and local arrays
    shared: int  # bytes
    mma: str  # mnemonic of its tensor core instruction
    mma_count: int
    i2f: int
    wide_copies: int  # loads of 64 or 128 bits from global memory
    calls: int  # of subroutines: exact divisions
    rounders: int  # additions that round to whole numbers
    instructions: int
    faults: list[str]


def variants(sample: bool) -> Iterator[Variant]:
    """Yield every shipped variant, or with `sample` one that exercises each constexpr branch at least once."""
    for kernel in ("w4a16", "w8a16"):
        for arch in SHARED_LIMIT:
            for config in range(4):
                for columns in COLUMNS:
                    for dtype in ("fp16", "bf16"):
                        for zeros in (False, True):
                            variant = Variant(kernel, arch, dtype, columns, zeros, config)
                            if not sample or variant in SAMPLE:
                                yield variant


# Every row of the tables, dtype, kind of columns and branch; the likeliest spillers are among them.
SAMPLE = {
    Variant("w4a16", 90, "bf16", "g128", False, 0),
    Variant("w4a16", 80, "fp16", "g128", True, 0),
    Variant("w4a16", 90, "fp16", "g32", True, 1),
    Variant("w4a16", 80, "bf16", "g64", True, 2),
    Variant("w4a16", 90, "bf16", "g128", True, 3),
    Variant("w4a16", 80, "bf16", "g128", True, 3),
    Variant("w4a16", 90, "fp16", "row", False, 2),
    Variant("w8a16", 90, "bf16", "g128", True, 0),
    Variant("w8a16", 80, "fp16", "g32", False, 1),
    Variant("w8a16", 90, "fp16", "g64", True, 2),
    Variant("w8a16", 80, "bf16", "row", True, 3),
    Variant("w4a16", 80, "fp16", "ragged", True, 3),
    Variant("w8a16", 90, "bf16", "ragged", False, 3),
}

# Rows of the table of gptq_block, and the first one again for a single weight.
BLOCKS = ((0, False), (1, False), (2, False), (0, True))


def compile_variant(variant: Variant) -> Report:
    """Return what `variant` compiles to."""
    import torch

    from llmq_kernels import tiling, w4a16, w8a16

    layout = {"w4a16": w4a16.LAYOUT, "w8a16": w8a16.LAYOUT}[variant.kernel]
    config = layout.configs[variant.config]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant.dtype]
    constants: dict[str, Any] = layout.constants(config, dtype, *COLUMNS[variant.columns])
    if not variant.zeros:
        constants["z_ptr"] = None
    pointers = dict.fromkeys(("x_ptr", "s_ptr", "z_ptr", "b_ptr", "o_ptr"), f"*{variant.dtype}")
    pointers["w_ptr"] = {torch.int16: "*i16", torch.uint8: "*u8"}[layout.word]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **tiling.COMPILE_OPTIONS}
    report = compile_kernel(
        str(variant),
        f"{config.block_n}x{config.block_m} w{config.num_warps} s{config.num_stages}",
        layout.kernel,
        constants,
        pointers,
        variant.arch,
        options,
    )
    report.faults.extend(faults(report, variant.arch))
    if not report.mma_count:
        report.faults.append("no tensor core instruction")
    if not report.wide_copies:
        report.faults.append("no load of 64 or 128 bits")
    return report


def compile_sum(arch: int) -> Report:
    """Return what the kernel that adds split sums compiles to, for a single output of a split product."""
    from llmq_kernels import tiling

    # 1 is the integer that Triton compiles in, as type and value: the case that code for tensors may not
    # expect.
    constants = {"SPLITS": 8, "BLOCK": 1024, "total": 1, "N": 1}
    pointers = {"p_ptr": "*fp32", "b_ptr": "*bf16", "o_ptr": "*bf16"}
    name, kernel = f"add_splits sm_{arch}", tiling.add_splits_kernel
    report = compile_kernel(name, "1024", kernel, constants, pointers, arch, tiling.COMPILE_OPTIONS)
    report.faults.extend(faults(report, arch))
    return report


def compile_block(arch: int, row: int, single: bool) -> Report:
    """Return what the column loop of GPTQ compiles to with a row of its table, or with it for a `single` weight.

    For that one every integer is compiled in, as type and value.
    """
    from llmq_kernels import gptq_block

    tile, kernel = gptq_block.CONFIGS[row], gptq_block.gptq_block_kernel
    # A factor as Cholesky leaves it has contiguous columns.
    constants = {"LOWEST": 0.0, "HIGHEST": 15.0, "BLOCK_B": tile.block_b, "BLOCK_N": tile.block_n, "stride_ri": 1}
    if single:
        constants |= {n: 1 for n in kernel.arg_names if n in ("B", "N") or n.startswith("stride_")}
    pointers = {f"{letter}_ptr": "*fp32" for letter in "wyrsze"} | {"g_ptr": "*i64", "c_ptr": "*u8"}
    options = {"num_warps": tile.num_warps, **gptq_block.COMPILE_OPTIONS}
    shape = f"{tile.block_n}x{tile.block_b} w{tile.num_warps}"
    report = compile_kernel(block_name(arch, row, single), shape, kernel, constants, pointers, arch, options)
    report.faults.extend(faults(report, arch))
    if report.calls < 2:
        report.faults.append("a division is not correctly rounded")
    if report.rounders < 2:
        report.faults.append("rounding optimized away")
    return report


def block_name(arch: int, row: int, single: bool) -> str:
    """Return the name of the line of `compile_block`."""
    return f"gptq_block sm_{arch} {'single ' if single else ''}#{row}"


def compile_kernel(
    name: str,
    tile: str,
    kernel: Any,
    constants: dict[str, Any],
    pointers: dict[str, str],
    arch: int,
    options: dict[str, Any],
) -> Report:
    """Return what `kernel` compiles to; arguments that are neither constants nor pointers are int32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names: list[str] = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    # What the launcher finds out by itself: all but these are multiples of 16.
    odd = {"M", "chunks", "chunks_per_split"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and n not in odd}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, sass = dump(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{name}: cuobjdump printed no resource usage: {usage[-300:]}")
    counts = {key: len(re.findall(pattern, sass)) for key, pattern in COUNTED.items()}
    mma = re.search(COUNTED["mma"] + r"\w+", sass)
    return Report(
        name=name,
        tile=tile,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=int(compiled.metadata.shared),
        mma=mma[0] if mma else "-",
        mma_count=counts["mma"],
        i2f=counts["i2f"],
        wide_copies=counts["wide_copies"],
        calls=counts["calls"],
        rounders=counts["rounders"],
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", sass, re.MULTILINE)),
        faults=[],
    )


def faults(report: Report, arch: int) -> Iterator[str]:
    """Yield what disqualifies any kernel."""
    if report.stack:
        yield f"spills {report.stack} bytes"
    if report.shared > SHARED_LIMIT[arch]:
        yield f"{report.shared} bytes of shared memory, {SHARED_LIMIT[arch]} allowed"
    if report.i2f:
        yield f"{report.i2f} int-to-float conversions"


def dump(cubin: bytes) -> tuple[str, str]:
    """Return the resource usage and the SASS that cuobjdump finds in `cubin`."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        ]
    return texts[0], texts[1]


def main() -> int:
    """Print the table; return 1 if there are faults."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sample", action="store_true", help="only one variant per branch of the kernels")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED_LIMIT), choices=list(SHARED_LIMIT))
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    arguments = parser.parse_args()
    chosen = [v for v in variants(arguments.sample) if v.arch in arguments.arch and arguments.only in str(v)]
    sums = [arch for arch in arguments.arch if arguments.only in f"add_splits sm_{arch}"]
    every_block = [(arch, row, single) for arch in arguments.arch for row, single in BLOCKS]
    blocks = [block for block in every_block if arguments.only in block_name(*block)]
    if not chosen and not sums and not blocks:
        parser.error(f"no variant of this name: {arguments.only}")

    # Both before Triton is imported, which is why the functions above import it themselves.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
    reports = []
    # A fresh cache: what is reported is what this compiler makes of these sources.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        if not arguments.json:
            print(f"{'kernel':34} {'tile':15} regs stack shared mma{'':11} count i2f wide  instr", flush=True)
        for r in chain(map(compile_variant, chosen), map(compile_sum, sums), starmap(compile_block, blocks)):
            reports.append(r)
            if not arguments.json:
                print(
                    f"{r.name:34} {r.tile:15} {r.registers:4} {r.stack:5} {r.shared:6} {r.mma:14} {r.mma_count:5}"
                    f" {r.i2f:3} {r.wide_copies:5} {r.instructions:5}  {'; '.join(r.faults)}",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps([asdict(r) for r in reports], indent=1))
    failed = [r for r in reports if r.faults]
    print(f"{len(reports)} compiled, {len(failed)} with faults", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
