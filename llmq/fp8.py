"""Block-FP8 checkpoints (DeepSeek-V3, Qwen3-FP8 and alike), presented as the dense ones that they stand for.

A weight [N, K] is stored in float8_e4m3fn with one scale per block of bs0 × bs1 numbers, X.weight_scale_inv [⌈N/bs0⌉,
⌈K/bs1⌉], which despite its name is multiplied with: w = scale · w₈ (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
Such a weight reads as float32 products rounded to bfloat16. Banks of experts have leading dimensions more in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from llmq.checkpoint import QUANTIZATION, CheckpointReader, TensorInfo, without_quantization
from llmq.errors import CheckpointError, SpecError

_STORED, _PRESENTED = torch.float8_e4m3fn, torch.bfloat16
_SCALE = "_scale_inv"
# each holds its numbers exactly in float32; Qwen3-FP8 stores bfloat16, DeepSeek float32, powers of two come in e8m0
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_STATIC = ("activation_scale", "input_scale")


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """Return the reader of a checkpoint folder that presents its weights as dense, if it is one that can.

    Raises:
        CheckpointError: the folder is damaged or incomplete; SpecError: it is FP8, but not dynamic in blocks.
    """
    reader = CheckpointReader(path)
    if not any(config.get("quant_method") == "fp8" for config in _found(reader.config)):
        return reader
    reader.close()
    return Fp8Reader(path)


class Fp8Reader(CheckpointReader):
    """A block-FP8 folder that reads like the bfloat16 checkpoint it was made from.

    Raises:
        CheckpointError: see `CheckpointReader`, or weights and scales do not fit each other.
        SpecError: it is quantized in another way.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        found = _found(self.config)
        self._block = _block(found[0], self.path) if found else _refuse(self.path, "unknown")
        self.config = without_quantization(self.config)
        self._stored = self._infos
        self._infos = self._presented()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return tensor `name`, or only `rows` of its first dimension, on the CPU, FP8 weights as bfloat16.

        Raises:
            CheckpointError: the tensor does not exist or cannot be read.
        """
        stored = self._stored.get(name)
        if stored is None or name not in self._infos or stored.dtype != _STORED:
            return super().read(name, rows)
        first, last, _ = (rows or slice(None)).indices(stored.shape[0])
        scale, height = self._stored[name + _SCALE], self._block[0] if len(stored.shape) == 2 else 1
        weight = self._fetch(name, stored, rows)
        scales = self._fetch(name + _SCALE, scale, slice(first // height, -(-last // height))).float()
        return dequantize(weight, scales, self._block, skipped=first % height)

    def _presented(self) -> dict[str, TensorInfo]:
        """Return what the tensors look like to a reader, scales left out."""
        presented: dict[str, TensorInfo] = {}
        for name, info in self._stored.items():
            if name.endswith(_STATIC):
                _refuse(self.path, f"fp8, tensor {name}")
            if name.endswith(_SCALE):
                self._check_scale(name)
            elif info.dtype == _STORED:
                if name + _SCALE not in self._stored:
                    raise CheckpointError(
                        f"{self.path / info.file}: tensor {name} is {info.dtype}, and its scales {name + _SCALE} are "
                        "missing; the checkpoint is incomplete"
                    )
                presented[name] = info._replace(dtype=_PRESENTED, nbytes=info.nbytes * _PRESENTED.itemsize)
            else:
                presented[name] = info
        return presented

    def _check_scale(self, name: str) -> None:
        """Check that scales are numbers that are known, and one for each block of an FP8 weight."""
        scale, weight = self._stored[name], self._stored.get(name.removesuffix(_SCALE))
        file = self.path / scale.file
        if weight is None or weight.dtype != _STORED:
            found = "is missing" if weight is None else f"is {weight.dtype}"
            raise CheckpointError(
                f"{file}: tensor {name} scales {name.removesuffix(_SCALE)}, which {found}; llmq reads scales of "
                f"{_STORED} only"
            )
        if scale.dtype not in _SCALE_DTYPES:
            raise CheckpointError(f"{file}: tensor {name} has dtype {scale.dtype}; scales are floating-point numbers")
        grid = tuple(-(-extent // size) for extent, size in zip(weight.shape[-2:], self._block, strict=False))
        if len(weight.shape) < 2 or scale.shape != (*weight.shape[:-2], *grid):
            raise CheckpointError(
                f"{file}: tensor {name} has shape {list(scale.shape)}; a weight of shape {list(weight.shape)} in "
                f"blocks of {self._block[0]} x {self._block[1]} needs {[*weight.shape[:-2], *grid]}"
            )


def dequantize(weight: Tensor, scales: Tensor, block: tuple[int, int], *, skipped: int = 0) -> Tensor:
    """Return what an FP8 weight stands for, in bfloat16.

    Args:
        weight: float8_e4m3fn [..., N, K].
        scales: float32 [..., ⌈(skipped + N)/bs0⌉, ⌈K/bs1⌉], one per block.
        block: (bs0, bs1).
        skipped: rows of the first block that are not in `weight`.
    """
    dense = torch.empty(weight.shape, dtype=_PRESENTED)
    height, width = block
    count = math.prod(weight.shape[:-2])
    banks = (tensor.view(count, *tensor.shape[-2:]) for tensor in (dense, weight, scales))
    for out, part, grid in zip(*banks, strict=True):
        # one row of blocks at a time: float32 copies of everything would be four times as big as the weight
        for stripe, row in enumerate(grid):
            rows = slice(max(0, stripe * height - skipped), (stripe + 1) * height - skipped)
            out[rows] = part[rows].float() * row.repeat_interleave(width)[: part.shape[1]]
    return dense


def _found(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what config.json says of quantization, also that of a text model in another one."""
    parts = [config, config.get("text_config")]
    found = [part.get(QUANTIZATION) for part in parts if isinstance(part, dict)]
    return [entry for entry in found if isinstance(entry, dict) and entry]


def _block(config: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Return the block size (bs0, bs1) of an FP8 `quantization_config` that can be read."""
    if config.get("quant_method") != "fp8":
        _refuse(path, str(config.get("quant_method", "unknown")))
    for key, known in {"activation_scheme": "dynamic", "fmt": "e4m3", "expert_dtype": "fp8"}.items():
        if config.get(key, known) != known:
            _refuse(path, f"fp8, {key} {config[key]}")
    size = config.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or any(type(x) is not int or x < 1 for x in size):
        _refuse(path, f"fp8, weight_block_size {size}")
    return size[0], size[1]


def _refuse(path: Path, method: str) -> NoReturn:
    raise SpecError(f"{path}: is already quantized (quant_method {method}); start from the original weights")
