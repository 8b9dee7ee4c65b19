"""What scripts/bench_gpu.py times: a dense layer, llmq's kernels, and those of others that can multiply the same codes.

Packages of others change: what they are called with is what their present signatures have. Whatever refuses, fails or
multiplies wrongly is reported with the reason, and not timed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmq import ops
from llmq.formats import bits as bitstream
from llmq.formats.streams import Stream
from llmq.grids.vq import vector_grid

NO_VECTORS = "multiplies weights on the uniform grid"
INNER_K_TILES = 8  # of tinygemm; the largest is the fastest where it divides K


@dataclass(frozen=True)
class Weight:
    """Random codes of a layer on a device, and in what dtype its activations are."""

    layer: ops.Layer
    codes: Tensor  # uint8 [N, K], or [N, K / d] on a codebook of vectors
    scales: Tensor  # float16 [N, G], exact in bfloat16
    zeros: Tensor | None  # uint8, at 8 bits int16, [N, G]; None: all are the middle code
    dtype: torch.dtype
    book: Tensor | None = None  # vectors int8 [k, d]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    def dequantize(self) -> Tensor:
        """Return what it stands for, float32 [N, K]."""
        n, k = self.layer.out_features, self.layer.in_features
        if self.book is not None:
            entries = self.book.float()[self.codes.int()].view(n, -1, self.layer.group_size)
            return (entries * self.scales.float()[..., None]).view(n, k)
        zeros = 2.0 ** (self.layer.bits - 1) if self.zeros is None else self.zeros.float()[..., None]
        return ((self.codes.view(n, -1, self.layer.group_size) - zeros) * self.scales.float()[..., None]).view(n, k)


def random_weight(layer: ops.Layer, dtype: torch.dtype, device: torch.device) -> Weight:
    """Return a weight whose entries have a variance of about 1 / K."""
    if layer.grid != "uniform":
        return _random_vectors(layer, dtype, device)
    draw = torch.Generator(device).manual_seed(0)
    n, k, bits = layer.out_features, layer.in_features, layer.bits
    groups = (n, k // layer.group_size)
    codes = torch.randint(2**bits, (n, k), generator=draw, device=device, dtype=torch.uint8)
    scales = (torch.rand(groups, generator=draw, device=device) + 0.5) / 2 ** (bits - 2) / k**0.5
    zeros = None
    if not layer.symmetric:
        zeros = torch.randint(2**bits, groups, generator=draw, device=device)
        zeros = zeros.to(torch.uint8 if bits < 8 else torch.int16)
    return Weight(layer, codes, scales.bfloat16().half(), zeros, dtype)


def _random_vectors(layer: ops.Layer, dtype: torch.dtype, device: torch.device) -> Weight:
    draw, grid = torch.Generator(device).manual_seed(0), vector_grid(layer.grid, layer.bits)
    n, k = layer.out_features, layer.in_features
    whole = {"generator": draw, "device": device}
    codes = torch.randint(grid.entries, (n, grid.codes_in(k)), dtype=torch.uint8, **whole)
    book = torch.randint(-127, 128, (grid.entries, grid.columns), dtype=torch.int8, **whole)
    scales = (torch.rand((n, k // layer.group_size), **whole) + 0.5) / 64 / k**0.5
    return Weight(layer, codes, scales.half(), None, dtype, book)


class Candidate(NamedTuple):
    """One way to multiply."""

    refuses: Callable[[Weight], str | None]  # why it cannot take the weight, or None
    pack: Callable[[Weight], Any]  # its own arrangement: tensors or modules, which copy.deepcopy copies
    multiply: Callable[[Tensor, Any, Weight], Tensor]  # x [M, K], what `pack` returned; [M, N]
    row: Callable[[Weight], str] = lambda weight: ""  # which of its kernels it is, for the table


def _llmq_row(weight: Weight) -> str:
    return ops.choose(weight.layer, weight.device, weight.dtype)


def _llmq_pack(weight: Weight) -> list[Tensor]:
    columns = 1 if weight.book is None else weight.book.shape[1]
    words = bitstream.pack(weight.codes, weight.layer.bits * columns)
    stream = Stream(words, weight.scales, weight.zeros, weight.book)
    return ops.KERNELS[_llmq_row(weight)].pack(stream, weight.layer, weight.dtype)


def _llmq_multiply(x: Tensor, packed: list[Tensor], weight: Weight) -> Tensor:
    return ops.KERNELS[_llmq_row(weight)].matmul(x, packed, None, weight.layer)


def _tinygemm_refuses(weight: Weight) -> str | None:
    layer = weight.layer
    if weight.device.type != "cuda":
        return "not on a GPU"
    if layer.grid != "uniform":
        return NO_VECTORS
    if weight.dtype != torch.bfloat16 or layer.bits != 4 or layer.group_size not in (32, 64, 128, 256):
        return "multiplies bfloat16 by 4 bits in groups of 32, 64, 128 or 256"
    if layer.out_features % 8 or layer.in_features % (16 * INNER_K_TILES):
        return f"needs N % 8 = 0 and K % {16 * INNER_K_TILES} = 0"
    return None


def _tinygemm_pack(weight: Weight) -> list[Tensor]:
    """Return its operands: the even column in the high half of a byte; ``w = (code - 8) * scale + zero``."""
    codes, scales = weight.codes, weight.scales.bfloat16()
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    offsets = torch.zeros_like(scales) if weight.zeros is None else (8 - weight.zeros.float()) * scales.float()
    both = torch.stack([scales, offsets.bfloat16()], dim=-1).transpose(0, 1).contiguous()  # [G, N, 2]
    return [torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_K_TILES), both]


def _tinygemm_multiply(x: Tensor, packed: list[Tensor], weight: Weight) -> Tensor:
    found: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed[0], weight.layer.group_size, packed[1])
    return found


def _marlin_refuses(package: str) -> Callable[[Weight], str | None]:
    def refuses(weight: Weight) -> str | None:
        layer = weight.layer
        if weight.device.type != "cuda":
            return "not on a GPU"
        if find_spec(package) is None:
            return f"{package} is not installed"
        if layer.grid != "uniform":
            return NO_VECTORS
        if layer.bits not in (4, 8) or not layer.symmetric or layer.group_size not in (32, 64, 128, layer.in_features):
            return "multiplies by 4 or 8 bits, symmetric, in groups of 32, 64, 128 or all inputs"
        if layer.out_features % 64 or layer.in_features % 128:
            return "needs N % 64 = 0 and K % 128 = 0"
        return None

    return refuses


def gptq_tensors(weight: Weight) -> tuple[Tensor, Tensor]:
    """Return the codes as int32 words [K / codes per word, N] and the scales [G, N], as GPTQ files have them."""
    words = bitstream.pack(weight.codes, weight.layer.bits).T.contiguous()
    return words, weight.scales.T.to(weight.dtype).contiguous()


def accepted(function: Callable[..., Any], **arguments: object) -> dict[str, Any]:
    """Return those of `arguments` that `function` has parameters for: signatures differ between versions."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in names}


