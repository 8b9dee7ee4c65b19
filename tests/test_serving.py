"""Packed checkpoints in transformers: kernels, memory, saving, and files that must not load."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_llama
from tolerance import assert_close_to_float64, relative_error
from torch import nn
from transformers import AutoModelForCausalLM, GPTQConfig, pipeline
from transformers.quantizers import auto

import llmq
import llmq.hf
from llmq import ops
from llmq.calibration import Calibration
from llmq.driver import quantize
from llmq.errors import CheckpointError
from llmq.nn import QuantLinear
from llmq.recipe import Recipe

# row of ops.KERNELS -> (bits, group size, sym, dtype) that it is the choice for; Triton's rows run in the interpreter
ROWS = {
    "cpu_int4pack": [(4, 32, True, torch.bfloat16), (4, 64, False, torch.bfloat16)],
    "cpu_int8pack": [(8, -1, True, torch.bfloat16)],
    "triton_w4a16": [(4, 32, True, torch.float16), (4, 64, False, torch.float16), (4, -1, False, torch.float16)],
    "triton_w8a16": [(8, 32, True, torch.float16), (8, 64, False, torch.float16)],
    "reference": [
        (2, 32, False, torch.float32),
        (3, 32, True, torch.bfloat16),
        (4, 32, False, torch.float32),
        (8, 32, False, torch.float16),
    ],
}
CASES = [(row, *case) for row, cases in ROWS.items() for case in cases]


def test_every_row_of_the_kernel_table_is_covered() -> None:
    assert ROWS.keys() == ops.KERNELS.keys()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the folder of `dense` quantized with these bits, groups and symmetry."""
    made: dict[Any, Path] = {}

    def make(bits: int = 4, group_size: int = 32, sym: bool = True) -> Path:
        key = (bits, group_size, sym)
        if key not in made:
            ids = torch.randint(1, 128, (8, 32), generator=torch.Generator().manual_seed(0))
            made[key] = tmp_path_factory.mktemp("packed")
            recipe = Recipe(bits=bits, group_size=group_size, sym=sym)
            quantize(dense, made[key], recipe, calibration=Calibration(ids, None, "x", "y"))
        return made[key]

    return make


