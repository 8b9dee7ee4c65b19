"""Block-FP8 weights, number by number: each is its code times the scale of the block that it lies in."""

import numpy as np


def e4m3(code: int) -> float:
    """Return the number of an E4M3 byte (arXiv:2209.05433, table 1): no infinities, NaN where all bits are set."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def dequantize(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Return the weights [N, K] of uint8 codes [N, K] and scales [ceil(N/bs0), ceil(K/bs1)], in float64."""
    out = np.empty(codes.shape, dtype=np.float64)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            out[n, k] = e4m3(int(codes[n, k])) * float(scales[n // block[0], k // block[1]])
    return out
