"""What the machine code of a Triton kernel looks like, without a GPU: Triton's wheel brings ptxas and cuobjdump."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """What a kernel may use, and a GPU to estimate speed for, by its data sheet."""

    shared: int  # bytes of shared memory that one program may use
    mma: str  # how the mnemonic of the tensor core instruction begins that tiles have to use; "": no tiles
    gpu: str
    processors: int
    gigahertz: float
    gigabytes: float  # per second, from memory


ARCHITECTURES = {
    75: Architecture(65_536, "", "T4", 40, 1.59, 320),
    80: Architecture(166_912, "HMMA.16816", "A100 80GB", 108, 1.41, 2039),
    86: Architecture(101_376, "HMMA.16816", "A10", 72, 1.70, 600),
    89: Architecture(101_376, "HMMA.16816", "RTX 4090", 128, 2.52, 1008),
    90: Architecture(232_448, "HGMMA.64x", "H200", 132, 1.83, 4800),
    100: Architecture(232_448, "UTCHMMA", "B200", 148, 1.85, 8000),
    120: Architecture(101_376, "HMMA.16816", "RTX 5090", 170, 2.41, 1792),
}

COUNTED = {
    "mma": r"\b(?:HMMA|HGMMA|UTCHMMA|IMMA|IGMMA|UTCIMMA)\b",
    "i2f": r"\bI2F",
    "wide_copies": r"\bLDG(?:STS)?\.E\S*\.(?:64|128)\b",
    # Only a division that rounds correctly has a subroutine, for what is near the ends of the exponent's range.
    "calls": r"\bCALL\.",
    # 1.5 * 2**23, added and subtracted: see llmq_kernels.gptq_block.
    "rounders": r"\bFADD\S* .*\b-?12582912\b",
}

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A kernel, and everything that decides what it compiles to; arguments not named here are int32."""

    name: str
    tile: str  # BLOCK_N x BLOCK_M, warps, stages: for the reader
    kernel: Any  # the @triton.jit function
    constants: dict[str, Any]
    pointers: dict[str, str]  # Triton's names of their types
    options: dict[str, Any]
    weights: float = 0.0  # per thread, in one pass of the loop; 0 where that means nothing
    bytes_per_weight: float = 0.0  # that it reads and writes


@dataclass(frozen=True)
class Report:
    """What the machine code of a variant looks like."""

    name: str
    arch: int
    tile: str
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
    loop: int  # instructions of the longest loop
    per_weight: float  # of them, for each weight
    bytes_per_weight: float
    faults: list[str] = field(default_factory=list)

    def expect(self, mma: str | None) -> None:
        """Add to the faults what keeps it from streaming weights; `mma` begins the tensor core instruction of tiles."""
        if mma is not None and not self.mma.startswith(mma):
            self.faults.append(f"tensor core instruction {self.mma}, not {mma}")
        if not self.wide_copies:
            self.faults.append("no load of 64 or 128 bits")


def compile_kernel(source: Source, arch: int) -> Report:
    """Return what `source` compiles to for sm_`arch`, with what disqualifies any kernel among its faults."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names: list[str] = source.kernel.arg_names
    constants = source.constants
    signature = {n: "constexpr" if n in constants else source.pointers.get(n, "i32") for n in names}
    # What the launcher finds out by itself: all but these are multiples of 16.
    odd = {"M", "chunks", "chunks_per_split"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and n not in odd}
    ast = ASTSource(fn=source.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=source.options)
    usage, sass = dump(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{source.name}: cuobjdump printed no resource usage: {usage[-300:]}")
    counts = {key: len(re.findall(pattern, sass)) for key, pattern in COUNTED.items()}
    mma = re.search(COUNTED["mma"] + r"[.\w]*", sass)
    loop = longest_loop(sass)
    report = Report(
        name=source.name,
        arch=arch,
        tile=source.tile,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=int(compiled.metadata.shared),
        mma=mma[0] if mma else "-",
        mma_count=counts["mma"],
        i2f=counts["i2f"],
        wide_copies=counts["wide_copies"],
        calls=counts["calls"],
        rounders=counts["rounders"],
        instructions=len(INSTRUCTION.findall(sass)),
        loop=loop,
        per_weight=round(loop / source.weights, 2) if source.weights else 0.0,
        bytes_per_weight=source.bytes_per_weight,
    )
    report.faults.extend(faults(report))
    return report


def faults(report: Report) -> Iterator[str]:
    """Yield what disqualifies any kernel."""
    limit = ARCHITECTURES[report.arch].shared
    if report.stack:
        yield f"spills {report.stack} bytes"
    if report.shared > limit:
        yield f"{report.shared} bytes of shared memory, {limit} allowed"
    if report.i2f:
        yield f"{report.i2f} int-to-float conversions"


def longest_loop(sass: str) -> int:
    """Return how many instructions lie between the target of a branch back and the branch, at most; 0 without one."""
    addresses, longest = [], 0
    for found in INSTRUCTION.finditer(sass):
        address = int(found[1], 16)
        addresses.append(address)
        back = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", found[2])
        if back is not None and int(back[1], 16) < address:
            longest = max(longest, sum(int(back[1], 16) <= other for other in addresses))
    return longest


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


def estimate(report: Report) -> tuple[float, float]:
    """Return 1e9 weights per second that memory delivers, and that the schedulers get through, on the GPU of its row.

    A scheduler issues one instruction for 32 threads per clock, and an SM has four of them.
    """
    gpu = ARCHITECTURES[report.arch]
    return gpu.gigabytes / report.bytes_per_weight, gpu.processors * gpu.gigahertz * 128 / report.per_weight
