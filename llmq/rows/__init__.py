"""The table of kernels: in order of preference; the last two run everything, everywhere."""

from __future__ import annotations

import torch

from llmq.kernel import Kernel, Layer
from llmq.rows.gpu import triton
from llmq.rows.lut import NATIVE_LUT, TRITON_LUT
from llmq.rows.native import NATIVE, NATIVE_FLOAT
from llmq.rows.reference import REFERENCE
from llmq.rows.torch_cpu import INT4PACK, INT8PACK
from llmq.rows.vectors import NATIVE_VECTORS, TRITON_VECTORS, VECTOR_LOOKUP


def _uniform(row: Kernel) -> Kernel:
    """Return a row that computes levels, ``(code - zero) * scale``, and so refuses grids that have them in tables."""

    def refuses(layer: Layer, device: torch.device, dtype: torch.dtype) -> str | None:
        if layer.grid != "uniform":
            return f"computes equally spaced levels, not those of the {layer.grid} grid"
        return row.refuses(layer, device, dtype)

    return row._replace(refuses=refuses)


KERNELS: dict[str, Kernel] = {
    "cpu_native": _uniform(NATIVE),
    "cpu_int4pack": _uniform(INT4PACK),
    "cpu_int8pack": _uniform(INT8PACK),
    "cpu_native_float": _uniform(NATIVE_FLOAT),
    "triton_w4a16": _uniform(triton("llmq_kernels.w4a16")),
    "triton_w8a16": _uniform(triton("llmq_kernels.w8a16")),
    "triton_w3a16": _uniform(triton("llmq_kernels.w3a16")),
    "triton_w2a16": _uniform(triton("llmq_kernels.w2a16")),
    "cpu_lut": NATIVE_LUT,
    "triton_lut": TRITON_LUT,
    "cpu_vectors": NATIVE_VECTORS,
    "triton_vectors": TRITON_VECTORS,
    "vectors": VECTOR_LOOKUP,
    "reference": REFERENCE,
}
