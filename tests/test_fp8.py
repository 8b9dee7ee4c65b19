"""Block-FP8 sources read like the bfloat16 checkpoints that they stand for, and others are refused."""

import json
from pathlib import Path
from typing import Any

import fp8_reference
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import make_llama
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from llmq import quantize
from llmq.checkpoint import CheckpointReader
from llmq.errors import CheckpointError, SpecError
from llmq.fp8 import Fp8Reader, dequantize, open_checkpoint
from llmq.preflight import prepare
from llmq.recipe import Recipe

E4M3 = torch.float8_e4m3fn
QUANTIZATION = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [4, 3]}


def codes(*shape: int, seed: int = 0) -> Tensor:
    """Return all kinds of E4M3 numbers, NaN left out."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.where((raw & 0x7F) == 0x7F, raw - 1, raw).view(E4M3)


def scales(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-4


def expected(weight: Tensor, grid: Tensor, block: tuple[int, int]) -> Tensor:
    return torch.from_numpy(fp8_reference.dequantize(weight.view(torch.uint8).numpy(), grid.double().numpy(), block))


def write(folder: Path, content: dict[str, Tensor], quantization: object = QUANTIZATION, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(content, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "m", "quantization_config": quantization, **config}))
    return folder


def test_reference_knows_the_format() -> None:
    every = np.array([fp8_reference.e4m3(code) for code in range(256)])
    torchs = torch.arange(256).to(torch.uint8).view(E4M3).double().numpy()
    np.testing.assert_array_equal(every, torchs)


@given(
    n=st.integers(1, 9),
    k=st.integers(1, 9),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    start=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_dequantized_like_the_reference(n: int, k: int, block: tuple[int, int], start: int, seed: int) -> None:
    weight, grid = codes(n, k, seed=seed), scales(-(-n // block[0]), -(-k // block[1]), seed=seed)
    exact = expected(weight, grid, block)
    # rounded to float32, then to bfloat16: relative errors of 2**-24 and 2**-8, half of the last of 8 bits
    torch.testing.assert_close(dequantize(weight, grid, block).double(), exact, rtol=2**-8 * (1 + 2**-14), atol=1e-37)
    start = min(start, n)
    rest = dequantize(weight[start:], grid[start // block[0] :], block, skipped=start % block[0])
    assert torch.equal(rest, dequantize(weight, grid, block)[start:])


def test_products_are_rounded_once_from_float32() -> None:
    weight, grid = codes(8, 6), scales(2, 2)
    exact = weight.float() * grid.repeat_interleave(4, 0).repeat_interleave(3, 1)
    assert torch.equal(dequantize(weight, grid, (4, 3)), exact.bfloat16())


@pytest.mark.parametrize("shape", [(8, 6), (4, 9), (3, 8, 6)], ids=str)
def test_the_same_as_transformers(shape: tuple[int, ...]) -> None:
    weight, grid = codes(*shape), scales(*shape[:-2], shape[-2] // 4, shape[-1] // 3)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, grid, output_dtype=torch.bfloat16)
    assert torch.equal(dequantize(weight, grid, (4, 3)), theirs)


def source() -> dict[str, Tensor]:
    return {
        "norm.weight": torch.arange(5.0).bfloat16(),
        "a.weight": codes(10, 7),
        "a.weight_scale_inv": scales(3, 3),
        "a.bias": torch.ones(10).bfloat16(),
        "experts.up_proj": codes(3, 5, 4),
        "experts.up_proj_scale_inv": scales(3, 2, 2, seed=1),
        "lm_head.weight": torch.ones(2, 2),
    }


def test_reads_like_a_dense_checkpoint(tmp_path: Path) -> None:
    stored = source()
    reader = open_checkpoint(write(tmp_path / "m", stored, dtype="bfloat16", text_config={"quantization_config": {}}))
    assert reader.config == {"model_type": "m", "dtype": "bfloat16", "text_config": {}}
    dense = ["a.bias", "a.weight", "experts.up_proj", "lm_head.weight", "norm.weight"]
    assert reader.keys() == list(reader) == dense
    for name in dense:
        info, tensor = reader.info(name), reader.read(name)
        assert (info.shape, info.dtype, info.nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert info.file == "model.safetensors"
    for name in ("a.bias", "lm_head.weight", "norm.weight"):
        assert torch.equal(reader.read(name), stored[name])
    assert torch.equal(reader.read("a.weight"), dequantize(stored["a.weight"], stored["a.weight_scale_inv"], (4, 3)))
    for i in range(3):
        weight, grid = stored["experts.up_proj"][i], stored["experts.up_proj_scale_inv"][i]
        assert torch.equal(reader.read("experts.up_proj")[i], dequantize(weight, grid, (4, 3)))
    for name in ("a.weight_scale_inv", "nothing.weight"):
        with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
            reader.read(name)


@pytest.mark.parametrize("name", ["a.weight", "experts.up_proj", "a.bias"])
@pytest.mark.parametrize(
    "rows", [slice(0, 2), slice(1, 3), slice(5, 9), slice(-1, None), slice(2, 2), slice(8, 99)], ids=str
)
def test_rows(name: str, rows: slice, tmp_path: Path) -> None:
    reader = open_checkpoint(write(tmp_path / "m", source()))
    assert torch.equal(reader.read(name, rows), reader.read(name)[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
def test_scales_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    grid = scales(3, 3).log2().round().exp2().to(dtype)
    weight = codes(10, 7)
    reader = open_checkpoint(write(tmp_path / "m", {"a.weight": weight, "a.weight_scale_inv": grid}))
    assert torch.equal(reader.read("a.weight"), dequantize(weight, grid.float(), (4, 3)))


def test_nested_quantization_config(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", source(), None, text_config={"quantization_config": QUANTIZATION, "layers": 2})
    reader = open_checkpoint(folder)
    assert reader.config["text_config"] == {"layers": 2}
    assert reader.info("a.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", [None, {}, {"quant_method": "gptq", "bits": 4}, {"bits": 4}], ids=str)
def test_other_folders_get_the_plain_reader(quantization: object, tmp_path: Path) -> None:
    reader = open_checkpoint(write(tmp_path / "m", {"a.weight": torch.ones(2)}, quantization))
    assert type(reader) is CheckpointReader
    assert reader.config["quantization_config"] == quantization


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"activation_scheme": "static"}, "fp8, activation_scheme static"),
        ({"weight_block_size": None}, "fp8, weight_block_size None"),
        ({"weight_block_size": [128]}, r"fp8, weight_block_size \[128\]"),
        ({"weight_block_size": [0, 128]}, r"fp8, weight_block_size \[0, 128\]"),
        ({"weight_block_size": "128"}, "fp8, weight_block_size 128"),
        ({"fmt": "e5m2"}, "fp8, fmt e5m2"),
        ({"expert_dtype": "fp4"}, "fp8, expert_dtype fp4"),
    ],
    ids=str,
)
def test_other_fp8_is_refused(change: dict[str, object], seen: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", source(), {**QUANTIZATION, **change})
    words = rf"{folder}: is already quantized \(quant_method {seen}\); start from the original weights"
    with pytest.raises(SpecError, match=words):
        open_checkpoint(folder)


@pytest.mark.parametrize("quantization", [None, {"quant_method": "gptq"}], ids=str)
def test_reader_of_its_own_takes_fp8_only(quantization: object, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is already quantized"):
        Fp8Reader(write(tmp_path / "m", source(), quantization))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight_scale_inv": None}, r"tensor a\.weight is torch\.float8_e4m3fn, and its scales .* are missing"),
        ({"a.weight": None}, r"tensor a\.weight_scale_inv scales a\.weight, which is missing"),
        ({"a.weight": torch.zeros(10, 7, dtype=torch.int8)}, r"scales a\.weight, which is torch\.int8; llmq reads"),
        ({"a.weight_scale_inv": torch.zeros(3, 3, dtype=torch.uint8)}, r"has dtype torch\.uint8; scales are floating"),
        ({"a.weight_scale_inv": scales(3, 2)}, r"has shape \[3, 2\]; a weight of shape \[10, 7\] in blocks of 4 x 3"),
        ({"a.weight_scale_inv": scales(2, 3)}, r"has shape \[2, 3\].* needs \[3, 3\]"),
        ({"a.weight_scale_inv": torch.tensor(1.0)}, r"has shape \[\]; "),
        ({"experts.up_proj_scale_inv": scales(2, 2)}, r"has shape \[2, 2\].* needs \[3, 2, 2\]"),
        ({"b.weight": codes(4)}, r"tensor b\.weight is torch\.float8_e4m3fn, and its scales"),
        ({"b.weight": codes(4), "b.weight_scale_inv": scales(1)}, r"has shape \[1\]; a weight of shape \[4\]"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_weights_and_scales_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {name: tensor for name, tensor in {**source(), **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        open_checkpoint(write(tmp_path / "m", content))


def test_static_scales_of_activations_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {**source(), "a.activation_scale": torch.tensor(1.0)})
    with pytest.raises(SpecError, match=r"\(quant_method fp8, tensor a\.activation_scale\)"):
        open_checkpoint(folder)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make a tiny Llama whose linears are FP8 in blocks of 48 x 40, which divide nothing, and the same one dense."""
    fp8 = make_llama(tmp_path_factory.mktemp("fp8") / "fp8", tie_word_embeddings=True, dtype="bfloat16")
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in load_file(fp8 / "model.safetensors").items():
        dense[name] = stored[name] = tensor.bfloat16()
        if name.endswith("proj.weight"):
            grid = scales(-(-tensor.shape[0] // 48), -(-tensor.shape[1] // 40))
            stored[name], stored[f"{name}_scale_inv"] = codes(*tensor.shape), grid
            dense[name] = dequantize(stored[name], grid, (48, 40))
    config = json.loads((fp8 / "config.json").read_text())
    folder = write(fp8.parent / "dense", dense)
    for file in fp8.iterdir():
        (folder / file.name).write_bytes(file.read_bytes()) if file.suffix == ".json" else None
    save_file(stored, fp8 / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {**QUANTIZATION, "weight_block_size": [48, 40], "modules_to_not_convert": ["lm_head"]}
    (fp8 / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return fp8, folder


def test_job_of_an_fp8_model_is_that_of_the_dense_one(twins: tuple[Path, Path]) -> None:
    fp8, dense = (prepare(folder, Recipe(method="rtn", group_size=32)) for folder in twins)
    assert fp8.source.config == dense.source.config
    assert (fp8.dtype, fp8.stored_dtype, fp8.output_bytes) == (dense.dtype, dense.stored_dtype, dense.output_bytes)
    assert fp8.dtype == torch.bfloat16
    assert fp8.names == dense.names


def test_quantized_like_the_dense_one(twins: tuple[Path, Path], tmp_path: Path) -> None:
    for name, folder in zip(("fp8", "dense"), twins, strict=True):
        quantize(folder, tmp_path / name, Recipe(method="rtn", group_size=32))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fp8", "dense")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("fp8", "dense")]
    assert configs[0] == configs[1]