def _vllm_pack(weight: Weight) -> list[Tensor]:
    """Return words, scales, workspace and an empty tensor, by the functions that vLLM itself loads with."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    layer = weight.layer
    n, k, per_row = layer.out_features, layer.in_features, layer.group_size == layer.in_features
    words, scales = gptq_tensors(weight)
    empty = torch.empty(0, dtype=torch.int32, device=weight.device)
    repack = _custom_ops.gptq_marlin_repack
    sizes = {"size_k": k, "size_n": n}
    packed = repack(**accepted(repack, b_q_weight=words, perm=empty, num_bits=layer.bits, **sizes))
    scales = marlin_utils.marlin_permute_scales(scales, **sizes, group_size=-1 if per_row else layer.group_size)
    return [packed, scales, marlin_utils.marlin_make_workspace_new(weight.device), empty]


def _vllm_multiply(x: Tensor, packed: list[Tensor], weight: Weight) -> Tensor:
    from vllm.model_executor.layers.quantization.utils.marlin_utils import apply_gptq_marlin_linear as apply
    from vllm.scalar_type import scalar_types

    words, scales, workspace, empty = packed
    found: Tensor = apply(
        **accepted(
            apply,
            input=x,
            weight=words,
            weight_scale=scales,
            weight_zp=empty,
            g_idx=empty,
            g_idx_sort_indices=empty,
            workspace=workspace,
            wtype=scalar_types.uint4b8 if weight.layer.bits == 4 else scalar_types.uint8b128,
            output_size_per_partition=weight.layer.out_features,
            input_size_per_partition=weight.layer.in_features,
            is_k_full=True,
        )
    )
    return found


def _gptqmodel_pack(weight: Weight) -> torch.nn.Module:
    """Return its layer, as `GPTQModel.load` leaves it; the first one compiles the extension."""
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

    layer = weight.layer
    words, scales = gptq_tensors(weight)
    module = MarlinLinear(
        bits=layer.bits,
        group_size=-1 if layer.group_size == layer.in_features else layer.group_size,
        desc_act=False,
        sym=True,
        in_features=layer.in_features,
        out_features=layer.out_features,
        register_buffers=True,
        dtype=weight.dtype,
    ).to(weight.device)
    module.qweight.data, module.scales.data = words, scales
    module.post_init()
    made: torch.nn.Module = module.eval()
    return made


def _call(x: Tensor, module: torch.nn.Module, weight: Weight) -> Tensor:
    found: Tensor = module(x)
    return found


DENSE = "dense"
CANDIDATES: dict[str, Candidate] = {
    DENSE: Candidate(
        lambda weight: None,
        lambda weight: [weight.dequantize().to(weight.dtype)],
        lambda x, packed, weight: linear(x, packed[0]),
    ),
    "llmq": Candidate(lambda weight: None, _llmq_pack, _llmq_multiply, _llmq_row),
    "tinygemm": Candidate(_tinygemm_refuses, _tinygemm_pack, _tinygemm_multiply),
    "marlin of vllm": Candidate(_marlin_refuses("vllm"), _vllm_pack, _vllm_multiply),
    "marlin of gptqmodel": Candidate(_marlin_refuses("gptqmodel"), _gptqmodel_pack, _call),
}
