"""Pack a small layer with other people's code, for tests/golden/test_golden_formats.py.

    PYTHON_WITH_GPTQMODEL_7.7.0 scripts/make_golden_formats.py gptqmodel
    PYTHON_WITH_COMPRESSED_TENSORS_0.19.0 scripts/make_golden_formats.py compressed-tensors
    PYTHON_WITH_COMPRESSED_TENSORS_0.16.0 scripts/make_golden_formats.py compressed-tensors
    PYTHON_WITH_ONNXRUNTIME_1.31.1 scripts/make_golden_formats.py onnxruntime

Each call writes tests/golden/<package>-<version>.safetensors, whose tensors are named CASE/LOCAL NAME. A case is named
FORMAT-BITS-sym or -asym, with -order where the columns' groups are out of order, and -short where the last one is cut
off. Neither llmq nor its environment is needed: a layer is a formula, and what is stored is what the package makes of
the dense weight that it stands for.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

N, K, GROUP = 32, 64, 16
FOLDER = Path(__file__).parents[1] / "tests" / "golden"


def codes(bits: int) -> Tensor:
    """Return int64 [N, K], every code of up to six bits among them."""
    n, k = torch.arange(N)[:, None], torch.arange(K)
    return (37 * n + 11 * k + n * k // 7) % 2**bits


def zeros(bits: int, symmetric: bool, lowest: int = 0) -> Tensor:
    """Return float32 [N, G] in code units, from `lowest` up unless symmetric."""
    n, g = torch.arange(N)[:, None], torch.arange(K // GROUP)
    found = lowest + (5 * n + 3 * g) % (2**bits - lowest)
    return (torch.full_like(found, 2 ** (bits - 1)) if symmetric else found).float()


def scales() -> Tensor:
    """Return float32 [N, G] of eight significant bits, of either sign."""
    n, g = torch.arange(N)[:, None], torch.arange(K // GROUP)
    return (128 + (29 * n + 71 * g) % 128) * 2.0 ** -(8 + n % 9) * torch.where((n + g) % 3 == 0, -1, 1)


def groups(ordered: bool) -> Tensor:
    """Return int64 [K], the group of each column."""
    return torch.arange(K) // GROUP if ordered else (torch.arange(K) * 27 + 5) % K // GROUP


def dense(bits: int, zero: Tensor, g_idx: Tensor) -> Tensor:
    """Return float32 [N, K], the weight; column k belongs to group ``g_idx[k]``."""
    return (codes(bits) - zero[:, g_idx]) * scales()[:, g_idx]


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data = weight
    return linear


def gptqmodel() -> dict[str, Tensor]:
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    found = {}
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            for order in (True, False):
                name = f"{bits}-{'sym' if symmetric else 'asym'}{'' if order else '-order'}"
                zero, g_idx = zeros(bits, symmetric, lowest=1), groups(order)
                options = {"bits": bits, "group_size": GROUP, "sym": symmetric, "in_features": K, "out_features": N}
                module = TorchLinear(**options, desc_act=not order)
                module.pack_block(_linear(dense(bits, zero, g_idx)), scales(), zero, g_idx.int())
                tensors = {local: getattr(module, local) for local in ("qweight", "qzeros", "scales", "g_idx")}
                found |= {f"gptq_v2-{name}/{local}": tensor.clone() for local, tensor in tensors.items()}
                convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=GROUP))
                tensors["qzeros"] = module.qzeros
                found |= {f"gptq-{name}/{local}": tensor.clone() for local, tensor in tensors.items()}
    for symmetric in (True, False):
        zero, g_idx = zeros(4, symmetric), groups(True)
        module = AwqTorchLinear(4, GROUP, symmetric, False, K, N)
        module.pack(_linear(dense(4, zero, g_idx)), scales().half(), zero)
        name = f"awq-4-{'sym' if symmetric else 'asym'}"
        found |= {f"{name}/{local}": getattr(module, local).clone() for local in ("qweight", "qzeros", "scales")}
    return found


def compressed_tensors() -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    padded = tuple(map(int, version("compressed-tensors").split(".")[:2])) < (0, 18)
    found = {}
    for bits in range(2, 9):
        for symmetric in (True, False):
            for order in (True, False) if padded else (True,):
                zero, g_idx = zeros(bits, symmetric), groups(order)
                args = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
                args |= {} if order else {"actorder": "group"}
                scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
                state = {"weight": dense(bits, zero, g_idx), "weight_scale": scales()}
                # the library counts from -2^(bits-1)
                state["weight_zero_point"] = (zero - 2 ** (bits - 1)).to(torch.int8)
                state |= {} if order else {"weight_g_idx": g_idx.int()}
                packed = PackedQuantizationCompressor.compress(state, scheme)
                label = "compressed-tensors-padded" if padded else "compressed-tensors"
                name = f"{label}-{bits}-{'sym' if symmetric else 'asym'}{'' if order else '-order'}"
                found |= {f"{name}/{local}": tensor.contiguous() for local, tensor in packed.items()}
    return found


def onnxruntime() -> dict[str, Tensor]:
    from onnxruntime.capi import _pybind_state as native

    found = {}
    for bits in (2, 4, 8):
        for symmetric in (True, False):
            for k in (K, K - GROUP // 2):  # the last block may be short
                code, zero = codes(bits), zeros(bits, symmetric)
                # its quantizer finds these very scales and zeros where each block has the lowest and the highest code
                code[:, 0::GROUP], code[:, 1::GROUP] = 0, 2**bits - 1
                weight = ((code - zero[:, groups(True)]) * scales().abs()[:, groups(True)])[:, :k].T.contiguous()
                count = -(-k // GROUP)
                packed = torch.zeros(N, count, GROUP * bits // 8, dtype=torch.uint8)
                scale = torch.zeros(N * count)
                points = torch.zeros(N * -(-count * bits // 8), dtype=torch.uint8)
                write = getattr(native, f"quantize_matmul_{bits}bits")
                arrays = (tensor.numpy() for tensor in (packed, weight, scale, points))
                write(*arrays, GROUP, N, k, symmetric)
                name = f"onnx-{bits}-{'sym' if symmetric else 'asym'}{'' if k == K else '-short'}"
                found |= {f"{name}/codes": packed, f"{name}/scales": scale.reshape(N, count)}
                found |= {} if symmetric else {f"{name}/zero_points": points.reshape(N, -1)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=["gptqmodel", "compressed-tensors", "onnxruntime"])
    package = parser.parse_args().package
    make = {"gptqmodel": gptqmodel, "compressed-tensors": compressed_tensors, "onnxruntime": onnxruntime}
    tensors = make[package]()
    writer = f"{package}-{version(package)}"
    save_file(tensors, FOLDER / f"{writer}.safetensors", metadata={"writer": writer})


if __name__ == "__main__":
    main()