@pytest.fixture
def broken(packed: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a packed folder with its tensors or quantization_config changed."""

    def make(tensors: Callable[[dict[str, Any]], None] | None = None, **config: Any) -> Path:
        source = packed()
        content = load_file(source / "model.safetensors")
        if tensors:
            tensors(content)
        save_file(content, tmp_path / "model.safetensors", metadata={"format": "pt"})
        whole = json.loads((source / "config.json").read_text(encoding="utf-8"))
        whole["quantization_config"].update(config)
        (tmp_path / "config.json").write_text(json.dumps(whole), encoding="utf-8")
        return tmp_path

    return make


def layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def choose_row(monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    """Make Triton's rows the choice on the CPU, where the interpreter runs them."""
    if row.startswith("triton"):
        monkeypatch.setattr(ops, "choose", lambda *_: row)


@pytest.mark.parametrize(("row", "bits", "group_size", "sym", "dtype"), CASES, ids=lambda v: str(v).rpartition(".")[2])
def test_packed_layers_and_logits_equal_the_dequantized_ones(
    row: str,
    bits: int,
    group_size: int,
    sym: bool,
    dtype: torch.dtype,
    dense: Path,
    packed: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose_row(monkeypatch, row)
    model = llmq.load(packed(bits, group_size, sym), dtype=dtype)
    exact = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64)
    for name, layer in layers(model).items():
        assert layer.kernel == row
        exact.get_submodule(name).weight.data.copy_(layer.quantized_weight().dequantize())

    def compare(layer: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        assert isinstance(layer, QuantLinear)
        expected = args[0].double() @ layer.quantized_weight().dequantize().double().T
        assert out.dtype == dtype
        assert_close_to_float64(out, expected, layer.in_features)

    for layer in layers(model).values():
        layer.register_forward_hook(compare)
    ids = torch.randint(1, 128, (1, 17), generator=torch.Generator().manual_seed(1))
    rounded = copy.deepcopy(exact).to(dtype)
    with torch.no_grad():
        expected = exact(ids).logits
        # the dense model in this dtype shows what two blocks of roundings are worth; packing must not add to it
        allowed = 1.5 * relative_error(rounded(ids).logits, expected)
        assert relative_error(model(ids).logits, expected) <= allowed


@pytest.mark.parametrize(("row", "bits", "group_size", "sym", "dtype"), CASES, ids=lambda v: str(v).rpartition(".")[2])
def test_saving_gives_back_the_tensors_that_were_loaded(
    row: str,
    bits: int,
    group_size: int,
    sym: bool,
    dtype: torch.dtype,
    packed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose_row(monkeypatch, row)
    folder = packed(bits, group_size, sym)
    llmq.load(folder, dtype=dtype).save_pretrained(tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        packed_tensor = key.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx")
        expected = tensor if packed_tensor else tensor.to(dtype)
        assert after[key].dtype == expected.dtype
        assert torch.equal(after[key], expected)
    configs = [json.loads((f / "config.json").read_text(encoding="utf-8")) for f in (folder, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_stay_packed_in_memory(packed: Callable[..., Path], dtype: torch.dtype) -> None:
    model = llmq.load(packed(4, 64, True), dtype=dtype)
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.int64))
    weights = sum(layer.in_features * layer.out_features for layer in layers(model).values())
    resident = sum(b.nbytes for layer in layers(model).values() for b in layer.buffers())
    assert 8 * resident / weights <= 4.5  # 4 bits, a scale of 16 per 64, and at most another 16 for the zero
    assert not any(p.ndim == 2 and "proj" in name for name, p in model.named_parameters())


def test_device_map_and_pipeline_and_generate(packed: Callable[..., Path]) -> None:
    folder = packed()
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", dtype=torch.bfloat16)
    assert {layer.kernel for layer in layers(model).values()} == {"cpu_int4pack"}
    generate = pipeline("text-generation", model=str(folder))
    assert layers(generate.model)
    text = generate("w1 w2 w3", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("w1 w2 w3")
    assert len(text) > len("w1 w2 w3")


def test_moving_and_casting_a_model_keeps_its_codes(packed: Callable[..., Path]) -> None:
    model = llmq.load(packed(4, 32, False), dtype=torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "proj" in key}
    ids = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        # transformers forbids casting quantized models as a whole; their parts may be cast
        head, body = model.lm_head.float(), model.model.float()
        head(body(ids).last_hidden_state)
        assert {layer.kernel for layer in layers(model).values()} == {"reference"}
        body.half()(ids)
        head.to(torch.bfloat16)
        body.to(torch.bfloat16)(ids)
    assert {layer.kernel for layer in layers(model).values()} == {"cpu_int4pack"}
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in before.items())
    other = llmq.load(packed(4, 32, True), dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({"x": torch.ones(1)})
    model.load_state_dict({**model.state_dict(), **before})
    with torch.no_grad():
        model(ids)


def test_scales_that_a_kernel_rounds_are_saved_exactly(packed: Callable[..., Path], tmp_path: Path) -> None:
    """A foreign file's float16 scales need not fit bfloat16."""
    content = load_file(packed() / "model.safetensors")
    for key in content:
        if key.endswith("scales"):
            content[key] = (content[key].float() * 1.0009765625).half()  # fills the last bits of float16
    save_file(content, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((packed() / "config.json").read_bytes())
    model = llmq.load(tmp_path, dtype=torch.bfloat16)
    assert {layer.kernel for layer in layers(model).values()} == {"cpu_int4pack"}
    saved = model.state_dict()
    assert all(torch.equal(saved[key], tensor) for key, tensor in content.items() if "proj" in key)


def test_operator_is_a_good_citizen(packed: Callable[..., Path]) -> None:
    layer = next(iter(layers(llmq.load(packed(), dtype=torch.float32)).values()))
    layer.prepare_(torch.float32)
    x = torch.randn(2, 3, layer.in_features)
    plain = layer.layer[:4]
    torch.library.opcheck(ops.quant_matmul, (x, layer._packed(), None, "reference", *plain))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert layer(x[:0]).shape == (0, 3, layer.out_features)


def drop(suffix: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        del tensors[next(key for key in tensors if key.endswith(suffix))]

    return change


def reshape(tensors: dict[str, Any]) -> None:
    key = next(key for key in tensors if key.endswith("o_proj.scales"))
    tensors[key] = tensors[key].T.contiguous()


def stray(tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if "layers.0.self_attn.q_proj." in key]:
        tensors[key.replace("layers.0", "layers.7")] = tensors[key].clone()


def act_order(tensors: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith("g_idx")]:
        tensors[key] = tensors[key][torch.randperm(len(tensors[key]), generator=draw)]


def uneven_groups(tensors: dict[str, Any]) -> None:
    key = next(key for key in tensors if key.endswith("g_idx"))
    tensors[key][0] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("qzeros"), r"proj: qzeros is missing"),
        (drop("scales"), r"proj: scales is missing"),
        (drop("q_proj.qweight"), r"q_proj\.\w+ is there, but no .*q_proj\.qweight"),
        (drop("input_layernorm.weight"), r"tensor .*input_layernorm.weight is missing"),
        (reshape, r"o_proj: scales is torch.float16 \[64, 2\]; a layer of 64 outputs and 64 inputs at 4 bits"),
        (stray, r"model.layers.7.self_attn.q_proj belongs to no linear layer"),
        (uneven_groups, r"proj: g_idx puts 3[13] of 128 columns into group"),
    ],
    ids=["zeros", "scales", "codes", "norm", "shape", "stray", "uneven groups"],
)
def test_damaged_packed_tensors_are_errors(broken: Callable[..., Path], change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        llmq.load(broken(change))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"bits": 8}, "at 8 bits"),
        ({"group_size": 64}, "group_size 64"),
        ({"checkpoint_format": "marlin", "format": "marlin"}, "unknown checkpoint_format 'marlin'"),
    ],
    ids=str,
)
def test_configuration_that_contradicts_the_tensors_is_an_error(
    broken: Callable[..., Path], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        llmq.load(broken(**config))


def test_folder_without_config_is_not_a_checkpoint(broken: Callable[..., Path]) -> None:
    folder = broken()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        llmq.load(folder)


def test_old_files_without_g_idx_load(broken: Callable[..., Path], packed: Callable[..., Path]) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if key.endswith("g_idx")]:
            del tensors[key]

    ids = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(llmq.load(broken(change))(ids).logits, llmq.load(packed())(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_foreign_act_order_is_honoured_and_saved_again(broken: Callable[..., Path], dtype: torch.dtype) -> None:
    folder = broken(act_order)
    content = load_file(folder / "model.safetensors")
    model = llmq.load(folder, dtype=dtype)
    for name, layer in layers(model).items():
        codes, zeros = (unpack_reference(content[f"{name}.{part}"], part) for part in ("qweight", "qzeros"))
        g_idx, scales = content[f"{name}.g_idx"].long(), content[f"{name}.scales"].double()
        weight = scales[g_idx] * (codes - (zeros[g_idx] + 1))  # [K, N], as the layout has it
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
        assert_close_to_float64(layer(x), x.double() @ weight, layer.in_features)
    saved = model.state_dict()
    assert all(torch.equal(saved[key], tensor) for key, tensor in content.items() if "proj" in key)


def unpack_reference(words: torch.Tensor, part: str) -> torch.Tensor:
    """Return the 4-bit fields of int32 `words`, float64, along dim 0 of qweight and dim 1 of qzeros."""
    fields = torch.stack([(words.long() >> shift) & 15 for shift in range(0, 32, 4)], dim=-1).double()
    if part == "qweight":
        return fields.transpose(1, 2).reshape(-1, words.shape[1])
    return fields.reshape(words.shape[0], -1)


def test_disable_gives_transformers_its_own_loader_back() -> None:
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is llmq.hf.PackedQuantizer
    llmq.hf.disable()
    try:
        assert auto.AUTO_QUANTIZER_MAPPING["gptq"].__module__.startswith("transformers.")
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] is GPTQConfig
    finally:
        llmq.hf.enable()
    assert auto.AUTO_QUANTIZER_MAPPING["gptq"] is llmq.hf.PackedQuantizer


class Own:
    """Stands for what transformers would do by itself."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("transformers' own quantizer")

    @classmethod
    def from_dict(cls, *_: Any, **__: Any) -> None:
        raise NotImplementedError("transformers' own configuration")


def test_quantizing_while_loading_is_left_to_transformers(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llmq.hf._PREVIOUS, "gptq", (GPTQConfig, Own))
    with pytest.raises(NotImplementedError, match="own quantizer"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=GPTQConfig(bits=4, dataset="c4"))


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "awq", "version": "gemv", "zero_point": True},
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
    ],
    ids=["awq gemv", "compressed-tensors fp8"],
)
def test_layouts_that_llmq_does_not_read_are_left_to_transformers(
    broken: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    folder = broken(**changes)
    monkeypatch.setitem(llmq.hf._PREVIOUS, changes["quant_method"], (Own, Own))
    with pytest.raises(NotImplementedError, match="own configuration"):
        AutoModelForCausalLM.from_pretrained(folder)
