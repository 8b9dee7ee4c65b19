"""Random weights whose levels stand in tables, for the kernels that look them up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.formats import bits as bitstream
from llmq_kernels import naive, native

KINDS = ("one", "picked", "own")
COUNT = 5  # tables to pick from


@dataclass(frozen=True)
class Lut:
    """A weight [N, K], and what it stands for."""

    codes: Tensor  # uint8 [N, K], all of them in use if there are enough
    scales: Tensor | None  # float32 [N, G], exact in fp16 and in bf16, of both signs; None where tables are groups' own
    table: Tensor  # float32 [T, 2^bits], exact in fp16 and in bf16, in no order
    picked: Tensor | None  # uint8 [N, G]
    bits: int
    group_size: int

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the weight as numbers."""
        return naive.lut_dequantize(self.codes, self.scales, self.table, self.picked, self.group_size, dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product in float64."""
        return naive.lut_matmul(x, self.codes, self.scales, self.table, self.picked, bias, self.group_size)

    def packed(self, seed: int) -> native.Weight:
        """Return the weight as the native kernels take it, with scales and tables of a dtype that depends on `seed`."""
        dtypes = (torch.float32, torch.float16, torch.bfloat16)
        scales = None if self.scales is None else self.scales.to(dtypes[seed % 3])
        words = bitstream.pack(self.codes, self.bits)
        return native.Weight(words, scales, self.picked, self.table.to(dtypes[seed // 3 % 3]))


def random_lut(n: int, k: int, bits: int, group_size: int, kind: str, seed: int = 0) -> Lut:
    """Return a weight of one of KINDS."""
    draw = torch.Generator().manual_seed(seed)
    groups = (n, -(-k // group_size))
    codes = torch.randint(0, 2**bits, (n, k), generator=draw).to(torch.uint8)
    count = {"one": 1, "picked": COUNT, "own": n * groups[1]}[kind]
    table = torch.randn(count, 2**bits, generator=draw).bfloat16().half().float().bfloat16().float()
    picked = torch.randint(0, COUNT, groups, generator=draw).to(torch.uint8) if kind == "picked" else None
    if kind == "own":
        return Lut(codes, None, table, None, bits, group_size)
    scales = (torch.rand(groups, generator=draw) + 0.5) * torch.where(torch.rand(groups, generator=draw) < 0.5, -1, 1)
    return Lut(codes, (scales / 64).bfloat16().float(), table, picked, bits, group_size)
