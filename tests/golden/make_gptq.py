"""Writes gptq.json: small GPTQ layers, versions 1 and 2, made with integers alone from the layout's description.

    python tests/golden/make_gptq.py

Nothing here knows llmq or torch. A layer of O outputs and I inputs in groups of `GROUP` inputs:

    qweight  int32 [I·bits/32, O]  code j of an output occupies bits bits·j … of its column, lowest bits first
    qzeros   int32 [G, O·bits/32]  the same along the outputs; version 1 stores zero - 1, version 2 zero
    scales   float16 [G, O]
    g_idx    int32 [I]             input // GROUP

Tensors are stored as the hexadecimal digits of their bytes, little-endian, row by row.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

OUTPUTS, INPUTS, GROUP = 32, 32, 16
GROUPS = INPUTS // GROUP
PATH = Path(__file__).with_name("gptq.json")


def code(output: int, column: int, bits: int) -> int:
    """Return a code; every value of two, three and four bits occurs, and 249 of the 256 of eight."""
    return (37 * output + 11 * column + output * column // 7) % 2**bits


def zero(output: int, group: int, bits: int, version: int) -> int:
    """Return a zero in code units: 0 … 2^bits - 1, without 0 in version 1, which cannot store it."""
    lowest = 1 if version == 1 else 0
    return lowest + (5 * output + 3 * group) % (2**bits - lowest)


def scale(output: int, group: int) -> float:
    """Return a scale of eight significant bits, of either sign."""
    return (
        (128 + (29 * output + 71 * group) % 128) * 2.0 ** -(8 + output % 9) * (-1 if (output + group) % 3 == 0 else 1)
    )


def words(codes: list[int], bits: int) -> list[int]:
    """Return unsigned 32-bit words of the stream in which code j occupies bits ``bits·j`` and up."""
    stream = 0
    for j, value in enumerate(codes):
        stream |= value << bits * j
    return [stream >> 32 * i & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]


def layer(bits: int, version: int) -> dict[str, str]:
    """Return the stored tensors of one layer."""
    columns = [words([code(o, i, bits) for i in range(INPUTS)], bits) for o in range(OUTPUTS)]
    qweight = [columns[o][row] for row in range(INPUTS * bits // 32) for o in range(OUTPUTS)]
    minus = 1 if version == 1 else 0
    qzeros = []
    for g in range(GROUPS):
        qzeros += words([zero(o, g, bits, version) - minus for o in range(OUTPUTS)], bits)
    scales = [scale(o, g) for g in range(GROUPS) for o in range(OUTPUTS)]
    return {
        "qweight": struct.pack(f"<{len(qweight)}I", *qweight).hex(),
        "qzeros": struct.pack(f"<{len(qzeros)}I", *qzeros).hex(),
        "scales": struct.pack(f"<{len(scales)}e", *scales).hex(),
        "g_idx": struct.pack(f"<{INPUTS}i", *(i // GROUP for i in range(INPUTS))).hex(),
    }


def text() -> str:
    """Return the content of the file."""
    layers = {f"v{version}-{bits}bit": layer(bits, version) for version in (1, 2) for bits in (2, 3, 4, 8)}
    return json.dumps(layers, indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
