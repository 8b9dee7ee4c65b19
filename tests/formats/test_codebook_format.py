"""Learned levels in files: bytes by hand, any size there and back, damage, and a whole folder in use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import llmq as llmq_command
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, make_llama
from torch import Tensor

import llmq
from llmq.calibration import Calibration
from llmq.cli.inspect import take_inventory
from llmq.convert import convert
from llmq.doctor import diagnose
from llmq.driver import quantize
from llmq.errors import CheckpointError, SpecError
from llmq.formats import FORMATS, streams
from llmq.formats.stored import header_of
from llmq.grids.codebook import CodebookGrid
from llmq.packed import PackedCheckpoint
from llmq.recipe import Recipe
from llmq.solvers.rtn import rtn
from llmq.types import QuantizedWeight, QuantSpec
from llmq.verify.reference import reference_model

LLMQ = FORMATS["llmq"]


def spec_of(bits: int, group_size: int = -1) -> QuantSpec:
    return QuantSpec(bits, group_size, True, "llmq", grid="codebook")


def layer(bits: int = 3, n: int = 6, k: int = 50, group_size: int = -1) -> tuple[QuantizedWeight, QuantSpec]:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(bits)) * 2.0 ** torch.arange(-3, n - 3)[:, None]
    spec = spec_of(bits, group_size)
    return rtn(w, None, CodebookGrid(bits), spec.group_columns(k)).weight, spec


def test_tables_are_four_bytes_at_two_bits() -> None:
    # -48 … 96 in 32ds; without offsets the inner levels lie at 3 and 45
    levels = torch.tensor([[[-1.5, 0.0, 1.25, 3.0]], [[0.0, 0.0, 0.0, 0.0]]])
    codes = torch.tensor([[0, 1, 2, 3, 3], [0, 0, 0, 0, 0]], dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.ones(2, 1), torch.zeros(2, 1), CodebookGrid(2), 5, levels)
    tensors = LLMQ.pack(weight, spec_of(2))
    assert tensors["levels"].tolist() == [[[4 * (24 - 5), 256 - 48, 96, (16 - 3) | (16 - 5) << 4]], [[4 * 17, 0, 0, 0]]]
    assert tensors["levels"].dtype == torch.uint8
    assert set(tensors) == {"shape", "codes", "levels"}
    assert tensors["codes"].tolist() == [[0b11_10_01_00, 0b11], [0, 0]]
    assert torch.equal(LLMQ.unpack(tensors, spec_of(2)).dequantize(), weight.dequantize())
    off = QuantizedWeight(codes, weight.scales, weight.zeros, weight.grid, 5, levels * 1.01)
    with pytest.raises(SpecError, match="not one that files hold"):
        LLMQ.pack(off, spec_of(2))


@settings(max_examples=30)
@given(
    bits=st.sampled_from([2, 3, 4]),
    n=st.integers(1, 6),
    k=st.integers(1, 50),
    group_size=st.sampled_from([-1, 1, 7, 32, 80]),
)
def test_any_size_goes_there_and_back(bits: int, n: int, k: int, group_size: int) -> None:
    weight, spec = layer(bits, n, k, group_size)
    tensors = LLMQ.pack(weight, spec)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == LLMQ.layout(spec, n, k)
    assert LLMQ.recognize(spec, header_of(tensors), tensors.__getitem__).layout == header_of(tensors)
    found = LLMQ.unpack(tensors, spec)
    assert torch.equal(found.dequantize(), weight.dequantize())
    assert torch.equal(found.codes, weight.codes)
    again = LLMQ.pack(found, spec)
    assert all(torch.equal(again[name].view(torch.uint8), t.view(torch.uint8)) for name, t in tensors.items())
    quick, slow = streams.from_stored(tensors, spec, k), streams.of(found, bits, symmetric=True)
    assert quick is not None
    for a, b in zip(quick, slow, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "falling": lambda t: t[..., [0, 2, 1, 3, 4, 5]],
    "-128": lambda t: torch.cat([t[..., :1], torch.full_like(t[..., :1], 128), t[..., 2:]], dim=-1),
    "huge": lambda t: torch.cat([torch.full_like(t[..., :1], 4 * 34), t[..., 1:]], dim=-1),
    "float": lambda t: t.half(),
    "flat": lambda t: t.flatten(1),
    "short": lambda t: t[..., :-1],
    "int8-of-an-older-llmq": lambda t: torch.cat([t, t[..., :2]], dim=-1).view(torch.int8),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_levels_that_none_has_written_are_refused(damage: str) -> None:
    weight, spec = layer()
    tensors = LLMQ.pack(weight, spec)
    tensors["levels"] = DAMAGE[damage](tensors["levels"])
    with pytest.raises(CheckpointError, match="levels") as caught:
        LLMQ.unpack(tensors, spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["levels", "codes", "shape"])
def test_parts_that_are_missing_are_named(missing: str) -> None:
    weight, spec = layer()
    with pytest.raises(CheckpointError, match=f"{missing} is missing"):
        LLMQ.unpack({key: t for key, t in LLMQ.pack(weight, spec).items() if key != missing}, spec)


def test_a_folder_is_made_read_saved_converted_and_counted(tmp_path: Path) -> None:
    ids = torch.randint(1, WORDS, (6, 24), generator=torch.Generator().manual_seed(0))
    dense = make_llama(tmp_path / "dense", hidden_size=60, intermediate_size=90, head_dim=14, num_hidden_layers=1)
    recipe = Recipe(grid="codebook", bits=3)
    assert (recipe.group_size, recipe.sym, recipe.format) == (-1, True, "llmq")
    quantize(dense, tmp_path / "packed", recipe, calibration=Calibration(ids, None, "random", "none"))
    packed = PackedCheckpoint(tmp_path / "packed")
    model: Any = llmq.load(packed.path, dtype=torch.float32)
    with torch.no_grad():
        found, expected = model(ids).logits, reference_model(packed)(ids).logits
    # float32 sums of at most 90 products in another order, through one block
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    model.save_pretrained(tmp_path / "saved")
    saved = PackedCheckpoint(tmp_path / "saved")
    assert all(torch.equal(saved.read(key).view(torch.uint8), packed.read(key).view(torch.uint8)) for key in packed)
    convert(packed.path, tmp_path / "plain", "dense")
    content = load_file(tmp_path / "plain/model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(content[f"{name}.weight"].float(), packed.weight(name).dequantize())
    with pytest.raises(SpecError, match="use --format llmq, or llmq convert --dequantize"):
        convert(packed.path, tmp_path / "gptq", "gptq")
    with pytest.raises(SpecError, match="not those of the codebook grid; use --dequantize"):
        convert(packed.path, tmp_path / "x.gguf", "gguf")
    shown = " ".join(llmq_command("inspect", packed.path).stdout.split())
    assert "3 bits codebook grid, one table of levels per output, 7 layers" in shown
    advice = {finding.advice for finding in diagnose(packed.path) if finding.name == "engine-refuses"}
    assert advice == {"use llmq, or llmq convert --dequantize"}
    kinds = take_inventory(str(packed.path)).packed
    assert kinds is not None
    shapes = [layer.shape for layer in packed.layers.values()]
    # shape, whole bytes of codes, six bytes for a table of eight levels
    size = sum(16 + n * (-(-3 * k // 8) + 6) for n, k in shapes)
    assert kinds.bytes == size
    file = tmp_path / "packed/model.safetensors"
    tensors = load_file(file)
    tensors[f"{name}.levels"] = tensors[f"{name}.levels"].index_fill(-1, torch.tensor([0]), 255)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="levels are not between"):
        llmq.load(packed.path, dtype=torch.float32)(ids)
